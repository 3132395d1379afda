"""The vectors of a partition's chunks while its embeddings are made: those it has, those it asks for, and its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import add

import numpy as np
import pyarrow as pa

from embed_assets.engine.backend import EmbeddedWindow, Window
from embed_assets.engine.inputs import ModelInput
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import LakeError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import MOST_VALUES, TableSpec, dimension_of, is_one_of, partition_predicate
from embed_assets.lake.vectors import VECTOR_COLUMNS, HashIndex, VectorStore, hash_keys, vector_array
from embed_assets.records import NOT_EMBEDDABLE, TIMESTAMP, Rejection, chunk_detail
from embed_assets.stages.chunk_rows import ChunkInputs, ChunkRows
from embed_assets.stages.compute import Compute
from embed_assets.stages.elsewhere import Elsewhere
from embed_assets.stages.longer_vectors import LongerVectors
from embed_assets.stages.outcome import PartitionOutcome, Sample
from embed_assets.stages.rejections import Rejections


@dataclass(frozen=True, slots=True)
class Target:
    """Where vectors are stored, and what is embedded."""

    table: TableSpec
    """Embeddings table of the space."""
    model_input: ModelInput
    elsewhere: Elsewhere | None = None
    """Vectors of the whole table; None to reuse only those of the partition."""
    longer: LongerVectors | None = None
    """Vectors whose first dimensions are those of the space; None if there are none."""


@dataclass(slots=True)
class PartitionVectors:
    """The vectors of a partition's chunks: those available, those asked for and those that were rejected."""

    partition: PartitionSnapshot
    chunks: ChunkInputs
    target: Target
    embedded: int = 0
    """Texts embedded so far."""
    max_missing: int = 1
    """Upper limit for the texts to embed."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Why the model has no vector of an input, by input hash."""
    _store: VectorStore = field(default_factory=VectorStore)
    _previous: HashIndex = field(default_factory=HashIndex)
    """Ids of the chunks in the partition's previous embeddings."""
    _asked: HashIndex = field(default_factory=HashIndex)
    """Hashes of the inputs that were put into a window."""

    def __enter__(self) -> PartitionVectors:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    @property
    def dimension(self) -> int | None:
        """Length of the vectors; None while there are none."""
        return self._store.dimension

    def look_up(self, staging: Staging, changed: frozenset[str] | None, may_be_damaged: bool) -> None:
        """Load the partition's existing vectors, as far as `changed` documents need them, and staged ones.

        With `may_be_damaged`, unreadable rows are skipped, so that their texts are embedded again; otherwise they raise
        ``LakeError``.
        """
        try:
            for batch in self.partition.only(changed).rows(self.target.table, [*VECTOR_COLUMNS, "chunk_id"]):
                self._store.add(batch)
                self._previous.add_new(hash_keys(batch.column("chunk_id")))
        except LakeError:
            if not may_be_damaged:
                raise
        for batch in staging.read():
            self._store.add(batch)
        if self.target.longer is not None and len(self._store) < self.chunks.count:
            for batch in self.target.longer.rows(self.partition.only(changed)):
                self._store.add(batch)
        missing = self.chunks.count - len(self._store) if changed is None else self._look_up_others()
        self.max_missing = max(1, missing)

    def _look_up_others(self) -> int:
        """Load the vectors that unchanged documents have of the same texts: text may have moved between documents.

        Returns how many texts have no vector.
        """
        wanted = HashIndex()
        for batch in self.chunks.inputs():
            keys = hash_keys(batch.column("input_hash"))
            wanted.add_new(keys[~self._store.has(keys)])
        table, found = self.target.table, set[str]()
        for batch in self.partition.rows(table, ["input_hash"]) if len(wanted) else ():
            hashes = batch.column("input_hash")
            found.update(hashes.filter(pa.array(wanted.find(hash_keys(hashes)) >= 0)).to_pylist())
        where = partition_predicate(self.partition.key)
        if len(found) <= MOST_VALUES:
            where += f" AND {is_one_of('input_hash', sorted(found))}" if found else ""
        for batch in self.partition.tables.rows(table, VECTOR_COLUMNS, where) if found else ():
            is_wanted = wanted.find(hash_keys(batch.column("input_hash"))) >= 0
            self._store.add(batch.filter(pa.array(is_wanted)))
        return len(wanted) - len(found)

    def missing_windows(self, compute: Compute) -> Iterator[Window]:
        """Windows of inputs without a vector, each distinct input once."""
        for found in self._missing(compute):
            if self.target.elsewhere is not None:
                for batch in self.target.elsewhere.vectors(found.column("input_hash"), self.partition.tables):
                    self._store.add(batch)
                found = found.filter(pa.array(~self._store.has(hash_keys(found.column("input_hash")))))
            if found.num_rows:
                yield _window(found)

    def keys(self) -> np.ndarray:
        """The `hash_keys` of all inputs with a vector."""
        return self._store.keys()

    def count(self, finished: EmbeddedWindow) -> int:
        """Remember a window's rejected texts; returns how many others it has."""
        self.rejected |= {finished.window.hashes[row]: reason for row, reason in finished.rejected.items()}
        embedded = len(finished.window.texts) - len(finished.rejected)
        self.embedded += embedded
        return embedded

    def add(self, batch: pa.RecordBatch) -> None:
        """Add vectors: rows with `VECTOR_COLUMNS`."""
        self._store.add(batch)

    def require_all(self) -> None:
        """Raise a retryable ``LakeError`` unless every input has a vector or was rejected."""
        for batch in self.chunks.inputs():
            hashes = batch.column("input_hash")
            absent = hashes.filter(pa.array(~self._store.has(hash_keys(hashes)))).to_pylist()
            if missing := [input_hash for input_hash in absent if input_hash not in self.rejected]:
                raise LakeError(
                    f"partition {self.partition.key!r}: the vector of the text {missing[0]!r} is no longer staged: "
                    "another run of the partition has committed it, or its window was damaged; run again",
                    is_retryable=True,
                )

    def require_dimension(self, dimension: int) -> None:
        """Raise ``LakeError`` if the space's table or its staged windows have vectors of another length."""
        table, lake = self.target.table, self.partition.lake
        delta = self.partition.tables.table(table)
        stored = None if delta is None else dimension_of(delta)
        if stored not in (None, dimension):
            raise LakeError(
                f"a space's vectors must all have one dimension: the table {table.path!r} has {stored}, the model "
                f"gives {dimension}; move the table away or restore EMBED_MODEL and EMBED_TRUNCATE_DIM"
            )
        if self.dimension not in (None, dimension):
            raise LakeError(
                f"a space's vectors must all have one dimension: windows staged in '{lake.uri(table)}/_staging' have "
                f"{self.dimension}, the model gives {dimension}; remove that folder"
            )

    def join_rows(
        self, chunks: ChunkRows, outcome: PartitionOutcome, rejections: Rejections
    ) -> Iterator[pa.RecordBatch]:
        """The partition's new rows, joined from chunks, documents and vectors. Counts them in `outcome`.

        Chunks whose input was rejected are added to `rejections` instead. Raises ``LakeError`` for a chunk without a
        document.
        """
        outcome.chunks = outcome.truncated = 0
        outcome.sample = Sample()
        outcome.dropped = len(self._previous)
        for batch in chunks.rows():
            kept = self._without_rejected(batch, rejections)
            if kept.num_rows:
                yield self._joined(kept, outcome)

    def _missing(self, compute: Compute) -> Iterator[pa.RecordBatch]:
        """Batches with `INPUTS`, a window each, of inputs that have no vector and were in no window before."""
        parts: list[pa.RecordBatch] = []
        texts = tokens = 0
        for batch in self.chunks.inputs():
            keys = hash_keys(batch.column("input_hash"))
            new = np.flatnonzero(self._asked.is_new(keys) & ~self._store.has(keys))
            self._asked.add(keys[new])
            counts = batch.column("token_count").to_numpy()[new].tolist()
            first = 0
            for i, count in enumerate(counts):
                texts, tokens = texts + 1, tokens + count
                if compute.is_full(texts, tokens, self.max_missing):
                    yield _joined_batch([*parts, batch.take(pa.array(new[first : i + 1]))])
                    parts, texts, tokens, first = [], 0, 0, i + 1
            if first < len(new):
                parts.append(batch.take(pa.array(new[first:])))
        if parts:
            yield _joined_batch(parts)

    def _without_rejected(self, chunks: pa.RecordBatch, rejections: Rejections) -> pa.RecordBatch:
        """The chunks that have a vector. The others are added to `rejections`."""
        if not self.rejected:
            return chunks
        kept = []
        columns = (chunks.column(name).to_pylist() for name in ("chunk_id", "document_id", "uri", "input_hash"))
        for row, (chunk_id, document_id, uri, input_hash) in enumerate(zip(*columns, strict=True)):
            if input_hash in self.rejected:
                detail = chunk_detail(self.target.table.space, chunk_id, self.rejected[input_hash])
                rejections.add(Rejection(document_id, uri, NOT_EMBEDDABLE, detail))
            else:
                kept.append(row)
        return chunks.take(pa.array(kept, pa.int64()))

    def _joined(self, chunks: pa.RecordBatch, outcome: PartitionOutcome) -> pa.RecordBatch:
        stored = self._store.get(hash_keys(chunks.column("input_hash")))
        outcome.dropped -= int((self._previous.find(hash_keys(chunks.column("chunk_id"))) >= 0).sum())
        outcome.chunks += chunks.num_rows
        outcome.truncated += int(stored.is_truncated.sum())
        columns = {name: chunks.column(name) for name in chunks.schema.names} | {
            "partition_key": pa.repeat(pa.scalar(self.partition.key, pa.string()), chunks.num_rows),
            "is_truncated": pa.array(stored.is_truncated, pa.bool_()),
            "embedding": vector_array(stored.vectors),
            "embedded_at": pa.array(stored.embedded_at, pa.int64()).cast(TIMESTAMP),
        }
        schema = self.partition.lake.full(self.target.table).schema
        rows = pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
        outcome.sample.add(rows)
        return rows


def _joined_batch(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return parts[0] if len(parts) == 1 else pa.concat_batches(parts)


def _window(inputs: pa.RecordBatch) -> Window:
    """The window of a batch with `INPUTS`, tokenized if all token ids are known."""
    texts = list(map(add, *(inputs.column(name).to_pylist() for name in ("before", "text"))))
    tokens = TokenizedTexts.from_lists(inputs.column("input_ids"))
    return Window(texts, inputs.column("input_hash").to_pylist(), tokens)
