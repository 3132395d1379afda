"""Runs a space's model: loads it on first use, and tunes library and token budget when the job is large enough."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from embed_assets.engine.backend import Backend
from embed_assets.engine.backends.openvino_library import has_openvino
from embed_assets.engine.embedder import LocalEmbedder
from embed_assets.engine.hardware import Device, resolve_device
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.providers.catalog import provider_of
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.engine.tuning import (
    Memory,
    Point,
    Tuned,
    Tuning,
    measure_budget,
    measure_memory,
    recall,
    remember,
    sweep,
    sweet_spot,
    tuning_key,
)
from embed_assets.errors import SettingsError

TUNE_FROM_TEXTS = 2000
"""Smaller jobs finish before tuning would pay off."""
_SAMPLE_TEXTS = 48
"""Enough batches to tell budgets apart, few enough for tuning to take seconds and not a minute."""
DEFAULT_BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384, "mps": 4096, "endpoint": 16_384}
"""Tokens per forward pass until tuned, by kind of device.

On CPUs, 1,024 to 4,096 were measured faster than 16,384, as activations stay in the caches. 16,384 is the default of
Text Embeddings Inference. The value for MPS is not measured: it trades launch overhead against memory.
"""
_SMALL_MODEL_WEIGHTS = 100_000_000
"""Weights in linear layers of a model whose batches must be large to keep a large GPU busy."""
_LARGE_GPU_BYTES = 40 << 30
"""Free memory of a GPU that a small model needs large batches to keep busy."""
_LARGE_BATCH_TOKENS = 65_536
"""For those. An H100 computes 16,384 tokens of MiniLM in 1.8 ms, about as long as it takes to launch the kernels; by
arithmetic, not measured yet."""
_FIRST_BUDGET = {"cpu": 512, "cuda": 16_384, "mps": 1024}
"""Where a sweep begins: below the defaults, so that it sees throughput rise before it levels off."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Where and how the model runs. Until it is loaded: as configured."""

    device: str
    precision: str
    max_batch_tokens: int
    backend: str = ""
    """Library and code path; empty until the model is loaded."""
    ceiling_gflops: float = 0.0
    """The device's matrix-product ceiling, in billions of floating-point operations per second; 0 when not known."""
    dimension: int = 0
    """Length of a vector; 0 until the model is loaded."""


