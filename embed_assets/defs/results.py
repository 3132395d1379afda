"""What became of a partition, and who wants to hear of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from embed_assets.stages.embeddings import Progress

_LEAST_SHARE = 0.01


@dataclass(slots=True)
class PartitionResult:
    """What materializing a partition came to: the numbers of `sync` and of the metadata."""

    state: Literal["materialized", "fresh", "failed"]
    documents: int = 0
    rejected: int = 0
    chunks: int = 0
    embedded: int = 0
    """Texts sent to the model."""
    reused: int = 0
    """Chunks whose vector was there already."""
    dropped: int = 0
    """Embeddings whose chunk is gone."""
    rejected_chunks: int = 0
    """Chunks the model can't embed; they are in rejected_documents."""
    tokens: int = 0
    """Tokens sent to the model."""
    error: str | None = None

    def as_json(self) -> dict[str, object]:
        """The contract's names."""
        return asdict(self)


class RunObserver(Protocol):
    """Hears of a run's progress; must return quickly.

    `on_progress` and `on_window` are called by the threads that embed partitions, the others by the run's.
    """

    def on_start(self, sizes: Mapping[str, int]) -> None:
        """A run begins over partitions of these sizes, in bytes of their files."""
        ...

    def on_progress(self, partition_key: str, progress: Progress) -> None:
        """How far a partition's embedding is; every few seconds."""
        ...

    def on_window(self, partition_key: str, texts: int, tokens: int) -> None:
        """A window of texts was embedded and staged."""
        ...

    def on_partition(self, partition_key: str, result: PartitionResult) -> None:
        """A partition is finished, or has failed."""
        ...

    def on_news(self, line: str) -> None:
        """Something about where the model runs."""
        ...


class RemainingTime:
    """When a run will end, from the bytes of the source that are done and the time they took."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sizes: Mapping[str, int] = {}
        self._shares: dict[str, float] = {}
        """How much of each partition is done, from 0 to 1."""
        self._started = clock()

    def start(self, sizes: Mapping[str, int]) -> None:
        """A run begins over partitions of these sizes."""
        self._sizes, self._shares, self._started = sizes, {}, self._clock()

    def progress(self, partition_key: str, share: float) -> None:
        """So much of a partition is done; 1 when it is finished. From any thread."""
        self._shares[partition_key] = share

    @property
    def share(self) -> float:
        """Of the run's bytes, from 0 to 1."""
        total = sum(self._sizes.values())
        done = sum(share * self._sizes.get(key, 0) for key, share in list(self._shares.items()))
        return min(1.0, done / total) if total else 0.0

    @property
    def seconds(self) -> float | None:
        """Seconds until the end; None while too little is done to tell."""
        share = self.share
        return (self._clock() - self._started) * (1 - share) / share if share > _LEAST_SHARE else None


def describe_progress(partition_key: str, progress: Progress, remaining: float | None) -> str:
    """One line: how far, how fast, how long still."""
    left = "" if remaining is None else f", about {_duration(remaining)} left"
    return (
        f"{partition_key}: {progress.texts:,} of at most {progress.expected:,} texts embedded, "
        f"{progress.tokens_per_second:,.0f} tokens/s{left}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
