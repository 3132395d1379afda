"""The chunks of a partition as embedding needs them: from the files that a run just prepared, or from the lake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from embed_assets.errors import LakeError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.records import hash_text
from embed_assets.scratch import ArrowFile, DiskMap

INPUTS = ("text", "token_count", "input_hash", "input_ids")
"""Columns that tell what to embed, named as in `SPLIT_CHUNKS`."""
ROWS = (
    *("chunk_id", "document_id", "chunk_index", "uri", "title", "text", "heading_path", "char_start", "char_end"),
    *("token_count", "input_hash", "page_start", "page_end"),
)
"""Columns that a row of embeddings has besides its vector."""
_STORED = [name for name in ROWS if name not in ("uri", "title", "input_hash")]


class ChunkInputs(Protocol):
    """What there is to embed of a partition."""

    @property
    def changed(self) -> frozenset[str] | None:
        """Ids of the documents whose chunks these are; None: all of the partition's."""
        ...

    @property
    def count(self) -> int:
        """Number of chunks."""
        ...

    def inputs(self) -> Iterator[pa.RecordBatch]:
        """Batches with the columns `INPUTS`."""
        ...


class ChunkRows(ChunkInputs, Protocol):
    """The chunks of a partition, or of those of its documents that changed.

    Every method can be called any number of times and gives the same order.
    """

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Batches with the columns `ROWS`."""
        ...


@dataclass(frozen=True, slots=True)
class PreparedChunks:
    """Chunks in files with the schema `SPLIT_CHUNKS`."""

    files: Sequence[ArrowFile]
    changed: frozenset[str] | None = None

    @property
    def count(self) -> int:
        """Number of chunks."""
        return sum(file.rows for file in self.files)

    def inputs(self) -> Iterator[pa.RecordBatch]:
        """Batches with the columns `INPUTS`."""
        return (batch.select(INPUTS) for file in self.files for batch in file)

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Batches with the columns `ROWS`."""
        return (batch.select(ROWS) for file in self.files for batch in file)


@dataclass(frozen=True, slots=True)
class StoredChunks:
    """Chunks of the lake."""

    partition: PartitionSnapshot
    prompt: str
    """Exact string before every chunk."""
    changed: frozenset[str] | None = None

    @property
    def count(self) -> int:
        """Number of chunks."""
        return self._documents.count(CHUNK_TABLE)

    @property
    def _documents(self) -> PartitionSnapshot:
        return self.partition.only(self.changed)

    def inputs(self) -> Iterator[pa.RecordBatch]:
        """Batches with the columns `INPUTS`; the token ids are not stored, so they are null."""
        for batch in self._documents.rows(CHUNK_TABLE, ["text", "token_count", "text_hash"]):
            text, token_count = batch.column("text"), batch.column("token_count")
            no_ids = pa.nulls(batch.num_rows, pa.list_(pa.int32()))
            yield pa.RecordBatch.from_arrays([text, token_count, self._input_hashes(batch), no_ids], names=INPUTS)

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Batches with the columns `ROWS`, joined with the documents. Raises ``LakeError`` if one is missing."""
        with DiskMap("uri", "title") as documents:
            for batch in self._documents.rows(RAW, ["document_id", "uri", "title"]):
                documents.add(zip(*(column.to_pylist() for column in batch.columns), strict=True))
            for batch in self._documents.rows(CHUNK_TABLE, [*_STORED, "text_hash"]):
                uris, titles = self._origins(batch.column("document_id"), documents)
                joined = {name: batch.column(name) for name in _STORED}
                joined |= {"uri": uris, "title": titles, "input_hash": self._input_hashes(batch)}
                yield pa.RecordBatch.from_arrays([joined[name] for name in ROWS], names=ROWS)

    def _input_hashes(self, batch: pa.RecordBatch) -> pa.Array:
        if not self.prompt:
            return batch.column("text_hash")
        return pa.array([hash_text(self.prompt + text) for text in batch.column("text").to_pylist()], pa.string())

    def _origins(self, document_ids: pa.Array, documents: DiskMap) -> tuple[pa.Array, pa.Array]:
        """uri and title of the chunks' documents."""
        encoded = document_ids.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        found = dict(zip(names, documents.get(names), strict=True))
        missing = [name for name, row in found.items() if row is None]
        if missing:
            raise LakeError(
                f"partition {self.partition.key!r}: the chunks of {missing[0]!r} have no document in raw_documents; "
                "materialize raw_documents and chunks again"
            )
        uris, titles = zip(*(row for row in found.values() if row is not None), strict=True)
        indices = encoded.indices
        return pa.array(uris, pa.string()).take(indices), pa.array(titles, pa.string()).take(indices)
