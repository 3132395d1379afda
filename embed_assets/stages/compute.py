"""Where a run's texts are embedded: interface, and the implementation for this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from embed_assets.cluster.report import PoolReport
from embed_assets.engine.backend import Embedder
from embed_assets.engine.engine import EngineInfo
from embed_assets.engine.metrics import EngineStats

T = TypeVar("T")

_MAX_TEXTS = 16_384
"""Upper limit for texts per window, whose texts and vectors are held in memory."""
_FIRST_TEXTS = 256
"""Texts of the first window, before speed is known: few, so that a slow model stages its first result early."""
_WINDOW_SECONDS = 15.0
"""Target duration of a window. Two are in flight at a time, so a kill costs at most twice that; shorter windows mean
more files and less efficient batches."""


@dataclass(slots=True)
class WindowSize:
    """Size of a window, adapted to take about a given time."""

    seconds: float
    """Target duration."""
    texts: int = _FIRST_TEXTS
    """Limit of texts."""
    tokens: int | None = None
    """Limit of tokens; None before the first measurement."""

    def adapt(self, stats: EngineStats) -> None:
        """Adjust the limits by the speed of a finished window. They grow at most fourfold at a time."""
        if stats.tokens:
            wanted = int(stats.tokens / max(stats.seconds, 1e-3) * self.seconds)
            self.tokens = max(1, min(wanted, max(stats.tokens, self.tokens or 0) * 4))
            self.texts = _MAX_TEXTS

    def is_full(self, texts: int, tokens: int) -> bool:
        """Whether this many texts and tokens make a full window."""
        return texts >= self.texts or (self.tokens is not None and tokens >= self.tokens)


class Compute(Protocol):
    """Embeds a run's texts."""

    @property
    def max_partitions(self) -> int:
        """Upper limit for partitions that are embedded concurrently; constant."""
        ...

    @property
    def partitions_in_flight(self) -> int:
        """Partitions that should be embedded concurrently at present."""
        ...

    @property
    def info(self) -> EngineInfo:
        """Device and settings that the model runs with."""
        ...

    @property
    def report(self) -> PoolReport | None:
        """Statistics of the workers; None if there are none."""
        ...

    def news(self) -> list[str]:
        """New lines for the run's log since the last call."""
        ...

    def require_alive(self) -> None:
        """Raise the error that ended the workers, if they ended before `close`."""
        ...

    def spare_cpus(self) -> int:
        """CPUs of other machines that can run tasks: 0 if there are none. May have to connect to them.

        Raises ``UserError`` if that fails.
        """
        ...

    def run_task(self, call: Callable[[], T]) -> Future[T]:
        """Have a call done on one of the `spare_cpus`."""
        ...

    @property
    def has_room_for_tasks(self) -> bool:
        """Whether there are still CPUs to spare: machines may have been lost."""
        ...

    def is_full(self, texts: int, tokens: int, expected: int) -> bool:
        """Whether this many texts and tokens make a full window, with about `expected` texts in the partition."""
        ...

    def adapt(self, stats: EngineStats) -> None:
        """Adapt the size of later windows to the speed of a finished one."""
        ...

    def start(self, key: str, texts: Sequence[str], expected: int) -> Embedder:
        """Load the model and return an embedder for partition `key`, with about `expected` texts similar to `texts`.

        Raises ``UserError`` if the model can't be loaded.
        """
        ...

    def close(self) -> None:
        """Release all resources. Embedding that is still in progress fails."""
        ...


class LocalCompute:
    """Embeds with the model on this machine."""

    max_partitions = partitions_in_flight = 1
    report = None

    def __init__(self, start: Callable[[Sequence[str], int], Embedder], info: Callable[[], EngineInfo]) -> None:
        self._start, self._info, self._size = start, info, WindowSize(_WINDOW_SECONDS)

    @property
    def info(self) -> EngineInfo:
        """Device and settings that the model runs with; before it is loaded, those configured."""
        return self._info()

    def news(self) -> list[str]:
        """No lines: progress is reported separately."""
        return []

    def require_alive(self) -> None:
        """Never raises: there are no workers to lose."""

    def spare_cpus(self) -> int:
        """0: those of this machine are used anyway."""
        return 0

    def run_task(self, call: Callable[[], T]) -> Future[T]:
        """Not to be called, as there are no `spare_cpus`."""
        raise NotImplementedError

    has_room_for_tasks = False

    def is_full(self, texts: int, tokens: int, expected: int) -> bool:
        """Whether the texts take about the target duration of a window."""
        return self._size.is_full(texts, tokens)

    def adapt(self, stats: EngineStats) -> None:
        """Adapt the size of later windows to the speed of a finished one."""
        self._size.adapt(stats)

    def start(self, key: str, texts: Sequence[str], expected: int) -> Embedder:
        """The loaded model, tuned if `expected` texts justify it. Raises ``UserError`` if it can't be loaded."""
        return self._start(texts, expected)

    def close(self) -> None:
        """Does nothing: the model stays loaded for this process's next run."""
