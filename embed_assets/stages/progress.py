"""Progress of a run: outcomes of its partitions, share done and estimated time left."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from embed_assets.stages.outcome import PartitionOutcome, Progress

_LEAST_SHARE = 0.01
"""Share of a run that must be done before its remaining time is estimated: less makes estimates erratic."""
_SECONDS_BETWEEN_LINES = 10.0
"""Least time between two progress lines in a run's log: shorter grows the event log of a long run."""


class Sink(Protocol):
    """Displays a run's progress. Called from several threads, so it must return quickly."""

    def progress(self, line: str, share: float) -> None:
        """Report progress as text and as a share from 0 to 1; called every few seconds or after each window."""
        ...

    def news(self, line: str) -> None:
        """Report a message about the compute, such as a lost worker."""
        ...

    def finished(self, outcome: PartitionOutcome, share: float) -> None:
        """Report a partition that finished or failed; `share` is that of the run, from 0 to 1."""
        ...


class RunObserver:
    """Collects the outcomes of a run's partitions and forwards its progress to a sink."""

    def __init__(self, sink: Sink, clock: Callable[[], float] = time.monotonic) -> None:
        self.outcomes: dict[str, PartitionOutcome] = {}
        """Outcomes of the partitions that finished or failed so far, by key."""
        self.kept: dict[str, dict[str, PartitionOutcome]] = {}
        """Outcomes of partitions that were brought up to date in other spaces, by space and key."""
        self._sink, self._clock = sink, clock
        self._sizes: Mapping[str, int] | None = None
        self._total = 0
        """Sum of the sizes."""
        self._done = 0.0
        """What of it is done."""
        self._shares: dict[str, float] = {}
        """Share of each partition that is done, from 0 to 1, by key."""
        self._lock = threading.Lock()
        self._started = clock()

    def start(self, sizes: Mapping[str, int]) -> None:
        """Start the clock over partitions of these sizes (bytes, by key).

        Later calls are ignored, because a sync of several runs calls it first for all of them.
        """
        if self._sizes is None:
            self._sizes, self._total, self._started = sizes, sum(sizes.values()), self._clock()

    def progress(self, key: str, progress: Progress) -> None:
        """Report how much of a partition is embedded; may be called from any thread."""
        self._advance(key, progress.share)
        remaining = self.remaining_seconds
        left = "" if remaining is None else f", about {_duration(remaining)} left"
        line = (
            f"{key}: {progress.texts:,} of at most {progress.expected:,} texts embedded, "
            f"{progress.tokens_per_second:,.0f} tokens/s{left}"
        )
        self._sink.progress(line, self.share)

    def news(self, line: str) -> None:
        """Forward a message about the compute, such as a lost worker."""
        self._sink.news(line)

    def finished(self, outcome: PartitionOutcome) -> None:
        """Keep the outcome of a partition that finished or failed, and report it."""
        self._advance(outcome.key, 1.0)
        # After a retry of the step, partitions that the first attempt materialized are fresh: keep their first outcome.
        if outcome.state != "fresh" or outcome.key not in self.outcomes:
            self.outcomes[outcome.key] = outcome
        self._sink.finished(outcome, self.share)

    def finished_in(self, space: str, outcome: PartitionOutcome) -> None:
        """Keep the outcome of a partition that was brought up to date in another space than the configured one."""
        self.kept.setdefault(space, {})[outcome.key] = outcome

    @property
    def share(self) -> float:
        """Share of the run that is done, from 0 to 1, weighted by bytes."""
        return min(1.0, self._done / self._total) if self._total else 0.0

    def _advance(self, key: str, share: float) -> None:
        with self._lock:
            self._done += (share - self._shares.get(key, 0.0)) * (self._sizes or {}).get(key, 0)
            self._shares[key] = share

    @property
    def remaining_seconds(self) -> float | None:
        """Estimated seconds until the run ends; None while too little is done for an estimate."""
        share = self.share
        return (self._clock() - self._started) * (1 - share) / share if share > _LEAST_SHARE else None


class LogSink:
    """Writes progress to the run's log: a line every few seconds, and one per partition."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._last_line = time.monotonic()

    def progress(self, line: str, share: float) -> None:
        """Log the line, unless the last one is less than 10 seconds old."""
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._log.info(line)

    def news(self, line: str) -> None:
        """Log the message."""
        self._log.info(line)

    def finished(self, outcome: PartitionOutcome, share: float) -> None:
        """Log the partition's counts, or its error."""
        if outcome.error is not None:
            self._log.error(f"{outcome.key}: failed: {outcome.error}")
        else:
            self._log.info(
                f"{outcome.key}: {outcome.state}; {outcome.chunks} chunks: {outcome.embedded} embedded, "
                f"{outcome.reused} reused, {outcome.dropped} dropped; {outcome.rejected} documents rejected"
            )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
