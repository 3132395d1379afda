"""Following a run: what became of its partitions, how far it is, and when it will end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from embed_assets.stages.outcome import PartitionOutcome, Progress

_LEAST_SHARE = 0.01
"""Before that much of a run is done, its speed says little of the rest."""
_SECONDS_BETWEEN_LINES = 10.0


class Sink(Protocol):
    """Shows people what a run does. Called by several threads; must return quickly."""

    def progress(self, line: str, share: float) -> None:
        """How far the run is, in words and from 0 to 1; every few seconds, or after each window."""
        ...

    def news(self, line: str) -> None:
        """Something about where the model runs."""
        ...

    def finished(self, outcome: PartitionOutcome, share: float) -> None:
        """A partition is finished, or has failed."""
        ...


class RunObserver:
    """Hears of a run's progress, keeps the outcomes of its partitions, and tells a sink."""

    def __init__(self, sink: Sink, clock: Callable[[], float] = time.monotonic) -> None:
        self.outcomes: dict[str, PartitionOutcome] = {}
        """What became of the partitions so far, by key."""
        self._sink, self._clock = sink, clock
        self._sizes: Mapping[str, int] | None = None
        self._shares: dict[str, float] = {}
        """How much of each partition is done, from 0 to 1."""
        self._started = clock()

    def start(self, sizes: Mapping[str, int]) -> None:
        """A run begins over partitions of these sizes, in bytes. A sync of several runs says so once, for all."""
        if self._sizes is None:
            self._sizes, self._started = sizes, self._clock()

    def progress(self, key: str, progress: Progress) -> None:
        """So much of a partition is embedded. From any thread."""
        self._shares[key] = progress.share
        remaining = self.remaining_seconds
        left = "" if remaining is None else f", about {_duration(remaining)} left"
        line = (
            f"{key}: {progress.texts:,} of at most {progress.expected:,} texts embedded, "
            f"{progress.tokens_per_second:,.0f} tokens/s{left}"
        )
        self._sink.progress(line, self.share)

    def news(self, line: str) -> None:
        """Something about where the model runs."""
        self._sink.news(line)

    def finished(self, outcome: PartitionOutcome) -> None:
        """A partition is finished, or has failed."""
        self._shares[outcome.key] = 1.0
        # After a retry of the step, what the first attempt made is fresh.
        if outcome.state != "fresh" or outcome.key not in self.outcomes:
            self.outcomes[outcome.key] = outcome
        self._sink.finished(outcome, self.share)

    @property
    def share(self) -> float:
        """Share of the run's bytes that is done, from 0 to 1."""
        sizes = self._sizes or {}
        total = sum(sizes.values())
        done = sum(share * sizes.get(key, 0) for key, share in list(self._shares.items()))
        return min(1.0, done / total) if total else 0.0

    @property
    def remaining_seconds(self) -> float | None:
        """Seconds until the end; None while too little is done to tell."""
        share = self.share
        return (self._clock() - self._started) * (1 - share) / share if share > _LEAST_SHARE else None


class LogSink:
    """Writes to the run's log: a line every few seconds, and one per partition."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._last_line = time.monotonic()

    def progress(self, line: str, share: float) -> None:
        """A line, if the last one was a while ago."""
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._log.info(line)

    def news(self, line: str) -> None:
        """A line."""
        self._log.info(line)

    def finished(self, outcome: PartitionOutcome, share: float) -> None:
        """A line with the partition's numbers, or its error."""
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
