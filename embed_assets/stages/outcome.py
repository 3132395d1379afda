"""What became of a partition: the one record of it, from reading its files to the metadata of its assets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from embed_assets.engine.metrics import EngineStats
from embed_assets.lake.writer import Replaced


@dataclass(slots=True)
class PartitionOutcome:
    """Filled in by the stages of one partition, stage by stage."""

    key: str
    versions: dict[str, str | None] = field(default_factory=dict)
    """Data version of the source and each asset, after what ran so far; None for what was never materialized."""
    reasons: dict[str, Sequence[str]] = field(default_factory=dict)
    """Why each asset that ran was missing or stale."""
    replaced: dict[str, Replaced] = field(default_factory=dict)
    """Where the rows are of each asset that was materialized."""
    documents: int = 0
    rejected: int = 0
    """Files and rows that could not be read."""
    chunks: int = 0
    """Chunks that have a vector; while the embeddings are not due, chunks."""
    embedded: int = 0
    """Texts the model made a vector of; identical ones once."""
    rejected_chunks: int = 0
    """Chunks the model can't embed; they are in rejected_documents, with the reason."""
    dropped: int = 0
    """Rows of embeddings whose chunk is gone."""
    truncated: int = 0
    """Chunks of which the model saw only the beginning."""
    startup_seconds: float = 0.0
    """Until the model was ready."""
    engine: EngineStats = field(default_factory=EngineStats)
    error: str | None = None
    """Why it went no further, in one line."""

    @property
    def state(self) -> Literal["materialized", "fresh", "failed"]:
        """The contract's word for it."""
        if self.error is not None:
            return "failed"
        return "materialized" if self.reasons else "fresh"

    @property
    def reused(self) -> int:
        """Chunks whose vector was there already."""
        return self.chunks - self.embedded

    @property
    def tokens(self) -> int:
        """Tokens sent to the model."""
        return self.engine.tokens

    def as_json(self) -> dict[str, object]:
        """The numbers under the contract's names."""
        names = ("state", "documents", "rejected", "chunks", "embedded", "reused", "dropped", "rejected_chunks")
        return {name: getattr(self, name) for name in (*names, "tokens", "error")}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a partition's embedding is."""

    texts: int
    """Texts embedded so far."""
    expected: int
    """Texts to embed, at most."""
    tokens: int
    seconds: float
    """Since the first one."""

    @property
    def tokens_per_second(self) -> float:
        """Speed so far."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Share of the partition's texts that is embedded, from 0 to 1."""
        return min(1.0, self.texts / self.expected) if self.expected else 1.0
