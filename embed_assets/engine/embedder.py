"""Texts to vectors: tokenize a window, sort and pack it, run the batches, put the rows back in order.

    caller reads ─▶ tokenizer thread ─▶ device thread: plan, run on the workers, fetch once ─▶ caller writes

Two windows are under way at a time, so that reading, tokenizing and writing are done while the device computes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from embed_assets.engine.batching import Batch, Layout, plan_batches, plan_part
from embed_assets.engine.gpu import GpuUsage
from embed_assets.engine.metrics import EngineStats, ModelCost
from embed_assets.engine.survival import Survivor, has_length
from embed_assets.engine.tokenization import ModelTokenizer, TokenizedTexts
from embed_assets.errors import EmbeddingError

_log = logging.getLogger(__name__)

WINDOWS_UNDER_WAY = 2
TICK_SECONDS = 2.0


class Backend(Protocol):
    """The model on its device."""

    precision: str
    dimension: int
    """Length of a vector."""
    layout: Layout
    workers: int
    """Batches that are computed at the same time."""

    @property
    def device(self) -> str: ...

    @property
    def name(self) -> str:
        """Library and path, as in "torch-packed"."""
        ...

    @property
    def cost(self) -> ModelCost: ...

    def enter_worker(self) -> None:
        """Called once in each worker's thread, before its first batch."""
        ...

    def new_buffer(self, rows: int) -> Any:
        """Where a window's vectors are collected."""
        ...

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: Any) -> None:
        """Compute a batch, and put its vectors (not normalised) into its rows of `buffer`."""
        ...

    def fetch(self, buffer: Any) -> np.ndarray:
        """The collected vectors, float32 of shape (rows, dimension), in main memory."""
        ...

    def usage(self) -> GpuUsage | None:
        """How busy the GPU is, where there is one."""
        ...

    def release_memory(self) -> None:
        """Give back what a failed batch held."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddedTexts:
    """What came out of one window."""

    vectors: np.ndarray
    """float32, shape (texts, dimension), unit norm, in the order of the texts; zeros for rejected ones."""
    is_truncated: np.ndarray
    """bool, shape (texts,)."""
    rejected: dict[int, str]
    """Rows of texts the model gave no usable vector for, and why."""
    stats: EngineStats


@dataclass(slots=True)
class _Job:
    """A window on its way over the device."""

    texts: Sequence[str]
    tokens: TokenizedTexts
    buffer: Any
    batches: deque[Batch]
    lock: threading.Lock = field(default_factory=threading.Lock)
    rejected: dict[int, str] = field(default_factory=dict)
    padded_tokens: int = 0
    is_stopped: bool = False

    def next_batch(self) -> Batch | None:
        with self.lock:
            return None if self.is_stopped or not self.batches else self.batches.popleft()


class Embedder:
    """A model that is ready to embed. Usable from one thread at a time."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: ModelTokenizer,
        max_seq_length: int,
        max_batch_tokens: int = 1024,
        backoff_seconds: float = 0.5,
    ) -> None:
        self.backend, self._max_seq_length = backend, max_seq_length
        self._tokenizer = tokenizer.copy()  # other threads may use the original meanwhile
        self.max_batch_tokens = max_batch_tokens
        self._survivor = Survivor(backend, self._tokenizer.tokenize(["a"], max_seq_length), backoff_seconds)
        self._stop = threading.Event()
        self._idle_since: float | None = None
        self._done_texts = self._done_tokens = 0
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizer")
        self._device_thread = ThreadPoolExecutor(1, "device", initializer=backend.enter_worker)
        self._workers = ThreadPoolExecutor(backend.workers, "worker", initializer=backend.enter_worker)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self.backend.dimension

    def embed(self, texts: Sequence[str]) -> EmbeddedTexts:
        """One unit-norm vector per text, prompt already included in the texts."""
        [embedded] = self.embed_windows([texts])
        return embedded

    def embed_one(self, text: str) -> np.ndarray:
        """The text's vector, shape (dimension,). Raises ``EmbeddingError`` when the model gives none."""
        embedded = self.embed([text])
        if embedded.rejected:
            raise EmbeddingError(f"the text {text[:80]!r} could not be embedded: {embedded.rejected[0]}; change it")
        return np.asarray(embedded.vectors[0])

    def embed_windows(
        self, windows: Iterable[Sequence[str]], on_tick: Callable[[int, int], None] = lambda texts, tokens: None
    ) -> Iterator[EmbeddedTexts]:
        """The vectors of each window, in order. While one is handed out, the next is on the device.

        The next window is asked for, in the caller's thread, while the one before is computed. Every `TICK_SECONDS`,
        also in the caller's thread, `on_tick` hears how many texts and tokens are done. An error in any thread is
        raised here as it was; leaving early, by an error or Ctrl-C, stops the threads after their present batch.
        """
        under_way: deque[Future[EmbeddedTexts]] = deque()
        self._stop.clear()
        self._idle_since = None
        self._done_texts = self._done_tokens = 0
        try:
            for texts in windows:
                tokens = self._tokenizer_thread.submit(self._tokenizer.tokenize, texts, self._max_seq_length)
                under_way.append(self._device_thread.submit(self._run, texts, tokens))
                if len(under_way) == WINDOWS_UNDER_WAY:
                    yield self._awaited(under_way[0], on_tick)
                    under_way.popleft()
            while under_way:
                yield self._awaited(under_way[0], on_tick)
                under_way.popleft()
        finally:
            self._stop.set()
            for future in under_way:
                if not future.cancel():
                    future.exception()  # waits for the present batch, not for the window

    def _awaited(self, future: Future[EmbeddedTexts], on_tick: Callable[[int, int], None]) -> EmbeddedTexts:
        while not wait([future], TICK_SECONDS).done:
            on_tick(self._done_texts, self._done_tokens)
        return future.result()

    def _run(self, texts: Sequence[str], tokenized: Future[TokenizedTexts]) -> EmbeddedTexts:
        """In the device thread: one window from tokens to vectors."""
        asked = time.perf_counter()
        tokens = tokenized.result()
        started = time.perf_counter()
        lengths = tokens.lengths
        batches = plan_batches(lengths, self.max_batch_tokens, self.backend.layout)
        job = _Job(texts, tokens, self.backend.new_buffer(len(texts)), deque(batches))
        self._drain_on_workers(job)
        usage = self.backend.usage()
        vectors = self._checked(job, self.backend.fetch(job.buffer))
        finished = time.perf_counter()
        _log.debug("a window of %d texts is finished", len(texts))
        idle = 0.0 if self._idle_since is None else max(0.0, asked - self._idle_since)
        self._idle_since = finished
        stats = EngineStats(
            len(texts),
            int(lengths.sum()),
            job.padded_tokens,
            self.backend.cost.operations(lengths),
            finished - started,
            started - asked,
            idle,
        )
        if usage is not None:
            stats.gpu_readings, stats.gpu_percent_sum = 1, usage.utilization_percent
            stats.gpu_memory_bytes = usage.memory_used_bytes
        return EmbeddedTexts(vectors, tokens.is_truncated, job.rejected, stats)

    def _drain_on_workers(self, job: _Job) -> None:
        if self.backend.workers == 1:
            self._drain(job)
            return
        futures = [self._workers.submit(self._drain, job) for _ in range(self.backend.workers)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            raise errors[0]

    def _drain(self, job: _Job) -> None:
        """Run batches until none is left, surviving what can be survived."""
        try:
            while (batch := job.next_batch()) is not None:
                if self._stop.is_set():
                    raise EmbeddingError("embedding was stopped before the window was finished; start it again")
                self._run_batch(job, batch)
        except BaseException:
            job.is_stopped = True
            raise

    def _run_batch(self, job: _Job, batch: Batch) -> None:
        outcome = self._survivor.run(job.texts, job.tokens, batch, job.buffer, self.max_batch_tokens)
        with job.lock:
            job.rejected |= outcome.rejected
            job.padded_tokens += outcome.padded_tokens
            if outcome.max_batch_tokens < self.max_batch_tokens:
                self.max_batch_tokens = outcome.max_batch_tokens
                job.batches = self._replanned(job)
            self._done_texts += len(batch.rows)
            _log.debug("%d texts embedded", len(batch.rows))
            self._done_tokens += int(job.tokens.lengths[batch.rows].sum())

    def _replanned(self, job: _Job) -> deque[Batch]:
        """The batches still to run, under the smaller budget."""
        if not job.batches:
            return job.batches
        rows = np.concatenate([batch.rows for batch in job.batches])
        return deque(plan_part(rows, job.tokens.lengths, self.max_batch_tokens, self.backend.layout))

    def _checked(self, job: _Job, vectors: np.ndarray) -> np.ndarray:
        """The vectors at unit length.

        A text whose vector has no length, or no finite one, is tried alone, then rejected.
        """
        for row in np.flatnonzero(~has_length(vectors)).tolist():
            if row not in job.rejected:
                with contextlib.suppress(Exception):  # then its vector stays what it is, and it is rejected below
                    vectors[row] = self._survivor.alone(job.texts, job.tokens, row)
                if not has_length(vectors[row]):
                    reason = f"the model's vector is zero or not finite in {self.backend.precision}"
                    self._survivor.check_health(
                        EmbeddingError(f"{reason} for any text; set another EMBED_PRECISION or EMBED_MODEL")
                    )
                    job.rejected[row] = reason
        if job.rejected:
            vectors[list(job.rejected)] = 0
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)
