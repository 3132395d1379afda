"""Progress in a run's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from embed_assets.defs.results import PartitionResult, RemainingTime, describe_progress
from embed_assets.stages.embeddings import Progress

_SECONDS_BETWEEN_LINES = 10.0


class LogObserver:
    """Writes progress to the run's log."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._remaining = RemainingTime()
        self._last_line = time.monotonic()

    def on_start(self, sizes: Mapping[str, int]) -> None:
        """Remembered for the time that remains."""
        self._remaining.start(sizes)

    def on_progress(self, partition_key: str, progress: Progress) -> None:
        """A line every few seconds."""
        self._remaining.progress(partition_key, progress.share)
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._log.info(describe_progress(partition_key, progress, self._remaining.seconds))

    def on_window(self, partition_key: str, texts: int, tokens: int) -> None:
        """No line of its own: `on_progress` tells."""

    def on_news(self, line: str) -> None:
        """A line."""
        self._log.info(line)

    def on_partition(self, partition_key: str, result: PartitionResult) -> None:
        """A line per partition."""
        self._remaining.progress(partition_key, 1.0)
        if result.error is not None:
            self._log.error(f"{partition_key}: failed: {result.error}")
        else:
            self._log.info(
                f"{partition_key}: {result.state}; {result.chunks} chunks: {result.embedded} embedded, "
                f"{result.reused} reused, {result.dropped} dropped; {result.rejected} documents rejected"
            )
