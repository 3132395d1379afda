"""Shows progress as a bar on a terminal, or else as plain lines every few seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from embed_assets.stages.outcome import PartitionOutcome

_SECONDS_BETWEEN_LINES = 5.0
"""Least time between two lines when the output is no terminal: shorter makes logs of long syncs longer."""


class ConsoleSink:
    """Shows the progress of a sync on a console; enter it as a context manager."""

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
        self._texts = 0
        self._partitions: set[str] = set()
        """Those that finished; a retry of the step finishes some of them again."""
        self._task = self._bar.add_task("reading", total=1.0)

    def __enter__(self) -> ConsoleSink:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._bar.stop()

    def progress(self, line: str, share: float) -> None:
        """Show a line of progress; `share` is the share that is done, from 0 to 1."""
        self._show(line, share, always=False)

    def news(self, line: str) -> None:
        """Print a message above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    def finished(self, outcome: PartitionOutcome, share: float) -> None:
        """Count a partition that finished; a failure is shown immediately."""
        self._texts += outcome.embedded
        if outcome.error is not None:
            self._show(f"{outcome.key}: failed", share, always=True)
        else:
            self._partitions.add(outcome.key)
            self._show(
                f"{len(self._partitions):,} partitions done, {self._texts:,} texts embedded", share, always=False
            )

    def _show(self, text: str, share: float, always: bool) -> None:
        if self._is_terminal:
            self._bar.update(self._task, description=text, completed=share)
        elif always or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(text, markup=False, soft_wrap=True)
