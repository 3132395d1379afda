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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embed_assets.engine.backend import Backend, EmbeddedWindow, OnTick, Window
from embed_assets.engine.batching import Batch, plan_batches, plan_part
from embed_assets.engine.metrics import EngineStats
from embed_assets.engine.recovery import Outcome, Recovery, has_length
from embed_assets.engine.tokenization import ModelTokenizer, TokenizedTexts
from embed_assets.errors import EmbeddingError

_log = logging.getLogger(__name__)

WINDOWS_UNDER_WAY = 2
TICK_SECONDS = 2.0


@dataclass(slots=True)
class _Job:
    """A window on its way over the device."""

    window: Window
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


class LocalEmbedder:
    """A model that is ready to embed, in this process. Usable by one thread at a time."""

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
        self._recovery = Recovery(backend, self._tokenizer.tokenize(["a"], max_seq_length), backoff_seconds)
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

    def embed(self, texts: Sequence[str]) -> EmbeddedWindow:
        """One unit-norm vector per text, prompt already included in the texts."""
        [embedded] = self.embed_windows([Window(texts)])
        return embedded

    def embed_one(self, text: str) -> np.ndarray:
        """The text's vector, shape (dimension,). Raises ``EmbeddingError`` when the model gives none."""
        embedded = self.embed([text])
        if embedded.rejected:
            raise EmbeddingError(f"the text {text[:80]!r} could not be embedded: {embedded.rejected[0]}; change it")
        return np.asarray(embedded.vectors[0])

    def embed_windows(
        self, windows: Iterable[Window], on_tick: OnTick = lambda texts, tokens: None
    ) -> Iterator[EmbeddedWindow]:
        """The vectors of each window, in order. While one is handed out, the next is on the device.

        The next window is asked for, in the caller's thread, while the one before is computed. Every `TICK_SECONDS`,
        also in the caller's thread, `on_tick` hears how many texts and tokens are done. An error in any thread is
        raised here as it was; leaving early, by an error or Ctrl-C, stops the threads after their present batch.
        """
        under_way: deque[Future[EmbeddedWindow]] = deque()
        self._stop.clear()
        self._idle_since = None
        self._done_texts = self._done_tokens = 0
        try:
            for window in windows:
                tokens = self._tokenizer_thread.submit(self._tokenizer.tokenize, window.texts, self._max_seq_length)
                under_way.append(self._device_thread.submit(self._run, window, tokens))
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

    def _awaited(self, future: Future[EmbeddedWindow], on_tick: OnTick) -> EmbeddedWindow:
        while not wait([future], TICK_SECONDS).done:
            on_tick(self._done_texts, self._done_tokens)
        return future.result()

    def _run(self, window: Window, tokenized: Future[TokenizedTexts]) -> EmbeddedWindow:
        """In the device thread: one window from tokens to vectors."""
        asked = time.perf_counter()
        tokens = tokenized.result()
        started = time.perf_counter()
        lengths = tokens.lengths
        batches = plan_batches(lengths, self.max_batch_tokens, self.backend.layout)
        job = _Job(window, tokens, self.backend.new_buffer(len(window.texts)), deque(batches))
        self._drain_on_workers(job)
        usage = self.backend.usage()
        vectors = self._checked(job, self.backend.fetch(job.buffer))
        finished = time.perf_counter()
        _log.debug("a window of %d texts is finished", len(window.texts))
        idle = 0.0 if self._idle_since is None else max(0.0, asked - self._idle_since)
        self._idle_since = finished
        stats = EngineStats(
            len(window.texts),
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
        return EmbeddedWindow(window, vectors, tokens.is_truncated, job.rejected, stats)

    def _drain_on_workers(self, job: _Job) -> None:
        if self.backend.workers == 1:
            self._drain(job)
            return
        futures = [self._workers.submit(self._drain, job) for _ in range(self.backend.workers)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            raise errors[0]

    def _drain(self, job: _Job) -> None:
        """Run batches until none is left, recovering from what can be recovered from."""
        try:
            while (batch := job.next_batch()) is not None:
                if self._stop.is_set():
                    raise EmbeddingError("embedding was stopped before the window was finished; start it again")
                self._run_batch(job, batch)
        except BaseException:
            job.is_stopped = True
            raise

    def _run_batch(self, job: _Job, batch: Batch) -> None:
        texts, tokens, buffer = job.window.texts, job.tokens, job.buffer
        try:
            self.backend.forward(texts, tokens, batch, buffer)
            outcome = Outcome(self.max_batch_tokens, batch.tokens)
        except Exception as error:
            outcome = self._recovery.run(texts, tokens, batch, buffer, self.max_batch_tokens, error)
        with job.lock:
            job.rejected |= outcome.rejected
            job.padded_tokens += outcome.padded_tokens
            if outcome.max_batch_tokens < self.max_batch_tokens:
                self.max_batch_tokens = outcome.max_batch_tokens
                job.batches = self._replanned(job)
            self._done_texts += len(batch.rows)
            _log.debug("%d texts embedded", len(batch.rows))
            self._done_tokens += int(tokens.lengths[batch.rows].sum())

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
                    vectors[row] = self._recovery.alone(job.window.texts, job.tokens, row)
                if not has_length(vectors[row]):
                    reason = f"the model's vector is zero or not finite in {self.backend.precision}"
                    self._recovery.check_health(
                        EmbeddingError(f"{reason} for any text; set another EMBED_PRECISION or EMBED_MODEL")
                    )
                    job.rejected[row] = reason
        if job.rejected:
            vectors[list(job.rejected)] = 0
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)
