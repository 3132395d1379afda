"""The engine of a space: loads the model when it is first needed, and finds its sweet spot when that pays."""

from __future__ import annotations

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
"""Fewer texts are embedded sooner than the sweet spot is found."""
_SAMPLE_TEXTS = 48
"""Enough batches to tell budgets apart, few enough to take seconds."""
DEFAULT_BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384, "mps": 4096, "endpoint": 16_384}
"""Until tuned. On CPUs a small budget is fastest: activations stay in the caches."""
_FIRST_BUDGET = {"cpu": 512, "cuda": 4096, "mps": 1024}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Where and how the model runs; as configured, while it is not loaded."""

    device: str
    precision: str
    max_batch_tokens: int
    backend: str = ""
    """Library and path, once the model is loaded."""
    ceiling_gflops: float = 0.0
    """What the device multiplies at most, in billions of operations per second; 0 when not known."""
    dimension: int = 0
    """Length of a vector, once the model is loaded."""


class Engine:
    """One model on one device in one process."""

    def __init__(self, space: EmbeddingSpace, options: EngineOptions) -> None:
        self._space, self._options = space, options
        self._provider = provider_of(space.model, options)
        self._lock = threading.Lock()
        self._embedder: LocalEmbedder | None = None
        self._tuned: Tuned | None = None
        self._ceiling_gflops = 0.0

    @property
    def info(self) -> EngineInfo:
        """Where and how the model runs."""
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
        """The model, loaded when first asked for. Raises ``ModelError`` or ``SettingsError`` when it can't be."""
        with self._lock:
            if self._embedder is None:
                self._embedder = self._load()
            return self._embedder

    def embedder_for(self, texts: Sequence[str], expected: int) -> LocalEmbedder:
        """The model for about `expected` texts like `texts`: tuned first, once per machine, when they are many."""
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
        """Find the fastest library and budget for texts like `texts`, use them from now on, and remember them.

        A budget that is set is kept, and nothing remembered. Raises ``SettingsError`` without texts, or for a
        model that no device of this machine runs.
        """
        if not texts:
            raise SettingsError("tuning needs texts to measure with, got none; name a folder with documents")
        if not self._provider.libraries:
            raise SettingsError(
                f"tuning needs a model that runs on this machine, got EMBED_MODEL={self._space.model!r}; set another"
            )
        current = self.embedder
        candidates = {_library(current): current} | dict(self._others(_library(current)))
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
        if not self._provider.libraries:
            return self._embedder_over(self._provider.load(self._space, self._options))
        self._tuned = recall(self._key)
        library = "" if self._tuned is None else self._tuned.library
        backend = self._provider.load(self._space, replace(self._options, library=library))
        self._ceiling_gflops = self._device.ceiling_gflops(backend.precision)
        embedder = self._embedder_over(backend)
        if self._tuned is not None and self._options.max_batch_tokens is None:
            embedder.max_batch_tokens = self._tuned.max_batch_tokens
        return embedder

    def _others(self, present: str) -> Iterator[tuple[str, LocalEmbedder]]:
        """The same model in the provider's other libraries, where they can run it and could be faster."""
        if self._device.kind != "cpu" or self._options.compiles or not has_openvino():
            return
        for library in self._provider.libraries:
            if library != present:
                embedder = self._embedder_over(
                    self._provider.load(self._space, replace(self._options, library=library))
                )
                if _library(embedder) == library:  # else that library can't run it
                    yield library, embedder

    def _embedder_over(self, backend: Backend) -> LocalEmbedder:
        budget = self._options.max_batch_tokens or _for_kind(DEFAULT_BATCH_TOKENS, backend.device.partition(":")[0])
        return LocalEmbedder(backend, self._space.tokenizer, self._space.max_seq_length, budget)


def configured(options: EngineOptions) -> EngineInfo:
    """What is known before the model is loaded."""
    budget = options.max_batch_tokens or _for_kind(DEFAULT_BATCH_TOKENS, options.device.partition(":")[0])
    return EngineInfo(options.device, options.precision, budget)


def _for_kind(values: Mapping[str, int], kind: str) -> int:
    return values.get(kind, values["cpu"])


def _library(embedder: LocalEmbedder) -> str:
    return embedder.backend.name.partition("-")[0]
