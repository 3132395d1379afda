"""Progress on a terminal as bars, elsewhere as plain lines every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from embed_assets.defs.results import PartitionResult, RemainingTime, describe_progress
from embed_assets.stages.embeddings import Progress

_SECONDS_BETWEEN_LINES = 5.0


class ConsoleObserver:
    """Shows what a sync is doing on a console (stderr's)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = ProgressBar(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._is_terminal = console.is_terminal
        self._last_line = time.monotonic()
        self._remaining = RemainingTime()
        self._texts = 0
        self._lock = threading.Lock()
        self._partitions = 0
        self._task = self._bar.add_task("reading", total=1.0)

    def __enter__(self) -> ConsoleObserver:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._bar.stop()

    def on_start(self, sizes: Mapping[str, int]) -> None:
        """A run begins: remember the sizes, for the time that remains."""
        self._remaining.start(sizes)

    def on_progress(self, partition_key: str, progress: Progress) -> None:
        """Show how far, how fast and how long still."""
        self._remaining.progress(partition_key, progress.share)
        self._show(describe_progress(partition_key, progress, self._remaining.seconds), always=False)

    def on_window(self, partition_key: str, texts: int, tokens: int) -> None:
        """A window was embedded: count it."""
        with self._lock:  # several partitions are embedded at once
            self._texts += texts

    def on_news(self, line: str) -> None:
        """A line, above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    def on_partition(self, partition_key: str, result: PartitionResult) -> None:
        """A partition is finished: say so at once if it failed."""
        self._partitions += 1
        self._remaining.progress(partition_key, 1.0)
        if result.error is not None:
            self._show(f"{partition_key}: failed", always=True)
        else:
            self._show(f"{self._partitions:,} partitions done, {self._texts:,} texts embedded", always=False)

    def _show(self, text: str, always: bool) -> None:
        if self._is_terminal:
            self._bar.update(self._task, description=text, completed=self._remaining.share)
        elif always or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(text, markup=False, soft_wrap=True)
