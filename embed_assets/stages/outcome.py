"""The result of processing a partition, from reading its files to the metadata of its assets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from embed_assets.engine.metrics import EngineStats
from embed_assets.lake.writer import Replaced

_SAMPLED_VECTORS = 300
"""At least this many vectors are kept of a larger partition: more overlap in the small map that is drawn of them."""


SAMPLED = ("document_id", "token_count", "embedding")
"""Columns that a `Sample` is made of."""


class Sample:
    """A sample of a partition's embeddings, and the lengths of all its chunks, for pictures."""

    def __init__(self) -> None:
        self.token_counts = np.zeros(0, np.int64)
        """Number of chunks by their length in tokens."""
        self._documents: list[str] = []
        self._vectors: list[np.ndarray] = []
        self._rows, self._stride = 0, 1

    def add(self, batch: pa.RecordBatch) -> None:
        """Add rows of an embeddings table, with at least the columns `SAMPLED`."""
        counts = np.bincount(batch.column("token_count").to_numpy(), minlength=len(self.token_counts))
        counts[: len(self.token_counts)] += self.token_counts
        self.token_counts = counts
        wanted = range(-self._rows % self._stride, batch.num_rows, self._stride)
        documents, vectors = batch.column("document_id"), batch.column("embedding")
        self._documents += [documents[i].as_py() for i in wanted]
        # Copy: a view of one vector would keep its whole batch in memory.
        self._vectors += [vectors[i].values.to_numpy().copy() for i in wanted]
        self._rows += batch.num_rows
        while len(self._vectors) > 2 * _SAMPLED_VECTORS:
            self._documents, self._vectors, self._stride = self._documents[::2], self._vectors[::2], 2 * self._stride

    @property
    def documents(self) -> Sequence[str]:
        """The document of each sampled vector."""
        return self._documents

    @property
    def vectors(self) -> np.ndarray:
        """float32, shape (sampled, dimension)."""
        return np.stack(self._vectors)


@dataclass(slots=True)
class PartitionOutcome:
    """Result of processing one partition; each stage fills in its part."""

    key: str
    versions: dict[str, str | None] = field(default_factory=dict)
    """Current data version of the source and each asset; None if never materialized."""
    reasons: dict[str, Sequence[str]] = field(default_factory=dict)
    """Why each asset that ran was missing or stale, by asset."""
    replaced: dict[str, Replaced] = field(default_factory=dict)
    """Result of replacing the rows of each materialized asset, by asset."""
    documents: int = 0
    """Documents read."""
    rejected: int = 0
    """Files and rows that could not be read."""
    chunks: int = 0
    """Chunks with a vector or, if the embeddings were not materialized, all chunks."""
    embedded: int = 0
    """Texts embedded by the model; identical ones count once."""
    rejected_chunks: int = 0
    """Chunks that the model can't embed; the reasons are in rejected_documents."""
    dropped: int = 0
    """Previous rows of embeddings whose chunk no longer exists."""
    truncated: int = 0
    """Chunks truncated by the model to its maximum length."""
    startup_seconds: float = 0.0
    """Time until the model was ready."""
    engine: EngineStats = field(default_factory=EngineStats)
    """Statistics of the engine, summed over windows."""
    sample: Sample = field(default_factory=Sample)
    """Some of the embeddings, if all of them were materialized."""
    stored: Callable[[], Iterator[pa.RecordBatch]] | None = None
    """Reads the columns that a sample needs of the partition's embeddings, if only some were materialized."""
    pictures: Mapping[str, str] | None = None
    """Markdown images by name, if they were drawn where the embeddings were committed."""
    error: str | None = None
    """Why processing failed, in one line; None if it did not."""

    @property
    def state(self) -> Literal["materialized", "fresh", "failed"]:
        """State as reported in JSON output."""
        if self.error is not None:
            return "failed"
        return "materialized" if self.reasons else "fresh"

    def sampled(self) -> Sample:
        """A sample of all the partition's embeddings. Raises ``LakeError`` if it has to be read and can't be."""
        if self.stored is None:
            return self.sample
        sample = Sample()
        for batch in self.stored():
            sample.add(batch)
        return sample

    @property
    def reused(self) -> int:
        """Chunks whose vector existed already."""
        return self.chunks - self.embedded

    @property
    def tokens(self) -> int:
        """Tokens sent to the model."""
        return self.engine.tokens

    def count_embedded(self, ahead: PartitionOutcome) -> None:
        """Add what was embedded of the partition before its chunks were committed."""
        self.embedded += ahead.embedded
        self.startup_seconds += ahead.startup_seconds
        self.engine.add(ahead.engine)

    def as_json(self) -> dict[str, object]:
        """The fields of the JSON output."""
        names = ("state", "documents", "rejected", "chunks", "embedded", "reused", "dropped", "rejected_chunks")
        return {name: getattr(self, name) for name in (*names, "tokens", "error")}


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of embedding a partition."""

    texts: int
    """Texts embedded so far."""
    expected: int
    """Upper limit for the texts to embed."""
    tokens: int
    """Tokens embedded so far."""
    seconds: float
    """Time since the model was ready."""

    @property
    def tokens_per_second(self) -> float:
        """Average speed so far; 0 at the start."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Share of the texts embedded so far, from 0 to 1."""
        return min(1.0, self.texts / self.expected) if self.expected else 1.0
