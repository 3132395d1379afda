"""The chunks of a partition as embedding needs them: from the files that a run just prepared, or from the lake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from embed_assets.engine.inputs import ModelInput, hash_input
from embed_assets.errors import LakeError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.metadata import PREFIX
from embed_assets.scratch import ArrowFile, DiskMap

INPUTS = ("before", "text", "token_count", "input_hash", "input_ids")
"""Columns that tell what to embed, named as in `SPLIT_CHUNKS`."""
ROWS = (
    *("chunk_id", "document_id", "chunk_index", "uri", "title", "text", "heading_path", "char_start", "char_end"),
    *("token_count", "input_hash", "page_start", "page_end"),
)
"""Columns that a row of embeddings has besides its vector, and besides those of metadata."""
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
        """Batches with the columns `ROWS`, and those of metadata."""
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
        """Batches with the columns `ROWS`, and those of metadata."""
        return (batch.select(_columns_of(batch)) for file in self.files for batch in file)


@dataclass(frozen=True, slots=True)
class StoredChunks:
    """Chunks of the lake."""

    partition: PartitionSnapshot
    model_input: ModelInput
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
        for batch in self.with_inputs(["text", "token_count"]):
            no_ids = pa.nulls(batch.num_rows, pa.list_(pa.int32()))
            yield batch.append_column("input_ids", no_ids).select(INPUTS)

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Batches with the columns `ROWS` and those of metadata, joined with the documents.

        Raises ``LakeError`` if one is missing.
        """
        described = [column.name for column in self.partition.lake.metadata]
        return (batch.select(_columns_of(batch)) for batch in self._joined([*_STORED, *described]))

    def with_inputs(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Batches with these columns of the table of chunks, and `before` and `input_hash` of the model's input."""
        if self.model_input.has_title:
            yield from self._joined(columns)
            return
        place = ["heading_path"] if self.model_input.has_headings else []
        for batch in self._documents.rows(CHUNK_TABLE, list(dict.fromkeys([*columns, *place, "text", "text_hash"]))):
            yield self._with_inputs(batch)

    def _joined(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """As `with_inputs`, with uri and title of the documents."""
        needed = [*columns, "document_id", "heading_path", "text", "text_hash"]
        with DiskMap("uri", "title") as documents:
            for batch in self._documents.rows(RAW, ["document_id", "uri", "title"]):
                documents.add(zip(*(column.to_pylist() for column in batch.columns), strict=True))
            for batch in self._documents.rows(CHUNK_TABLE, list(dict.fromkeys(needed))):
                uris, titles = self._origins(batch.column("document_id"), documents)
                yield self._with_inputs(batch.append_column("uri", uris).append_column("title", titles))

    def _with_inputs(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        before = self._before(batch)
        hashes = batch.column("text_hash")
        if any(before):
            texts = (batch.column(name).to_pylist() for name in ("text", "text_hash"))
            hashes = pa.array(list(map(hash_input, before, *texts)), pa.string())
        return batch.append_column("before", pa.array(before, pa.string())).append_column("input_hash", hashes)

    def _before(self, batch: pa.RecordBatch) -> list[str]:
        """What is before the text of each chunk."""
        if not self.model_input.has_context:
            return [self.model_input.prompt] * batch.num_rows
        titles, headings = (
            batch.column(name).to_pylist() if is_used else [""] * batch.num_rows
            for name, is_used in (
                ("title", self.model_input.has_title),
                ("heading_path", self.model_input.has_headings),
            )
        )
        return list(map(self.model_input.before, titles, headings))

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


def _columns_of(batch: pa.RecordBatch) -> list[str]:
    """`ROWS`, and the columns of metadata that a batch has."""
    return [*ROWS, *(name for name in batch.schema.names if name.startswith(PREFIX))]
