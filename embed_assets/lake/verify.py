"""Verify that documents, chunks and vectors match: one valid vector per chunk, for the chunk's current text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from embed_assets.errors import LakeError
from embed_assets.lake.coverage import SPAN_COLUMNS, Spans
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, TableSpec, dimension_of
from embed_assets.lake.vectors import is_unit
from embed_assets.records import NOT_EMBEDDABLE, chunk_of, hash_text, is_chunk_of
from embed_assets.scratch import DiskMap

_ROW = ("chunk_id", "input_hash", "text", "title", "heading_path")
"""Columns of embeddings that tell what was embedded."""


class InputForm(Protocol):
    """How a chunk becomes the model's input."""

    @property
    def has_title(self) -> bool:
        """Whether the input depends on the title of the document."""

    def of(self, text: str, title: str, heading_path: str) -> str:
        """The exact string that the model gets for a chunk."""


@dataclass(slots=True)
class Gaps:
    """Problems found in a partition, as a number of rows per kind."""

    uncovered_documents: int = 0
    """Documents with text, other than whitespace, that is in no chunk."""
    gone_documents: int = 0
    """Documents that have chunks but no longer exist."""
    altered_documents: int = 0
    """Documents whose text does not match its stored hash."""
    altered_chunks: int = 0
    """Chunks whose text does not match its stored hash."""
    missing: int = 0
    """Chunks without a vector, except those in rejected_documents as not embeddable."""
    extra: int = 0
    """Vectors whose chunk no longer exists."""
    duplicated: int = 0
    """Additional vectors of a chunk that already has one."""
    stale_text: int = 0
    """Vectors of a text other than the chunk's current one."""
    not_finite: int = 0
    not_unit_norm: int = 0
    wrong_dimension: int = 0
    unreadable_documents: int = 0
    """1 if the partition's files of raw_documents can't be read. After any of the `unreadable_` counts, others may be
    incomplete."""
    unreadable_chunks: int = 0
    unreadable_vectors: int = 0
    unreadable_rejections: int = 0

    @property
    def total(self) -> int:
        """Sum of all counts."""
        return sum(asdict(self).values())

    @property
    def assets(self) -> tuple[str, ...]:
        """Names of the assets to materialize again."""
        is_raw_wrong = self.unreadable_documents or self.altered_documents or self.unreadable_rejections
        is_chunks_wrong = (
            self.unreadable_chunks
            or self.altered_chunks
            or self.uncovered_documents
            or self.gone_documents
            or self.altered_documents  # chunks may stem from the altered text
        )
        if is_raw_wrong or is_chunks_wrong:
            return ("raw_documents",) * bool(is_raw_wrong) + ("chunks",) * bool(is_chunks_wrong)
        return ("embeddings",) if self.total else ()


def verify(tables: Snapshot, table: TableSpec, model_input: InputForm) -> Iterator[tuple[str, Gaps]]:
    """Yield the key and gaps of each partition of raw_documents, chunks or `table`, the table of a space, in key order.

    Memory holds 24 bytes per chunk of the current partition, one document and one batch of vectors.
    """
    for key in sorted(set().union(*(tables.keys(spec) for spec in (table, CHUNK_TABLE, RAW)))):
        yield key, verify_partition(tables.partition(key), table, model_input)


def verify_partition(partition: PartitionSnapshot, table: TableSpec, model_input: InputForm) -> Gaps:
    """The gaps of one partition. Vectors are checked only if documents and chunks have no gaps."""
    gaps, spans = Gaps(), Spans()
    excused = _rejected_chunks(partition, table.space, REJECTED.schema.names)
    gaps.unreadable_rejections = int(excused is None)
    expected = _Expected(model_input, excused or frozenset())
    try:
        for batch in partition.rows(CHUNK_TABLE, [*SPAN_COLUMNS, "text", "text_hash"]):
            gaps.altered_chunks += _count_altered(batch, "text_hash")
            spans.add(batch)
    except LakeError:
        gaps.unreadable_chunks = 1

    def documents() -> Iterator[pa.RecordBatch]:
        for batch in partition.rows(RAW, ["document_id", "text", "content_hash"]):
            gaps.altered_documents += _count_altered(batch, "content_hash")
            yield batch

    try:
        found = spans.coverage(documents())
    except LakeError:
        gaps.unreadable_documents = 1
    else:
        if not gaps.unreadable_chunks:
            gaps.uncovered_documents, gaps.gone_documents = found.uncovered_documents, found.gone_documents
    return gaps if gaps.total else _verify_rows(partition, table, expected)


def verify_vectors(partition: PartitionSnapshot, table: TableSpec, model_input: InputForm) -> Gaps:
    """The gaps of one partition's vectors compared with its chunks.

    Vectors must have the table's dimension or, if the table records none, that of the first vector in each batch.
    """
    # Without its rejections, chunks count as missing, and materializing again repairs the table.
    excused = _rejected_chunks(partition, table.space, ("reason", "detail"))
    return _verify_rows(partition, table, _Expected(model_input, excused or frozenset()))


