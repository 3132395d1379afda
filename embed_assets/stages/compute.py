"""Where windows of texts get their vectors: in this process, or by workers elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from embed_assets.engine.engine import Engine, EngineFacts
from embed_assets.engine.metrics import EngineStats
from embed_assets.engine.ray import PoolReport
from embed_assets.engine.runner import EmbeddedTexts
from embed_assets.lake.staging import Staging
from embed_assets.lake.vectors import vector_batch
from embed_assets.records import utc_now

_MOST_TEXTS = 16_384
_FIRST_TEXTS = 256


@dataclass(frozen=True, slots=True)
class Window:
    """Texts that are embedded together: the unit of checkpointing and of distribution."""

    texts: Mapping[str, str]
    """By their input hash."""


@dataclass(frozen=True, slots=True)
class EmbeddedWindow:
    """What became of a window. It is staged."""

    window: Window
    batch: pa.RecordBatch
    """With `VECTOR_COLUMNS`: those the model embedded."""
    rejected: Mapping[str, str]
    """Why the model has no vector for a text, by its hash."""
    stats: EngineStats


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


OnTick = Callable[[int, int], None]
"""Hears every few seconds how many texts and tokens of a partition are done."""


class WindowEmbedder(Protocol):
    """A model that is ready."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def embed(self, windows: Iterable[Window], staging: Staging, on_tick: OnTick) -> Iterator[EmbeddedWindow]:
        """The windows' vectors, each staged before it is given, in any order."""
        ...


class Compute(Protocol):
    """Where a run's texts are embedded."""

    @property
    def most_partitions(self) -> int:
        """Partitions that will be embedded at the same time, at most ..."""
        ...

    @property
    def partitions_in_flight(self) -> int:
        """... and those that should be now."""
        ...

    @property
    def facts(self) -> EngineFacts:
        """Where and how the model runs."""
        ...

    @property
    def report(self) -> PoolReport | None:
        """What the workers did; None without any."""
        ...

    def news(self) -> list[str]:
        """Lines for the run's log that nobody has read yet."""
        ...

    def check(self) -> None:
        """Raise what ended it, if it is over before it was closed."""
        ...

    def is_full(self, texts: int, tokens: int, expected: int) -> bool:
        """So many texts and tokens make a window, of a partition with about `expected` texts."""
        ...

    def start(self, texts: Sequence[str], expected: int) -> WindowEmbedder:
        """Have the model ready for about `expected` texts like `texts`. Raises ``UserError`` when it can't be."""
        ...

    def close(self) -> None:
        """Give back what was taken; whatever is under way ends with an error."""
        ...


class LocalCompute:
    """The model in this process."""

    most_partitions = partitions_in_flight = 1
    report = None

    def __init__(self, engine: Callable[[], Engine], facts: Callable[[], EngineFacts], window_seconds: float = 15.0):
        """`window_seconds`: two windows are under way at a time, so that a kill costs at most twice that much work."""
        self._engine, self._facts, self._size = engine, facts, WindowSize(window_seconds)

    @property
    def facts(self) -> EngineFacts:
        """Where and how the model runs; as configured, while it is not loaded."""
        return self._facts()

    def news(self) -> list[str]:
        """There is nothing to tell beside the progress."""
        return []

    def check(self) -> None:
        """This process is always there."""

    def is_full(self, texts: int, tokens: int, expected: int) -> bool:
        """They take about the window's time."""
        return self._size.is_full(texts, tokens)

    def start(self, texts: Sequence[str], expected: int) -> WindowEmbedder:
        """The model, loaded, and tuned if that pays."""
        return _LocalEmbedder(self._engine(), texts, expected, self._size)

    def close(self) -> None:
        """The model stays, for the next run in this process."""


class _LocalEmbedder:
    def __init__(self, engine: Engine, texts: Sequence[str], expected: int, size: WindowSize) -> None:
        self._embedder, self._size = engine.embedder_for(texts, expected), size

    @property
    def dimension(self) -> int:
        return self._embedder.dimension

    def embed(self, windows: Iterable[Window], staging: Staging, on_tick: OnTick) -> Iterator[EmbeddedWindow]:
        sent: deque[Window] = deque()

        def texts() -> Iterator[list[str]]:
            for window in windows:
                sent.append(window)
                yield list(window.texts.values())

        for embedded in self._embedder.embed_windows(texts(), on_tick):
            self._size.adapt(embedded.stats)
            batch, rejected = window_rows(list(sent[0].texts), embedded)
            if batch.num_rows:
                staging.write(batch)
            yield EmbeddedWindow(sent.popleft(), batch, rejected, embedded.stats)


def window_rows(hashes: Sequence[str], embedded: EmbeddedTexts) -> tuple[pa.RecordBatch, dict[str, str]]:
    """What a window's vectors are stored as, and why texts have none, by their hash."""
    rejected = {hashes[row]: reason for row, reason in embedded.rejected.items()}
    kept = [row for row in range(len(hashes)) if row not in embedded.rejected]
    batch = vector_batch([hashes[row] for row in kept], embedded.vectors[kept], embedded.is_truncated[kept], utc_now())
    return batch, rejected
