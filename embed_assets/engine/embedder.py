"""Embeds windows of texts: tokenizes, sorts and packs each, runs its batches, and restores the order.

    caller reads ─▶ tokenizer thread ─▶ device thread: plan, run on the workers, fetch once ─▶ caller writes

Two windows are in flight at a time, so that reading, tokenizing and writing overlap with the device's work.
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

from embed_assets.engine.backend import Backend, EmbeddedWindow, Fetched, OnTick, Window
from embed_assets.engine.batching import Batch, plan_batches, plan_part
from embed_assets.engine.metrics import EngineStats
from embed_assets.engine.recovery import Outcome, Recovery
from embed_assets.engine.tokenization import ModelTokenizer, TokenizedTexts
from embed_assets.errors import EmbeddingError

_log = logging.getLogger(__name__)

WINDOWS_IN_FLIGHT = 2
"""One on the device and one being read and tokenized; more would only hold more memory."""
TICK_SECONDS = 2.0
"""Often enough for a live display, seldom enough to cost nothing."""


@dataclass(slots=True)
class _Job:
    """A window in flight, with its batches that are still to run."""

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
    """Embeds texts in this process, over a loaded backend. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: ModelTokenizer,
        max_seq_length: int,
        max_batch_tokens: int = 1024,
        backoff_seconds: float = 0.5,
    ) -> None:
        self.backend, self._max_seq_length = backend, max_seq_length
        self._tokenizer = tokenizer.copy()  # other threads may be using the original
        self.max_batch_tokens = max_batch_tokens
        self._recovery = Recovery(backend, self._tokenizer.tokenize(["a"], max_seq_length), backoff_seconds)
        self._stop = threading.Event()
        backend.stop_on(self._stop)
        self._idle_since: float | None = None
        self._done_texts = self._done_tokens = 0
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizer")
        self._device_thread = ThreadPoolExecutor(1, "device", initializer=backend.enter_worker)
        self._workers = ThreadPoolExecutor(backend.workers, "worker", initializer=backend.enter_worker)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self.backend.dimension

    def stop(self) -> None:
        """End `embed_windows`, which another thread runs, after the current batch: it raises ``EmbeddingError``."""
        self._stop.set()

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """int64: tokens that the model reads of each text."""
        return self._tokenizer_thread.submit(self._tokenize, Window(texts)).result().lengths

    def embed(self, texts: Sequence[str]) -> EmbeddedWindow:
        """One unit-norm vector per text. The texts include the prompt. Raises what `embed_windows` raises."""
        [embedded] = self.embed_windows([Window(texts)])
        return embedded

    def embed_one(self, text: str) -> np.ndarray:
        """The text's unit-norm vector, shape (dimension,). Raises ``EmbeddingError`` if the model rejects the text."""
        embedded = self.embed([text])
        if embedded.rejected:
            raise EmbeddingError(f"the text {text[:80]!r} could not be embedded: {embedded.rejected[0]}; change it")
        return np.asarray(embedded.vectors[0])

    def embed_windows(
        self, windows: Iterable[Window], on_tick: OnTick = lambda texts, tokens: None
    ) -> Iterator[EmbeddedWindow]:
        """Yield the vectors of each window, in order, while the next window is on the device.

        `windows` is advanced in the caller's thread while the previous window is computed. `on_tick` is called in the
        caller's thread every `TICK_SECONDS`, with the number of texts and of tokens embedded so far. An error in any
        thread is raised here unchanged. Closing the generator early, by an error or Ctrl-C, stops the threads after
        their current batch.
        """
        in_flight: deque[Future[EmbeddedWindow]] = deque()
        self._stop.clear()
        self._idle_since = None
        self._done_texts = self._done_tokens = 0
        try:
            for window in windows:
                tokens = self._tokenizer_thread.submit(self._tokenize, window)
                in_flight.append(self._device_thread.submit(self._run, window, tokens))
                if len(in_flight) == WINDOWS_IN_FLIGHT:
                    yield self._wait_for(in_flight[0], on_tick)
                    in_flight.popleft()
            while in_flight:
                yield self._wait_for(in_flight[0], on_tick)
                in_flight.popleft()
        finally:
            self._stop.set()
            for future in in_flight:
                if not future.cancel():
                    future.exception()  # waits for the current batch, not for the whole window

    def _tokenize(self, window: Window) -> TokenizedTexts:
        """The window's tokens, as the model reads them; runs in the tokenizer thread."""
        known = window.tokens
        if known is not None and known.lengths.max(initial=0) <= self._max_seq_length:
            return known
        return self._tokenizer.tokenize(window.texts, self._max_seq_length)

    def _wait_for(self, future: Future[EmbeddedWindow], on_tick: OnTick) -> EmbeddedWindow:
        while not wait([future], TICK_SECONDS).done:
            on_tick(self._done_texts, self._done_tokens)
        return future.result()

    def _run(self, window: Window, tokenized: Future[TokenizedTexts]) -> EmbeddedWindow:
        """Embed one window; runs in the device thread."""
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
        _log.debug("finished a window of %d texts", len(window.texts))
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
        """Run batches until none is left, recovering from errors where that is possible."""
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
            _log.debug("embedded %d texts", len(batch.rows))
            self._done_tokens += int(tokens.lengths[batch.rows].sum())

    def _replanned(self, job: _Job) -> deque[Batch]:
        """The remaining batches, planned again under the smaller budget."""
        if not job.batches:
            return job.batches
        rows = np.concatenate([batch.rows for batch in job.batches])
        return deque(plan_part(rows, job.tokens.lengths, self.max_batch_tokens, self.backend.layout))

    def _checked(self, job: _Job, fetched: Fetched) -> np.ndarray:
        """The vectors, float32 of shape (texts, dimension), once each was usable or its text rejected.

        A text whose vector is zero or not finite is embedded once more on its own, then rejected; its row is zeros.
        """
        vectors = fetched.vectors
        for row in np.flatnonzero(~fetched.is_usable).tolist():
            if row not in job.rejected:
                with contextlib.suppress(Exception):  # the vector stays as it is, and is rejected below
                    alone = self._recovery.embed_alone(job.window.texts, job.tokens, row)
                    vectors[row], fetched.is_usable[row] = alone.vectors[0], alone.is_usable[0]
                if not fetched.is_usable[row]:
                    reason = f"the model's vector is zero or not finite in {self.backend.precision}"
                    self._recovery.check_health(
                        EmbeddingError(f"{reason} for any text; set another EMBED_PRECISION or EMBED_MODEL")
                    )
                    job.rejected[row] = reason
        if job.rejected:
            vectors[list(job.rejected)] = 0
        return vectors