class Engine:
    """One model on one device in one process. Loading is thread-safe."""

    def __init__(self, space: EmbeddingSpace, options: EngineOptions) -> None:
        self._space, self._options = space, options
        self._provider = provider_of(space.model, options)
        self._lock = threading.Lock()
        self._embedder: LocalEmbedder | None = None
        self._tuned: Tuned | None = None
        self._ceiling_gflops = 0.0

    @property
    def info(self) -> EngineInfo:
        """Where and how the model runs, without loading it."""
        if self._embedder is None:
            return configured(self._options)
        backend = self._embedder.backend
        return EngineInfo(
            backend.device,
            backend.precision,
            self._embedder.max_batch_tokens,
            backend.name,
            self._ceiling_gflops,
            backend.dimension,
        )

    @property
    def embedder(self) -> LocalEmbedder:
        """The model, loaded on first access. Raises ``ModelError`` or ``SettingsError`` when it can't be loaded."""
        with self._lock:
            if self._embedder is None:
                self._embedder = self._load()
            return self._embedder

    def embedder_for(self, texts: Sequence[str], expected: int) -> LocalEmbedder:
        """The model, for about `expected` texts like `texts`. For many texts it is tuned first, once per machine."""
        embedder = self.embedder
        if self._provider.libraries and self._tuned is None and expected >= TUNE_FROM_TEXTS:
            _log.info("finding the fastest library and budget for %s on this machine, once", self._space.name)
            self.tune(texts[:: max(1, len(texts) // _SAMPLE_TEXTS)])
        return self._embedder or embedder

    def tune(
        self,
        texts: Sequence[str],
        is_full: bool = False,
        on_point: Callable[[str, Point], None] = lambda library, point: None,
    ) -> Tuning:
        """Find the fastest library and token budget for texts like `texts`, switch to them, and cache them on disk.

        A configured budget stays in force, and nothing is cached then. `is_full` sweeps beyond the best budget;
        `on_point` is called with each library and measurement. Raises ``SettingsError`` without texts, or for a model
        that does not run on this machine.
        """
        if not texts:
            raise SettingsError("tuning needs texts to measure with, got none; name a folder with documents")
        if not self._provider.libraries:
            raise SettingsError(
                f"tuning needs a model that runs on this machine, got EMBED_MODEL={self._space.model!r}; set another"
            )
        current = self.embedder
        candidates = {_library(current): current} | dict(self._alternatives(_library(current)))
        memory = {name: measure_memory(embedder, texts, self._device) for name, embedder in candidates.items()}
        points: dict[str, list[Point]] = {}
        for name, embedder in candidates.items():
            points[name] = self._sweep(name, embedder, texts, memory[name], is_full, on_point)
        library = max(points, key=lambda name: sweet_spot(points[name]).tokens_per_second)
        spot = sweet_spot(points[library])
        budget = self._options.max_batch_tokens or spot.max_batch_tokens
        self._tuned = Tuned(library, budget, round(spot.tokens_per_second, 1))
        self._embedder = candidates[library]
        self._embedder.max_batch_tokens = budget
        if self._options.max_batch_tokens is None:
            remember(self._key, self._tuned)
        free = self._device.free_bytes()
        return Tuning(library, spot, points, memory, free, {n: e.backend.workers for n, e in candidates.items()})

    def _sweep(
        self,
        name: str,
        embedder: LocalEmbedder,
        texts: Sequence[str],
        memory: Memory,
        is_full: bool,
        on_point: Callable[[str, Point], None],
    ) -> list[Point]:
        fits = memory.fits(self._device.free_bytes(), embedder.backend.workers)
        fixed = None if is_full else self._options.max_batch_tokens
        return sweep(
            lambda budget: measure_budget(embedder, texts, budget),
            fixed or _for_kind(_FIRST_BUDGET, self._device.kind) // (4 if is_full else 1),
            fixed or fits,
            is_full,
            lambda point: on_point(name, point),
        )

    @cached_property
    def _device(self) -> Device:
        return resolve_device(self._options.device)

    @cached_property
    def _key(self) -> str:
        return tuning_key(self._space, self._device, self._options.precision, self._options.compiles)

    def _load(self) -> LocalEmbedder:
        with _paused_gc():
            return self._load_now()

    def _load_now(self) -> LocalEmbedder:
        if not self._provider.libraries:
            return self._new_embedder(self._provider.load(self._space, self._options))
        self._tuned = recall(self._key)
        library = "" if self._tuned is None else self._tuned.library
        backend = self._provider.load(self._space, replace(self._options, library=library))
        self._ceiling_gflops = self._device.ceiling_gflops(backend.precision)
        embedder = self._new_embedder(backend)
        if self._tuned is not None and self._options.max_batch_tokens is None:
            embedder.max_batch_tokens = self._tuned.max_batch_tokens
        return embedder

    def _alternatives(self, present: str) -> Iterator[tuple[str, LocalEmbedder]]:
        """Name and embedder of each other library of the provider that can run the model and could be faster."""
        if self._device.kind != "cpu" or self._options.compiles or not has_openvino():
            return
        for library in self._provider.libraries:
            if library != present:
                embedder = self._new_embedder(self._provider.load(self._space, replace(self._options, library=library)))
                if _library(embedder) == library:  # otherwise the provider fell back to another library
                    yield library, embedder

    def _new_embedder(self, backend: Backend) -> LocalEmbedder:
        kind = backend.device.partition(":")[0]
        budget = self._options.max_batch_tokens or _for_kind(DEFAULT_BATCH_TOKENS, kind)
        if kind == "cuda" and self._options.max_batch_tokens is None:
            budget = default_gpu_budget(backend.cost.linear_weights, self._device.free_bytes())
        return LocalEmbedder(backend, self._space.tokenizer, self._space.max_seq_length, budget)


@contextlib.contextmanager
def _paused_gc() -> Iterator[None]:
    """Without collecting garbage: the libraries' imports make none, but looking for it takes half a second of four."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def configured(options: EngineOptions) -> EngineInfo:
    """What is known about the engine before the model is loaded."""
    budget = options.max_batch_tokens or _for_kind(DEFAULT_BATCH_TOKENS, options.device.partition(":")[0])
    return EngineInfo(options.device, options.precision, budget)


def default_gpu_budget(linear_weights: int, free_bytes: int | None) -> int:
    """Tokens per forward pass until tuned, for a model with so many weights in linear layers on a GPU."""
    needs_much = linear_weights <= _SMALL_MODEL_WEIGHTS and (free_bytes or 0) >= _LARGE_GPU_BYTES
    return _LARGE_BATCH_TOKENS if needs_much else DEFAULT_BATCH_TOKENS["cuda"]


def _for_kind(values: Mapping[str, int], kind: str) -> int:
    return values.get(kind, values["cpu"])


def _library(embedder: LocalEmbedder) -> str:
    return embedder.backend.name.partition("-")[0]
