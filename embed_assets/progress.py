"""Progress on a terminal as bars, elsewhere as plain lines every few seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from embed_assets.defs.results import PartitionResult

_SECONDS_BETWEEN_LINES = 5.0


class ConsoleObserver:
    """Shows what a sync is doing on a console (stderr's)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._is_terminal = console.is_terminal
        self._started = time.monotonic()
        self._last_line = self._started
        self._texts = 0
        self._partitions = 0
        self._task = self._bar.add_task("reading")

    def __enter__(self) -> ConsoleObserver:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._bar.stop()

    def on_window(self, partition_key: str, texts: int, tokens: int) -> None:
        """A window was embedded: count it and show where we are."""
        self._texts += texts
        rate = self._texts / max(time.monotonic() - self._started, 1e-9)
        self._show(f"{partition_key}: {self._texts:,} texts embedded, {rate:,.0f} per second", always=False)

    def on_partition(self, partition_key: str, result: PartitionResult) -> None:
        """A partition is finished: say so at once if it failed."""
        self._partitions += 1
        if result.error is not None:
            self._show(f"{partition_key}: failed", always=True)
        else:
            self._show(f"{self._partitions:,} partitions done, {self._texts:,} texts embedded", always=False)

    def _show(self, text: str, always: bool) -> None:
        if self._is_terminal:
            self._bar.update(self._task, description=text)
        elif always or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(text, markup=False, soft_wrap=True)