def _verify_rows(partition: PartitionSnapshot, table: TableSpec, expected: _Expected) -> Gaps:
    """The gaps of one partition's vectors compared with the rows that are expected."""
    delta = partition.tables.table(table)
    dimension = None if delta is None else dimension_of(delta)
    gaps, wanted, found = Gaps(), _MultisetHash(), _MultisetHash()
    try:
        for pairs in expected.pairs(partition):
            wanted.add([pair for pair in pairs if pair[0] not in expected.excused])
    except LakeError:
        return Gaps(unreadable_chunks=1)
    try:
        for batch in partition.rows(table, [*_ROW, "embedding"]):
            _verify_vectors(batch.column("embedding"), dimension, gaps)
            # A row whose text is not the embedded one gets a hash that matches no chunk.
            found.add([(chunk_id, h if is_own else "") for chunk_id, h, is_own in expected.stored(batch)])
        if found != wanted:
            _compare_rows(partition, table, expected, gaps)
    except LakeError:
        return Gaps(unreadable_vectors=1)
    return gaps


@dataclass(slots=True)
class _MultisetHash:
    """Hash of rows in any order, as a sum. Unlike XOR, a sum also reflects repeated rows.

    Of Python's own hashes, which are fast and, within a process, the same for the same row.
    """

    total: int = 0
    rows: int = 0

    def add(self, rows: Sequence[tuple[str, str]]) -> None:
        """Add rows, as chunk id and input hash."""
        hashes = list(map(hash, rows))
        self.total += sum(hashes)
        self.rows += len(hashes)


@dataclass(frozen=True, slots=True)
class _Expected:
    """The rows that a table of embeddings should have."""

    model_input: InputForm
    excused: Set[str]
    """Ids of chunks that may lack a vector."""

    def pairs(self, partition: PartitionSnapshot) -> Iterator[list[tuple[str, str]]]:
        """Of a partition's chunks, the id and the hash of the model's input that each should have had, by batches."""
        with DiskMap("title") as titles:
            for batch in partition.rows(RAW, ["document_id", "title"]) if self.model_input.has_title else ():
                titles.add(zip(*(column.to_pylist() for column in batch.columns), strict=True))
            for batch in partition.rows(CHUNK_TABLE, ["chunk_id", "document_id", "text", "heading_path"]):
                ids, documents, texts, headings = (column.to_pylist() for column in batch.columns)
                found = titles.get(documents) if self.model_input.has_title else [None] * len(documents)
                inputs = map(self.model_input.of, texts, (row[0] if row else "" for row in found), headings)
                yield list(zip(ids, map(hash_text, inputs), strict=True))

    def stored(self, batch: pa.RecordBatch) -> Iterator[tuple[str, str, bool]]:
        """Of rows with the columns `_ROW`: chunk id, input hash, and whether that is the hash of their input."""
        for chunk_id, input_hash, *parts in zip(*(batch.column(name).to_pylist() for name in _ROW), strict=True):
            yield chunk_id, input_hash, input_hash == hash_text(self.model_input.of(*parts))


def _compare_rows(partition: PartitionSnapshot, table: TableSpec, wanted: _Expected, gaps: Gaps) -> None:
    """Count the differences between chunks and vectors in `gaps`."""
    with DiskMap("input_hash") as expected, DiskMap() as seen:
        for pairs in wanted.pairs(partition):
            expected.add(pairs)
        met = 0
        for batch in partition.rows(table, _ROW):
            for chunk_id, input_hash, is_own in wanted.stored(batch):
                [known] = expected.get([chunk_id])
                if chunk_id in seen:
                    gaps.duplicated += 1
                    continue
                seen.add([(chunk_id,)])
                if known is None:
                    gaps.extra += 1
                    continue
                met += 1
                gaps.stale_text += not (is_own and input_hash == known[0])
        without = sum(chunk_id in expected and chunk_id not in seen for chunk_id in wanted.excused)
        gaps.missing = len(expected) - met - without


def _count_altered(batch: pa.RecordBatch, hashes: str) -> int:
    """Number of rows whose text does not match its hash, which is in the column `hashes`."""
    rows = zip(batch.column("text").to_pylist(), batch.column(hashes).to_pylist(), strict=True)
    return sum(hash_text(text) != text_hash for text, text_hash in rows)


def _rejected_chunks(partition: PartitionSnapshot, space: str, columns: Sequence[str]) -> frozenset[str] | None:
    """Ids of the chunks that the space's model can't embed; None if the `columns` of rejections can't be read."""
    found = set()
    try:
        for batch in partition.rows(REJECTED, columns):
            for reason, detail in zip(*(batch.column(name).to_pylist() for name in ("reason", "detail")), strict=True):
                if reason == NOT_EMBEDDABLE and is_chunk_of(space, detail):
                    found.add(chunk_of(detail))
    except LakeError:
        return None
    return frozenset(found)


def _verify_vectors(column: pa.ListArray, dimension: int | None, gaps: Gaps) -> None:
    lengths = np.diff(column.offsets.to_numpy())
    wrong = lengths != (dimension if dimension is not None else int(lengths[0]))
    gaps.wrong_dimension += int(wrong.sum())
    values = column.flatten().to_numpy(zero_copy_only=False)
    whole = np.flatnonzero(~wrong)
    length = int(lengths[whole[0]]) if len(whole) else 0
    starts = column.offsets.to_numpy()[:-1] - column.offsets.to_numpy()[0]
    vectors = values[starts[whole, None] + np.arange(length)] if wrong.any() else values.reshape(-1, max(1, length))
    is_finite = np.isfinite(vectors).all(axis=1)
    broken = (values[starts[i] : starts[i] + lengths[i]] for i in np.flatnonzero(wrong))
    gaps.not_finite += int((~is_finite).sum()) + sum(not np.isfinite(vector).all() for vector in broken)
    gaps.not_unit_norm += int((is_finite & ~is_unit(vectors)).sum())
