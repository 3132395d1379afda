"""What became of a partition, and who wants to hear of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, Protocol


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
    """Hears of a run's progress; called from the run's thread, must return quickly."""

    def on_window(self, partition_key: str, texts: int, tokens: int) -> None:
        """A window of texts was embedded and staged."""
        ...

    def on_partition(self, partition_key: str, result: PartitionResult) -> None:
        """A partition is finished, or has failed."""
        ...
