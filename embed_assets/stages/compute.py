"""Where a run's texts get their vectors: in this process, or by workers elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from embed_assets.engine.backend import Embedder
from embed_assets.engine.engine import Engine, EngineInfo
from embed_assets.engine.metrics import EngineStats
from embed_assets.engine.ray import PoolReport

_MOST_TEXTS = 16_384
_FIRST_TEXTS = 256
_WINDOW_SECONDS = 15.0
"""Two windows are under way at a time, so a kill costs at most twice that much work."""


@dataclass(slots=True)
class WindowSize:
    """How much makes a window: about a given time's work of one model."""

    seconds: float
    texts: int = _FIRST_TEXTS
    tokens: int | None = None
    """None before anything was measured."""

    def adapt(self, stats: EngineStats) -> None:
        """Let the next window take about `seconds`, growing at most fourfold at a time."""
        if stats.tokens:
            wanted = int(stats.tokens / max(stats.seconds, 1e-3) * self.seconds)
            self.tokens = max(1, min(wanted, max(stats.tokens, self.tokens or 0) * 4))
            self.texts = _MOST_TEXTS

    def is_full(self, texts: int, tokens: int) -> bool:
        """So many texts and tokens are enough."""
        return texts >= self.texts or (self.tokens is not None and tokens >= self.tokens)


class Compute(Protocol):
    """Where a run's texts are embedded."""

    @property
    def most_partitions(self) -> int:
        """Partitions that are embedded at the same time, at most."""
        ...

    @property
    def partitions_in_flight(self) -> int:
        """Partitions that should be embedded at the same time now."""
        ...

    @property
    def info(self) -> EngineInfo:
        """Where and how the model runs."""
        ...

    @property
    def report(self) -> PoolReport | None:
        """What the workers did; None without any."""
        ...

    def news(self) -> list[str]:
        """Lines for the run's log that nobody has read yet."""
        ...

    def require_alive(self) -> None:
        """Raise what ended it, if it is over before it was closed."""
        ...

    def is_full(self, texts: int, tokens: int, expected: int) -> bool:
        """So many texts and tokens make a window, of a partition with about `expected` texts."""
        ...

    def adapt(self, stats: EngineStats) -> None:
        """Learn from a window that was embedded how much makes the next one."""
        ...

    def start(self, key: str, texts: Sequence[str], expected: int) -> Embedder:
        """Have the model ready for about `expected` texts like `texts`, of one partition.

        Raises ``UserError`` when it can't be.
        """
        ...

    def close(self) -> None:
        """Give back what was taken; what is under way ends with an error."""
        ...


class LocalCompute:
    """The model in this process."""

    most_partitions = partitions_in_flight = 1
    report = None

    def __init__(self, engine: Callable[[], Engine], info: Callable[[], EngineInfo]) -> None:
        self._engine, self._info, self._size = engine, info, WindowSize(_WINDOW_SECONDS)

    @property
    def info(self) -> EngineInfo:
        """Where and how the model runs; as configured, while it is not loaded."""
        return self._info()

    def news(self) -> list[str]:
        """There is nothing to tell beside the progress."""
        return []

    def require_alive(self) -> None:
        """This process is always there."""

    def is_full(self, texts: int, tokens: int, expected: int) -> bool:
        """They take about the window's time."""
        return self._size.is_full(texts, tokens)

    def adapt(self, stats: EngineStats) -> None:
        """As `WindowSize` does."""
        self._size.adapt(stats)

    def start(self, key: str, texts: Sequence[str], expected: int) -> Embedder:
        """The model, loaded, and tuned if that pays."""
        return self._engine().embedder_for(texts, expected)

    def close(self) -> None:
        """The model stays, for the next run in this process."""
