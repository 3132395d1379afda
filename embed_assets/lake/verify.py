"""Verify that documents, chunks and vectors match: one valid vector per chunk, for the chunk's current text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from embed_assets.errors import LakeError
from embed_assets.lake.coverage import SPAN_COLUMNS, Spans
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, TableSpec, dimension_of
from embed_assets.lake.vectors import is_unit
from embed_assets.records import NOT_EMBEDDABLE, chunk_of, hash_text, is_chunk_of
from embed_assets.scratch import DiskMap


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


def verify(tables: Snapshot, table: TableSpec, prompt: str) -> Iterator[tuple[str, Gaps]]:
    """Yield the key and gaps of each partition of raw_documents, chunks or `table`, the table of a space, in key order.

    `prompt` is the space's string before every chunk. Memory holds 24 bytes per chunk of the current partition, one
    document and one batch of vectors.
    """
    for key in sorted(set().union(*(tables.keys(spec) for spec in (table, CHUNK_TABLE, RAW)))):
        yield key, verify_partition(tables.partition(key), table, prompt)


def verify_partition(partition: PartitionSnapshot, table: TableSpec, prompt: str) -> Gaps:
    """The gaps of one partition. Vectors are checked only if documents and chunks have no gaps."""
    gaps, spans = Gaps(), Spans()
    excused = _rejected_chunks(partition, table.space, REJECTED.schema.names)
    gaps.unreadable_rejections = int(excused is None)
    expected = _Expected(prompt, excused or frozenset())
    try:
        for batch in partition.rows(CHUNK_TABLE, [*SPAN_COLUMNS, "chunk_id", "text", "text_hash"]):
            gaps.altered_chunks += _count_altered(batch, "text_hash")
            expected.add(batch)
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


def verify_vectors(partition: PartitionSnapshot, table: TableSpec, prompt: str) -> Gaps:
    """The gaps of one partition's vectors compared with its chunks.

    Vectors must have the table's dimension or, if the table records none, that of the first vector in each batch.
    """
    # Without its rejections, chunks count as missing, and materializing again repairs the table.
    expected = _Expected(prompt, _rejected_chunks(partition, table.space, ("reason", "detail")) or frozenset())
    try:
        for batch in partition.rows(CHUNK_TABLE, ["chunk_id", "text"]):
            expected.add(batch)
    except LakeError:
        return Gaps(unreadable_chunks=1)
    return _verify_rows(partition, table, expected)


def _verify_rows(partition: PartitionSnapshot, table: TableSpec, expected: _Expected) -> Gaps:
    """The gaps of one partition's vectors compared with the rows that are expected."""
    delta = partition.tables.table(table)
    dimension = None if delta is None else dimension_of(delta)
    gaps, found, prompt = Gaps(), _MultisetHash(), expected.prompt
    try:
        for batch in partition.rows(table, ["chunk_id", "input_hash", "text", "embedding"]):
            _verify_vectors(batch.column("embedding"), dimension, gaps)
            ids, hashes, texts = (batch.column(name).to_pylist() for name in ("chunk_id", "input_hash", "text"))
            # A row whose text is not the embedded one gets a hash that matches no chunk.
            found.add(ids, [h if h == hash_text(prompt + t) else "" for h, t in zip(hashes, texts, strict=True)])
        if found != expected.rows:
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

    def add(self, chunk_ids: Sequence[str], input_hashes: Sequence[str]) -> None:
        hashes = list(map(hash, zip(chunk_ids, input_hashes, strict=True)))
        self.total += sum(hashes)
        self.rows += len(hashes)


@dataclass(slots=True)
class _Expected:
    """The rows that a table of embeddings should have, by the chunks that were added."""

    prompt: str
    """Exact string before every chunk."""
    excused: Set[str]
    """Ids of chunks that may lack a vector."""
    rows: _MultisetHash = field(default_factory=_MultisetHash)

    def add(self, chunks: pa.RecordBatch) -> None:
        """Add chunks, with at least the columns chunk_id and text."""
        pairs = [pair for pair in self.pairs(chunks) if pair[0] not in self.excused]
        self.rows.add([chunk_id for chunk_id, _ in pairs], [input_hash for _, input_hash in pairs])

    def pairs(self, chunks: pa.RecordBatch) -> list[tuple[str, str]]:
        """Id of each chunk and hash of the model's input that it should have had."""
        texts = chunks.column("text").to_pylist()
        hashes = (hash_text(self.prompt + text) for text in texts)
        return list(zip(chunks.column("chunk_id").to_pylist(), hashes, strict=True))


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[str, str, str]]:
    return zip(*(batch.column(name).to_pylist() for name in ("chunk_id", "input_hash", "text")), strict=True)


def _compare_rows(partition: PartitionSnapshot, table: TableSpec, wanted: _Expected, gaps: Gaps) -> None:
    """Count the differences between chunks and vectors in `gaps`."""
    prompt, excused = wanted.prompt, wanted.excused
    with DiskMap("input_hash") as expected, DiskMap() as seen:
        for batch in partition.rows(CHUNK_TABLE, ["chunk_id", "text"]):
            expected.add(wanted.pairs(batch))
        met = 0
        for batch in partition.rows(table, ["chunk_id", "input_hash", "text"]):
            for chunk_id, input_hash, text in _rows(batch):
                [known] = expected.get([chunk_id])
                if chunk_id in seen:
                    gaps.duplicated += 1
                    continue
                seen.add([(chunk_id,)])
                if known is None:
                    gaps.extra += 1
                    continue
                met += 1
                gaps.stale_text += not input_hash == known[0] == hash_text(prompt + text)
        without = sum(chunk_id in expected and chunk_id not in seen for chunk_id in excused)
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
