"""Verify that documents, chunks and vectors match: one valid vector per chunk, for the chunk's current text."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.errors import LakeError
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, TableSpec, dimension_of
from embed_assets.lake.vectors import is_unit
from embed_assets.records import NOT_EMBEDDABLE, chunk_of, hash_text, is_chunk_of
from embed_assets.scratch import DiskMap

_POSITION_BITS = 36
"""Bits of a position in a document. The others, but for the sign, number a partition's documents: 134 million."""


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
    gaps = Gaps()
    try:
        found = measure_coverage(partition)
        gaps.uncovered_documents, gaps.gone_documents = found.uncovered_documents, found.gone_documents
        gaps.altered_documents = _count_altered(partition, RAW, "content_hash")
        gaps.altered_chunks = _count_altered(partition, CHUNK_TABLE, "text_hash")
    except LakeError:  # of either table: read each alone to find out which
        gaps.unreadable_documents = int(not _is_readable(partition, RAW))
        gaps.unreadable_chunks = int(not _is_readable(partition, CHUNK_TABLE))
    gaps.unreadable_rejections = int(not _is_readable(partition, REJECTED))
    return gaps if gaps.total else verify_vectors(partition, table, prompt)


def verify_vectors(partition: PartitionSnapshot, table: TableSpec, prompt: str) -> Gaps:
    """The gaps of one partition's vectors compared with its chunks.

    Vectors must have the table's dimension or, if the table records none, that of the first vector in each batch.
    """
    delta = partition.tables.table(table)
    dimension = None if delta is None else dimension_of(delta)
    excused = _rejected_chunks(partition, table.space)
    expected = _MultisetHash()
    try:
        for ids, hashes in _expected_rows(partition, prompt):
            kept = [i for i, chunk_id in enumerate(ids) if chunk_id not in excused]
            expected.add([ids[i] for i in kept], [hashes[i] for i in kept])
    except LakeError:
        return Gaps(unreadable_chunks=1)
    gaps, found = Gaps(), _MultisetHash()
    try:
        for batch in partition.rows(table, ["chunk_id", "input_hash", "text", "embedding"]):
            _verify_vectors(batch.column("embedding"), dimension, gaps)
            ids, hashes, texts = (batch.column(name).to_pylist() for name in ("chunk_id", "input_hash", "text"))
            # A row whose text is not the embedded one gets a hash that matches no chunk.
            found.add(ids, [h if h == hash_text(prompt + t) else "" for h, t in zip(hashes, texts, strict=True)])
        if found != expected:
            _compare_rows(partition, table, prompt, excused, gaps)
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


def _expected_rows(partition: PartitionSnapshot, prompt: str) -> Iterator[tuple[list[str], list[str]]]:
    """Ids of chunks, and the hashes of the model inputs that they should have had."""
    for batch in partition.rows(CHUNK_TABLE, ["chunk_id", "text"]):
        ids, texts = (column.to_pylist() for column in batch.columns)
        yield ids, [hash_text(prompt + text) for text in texts]


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[str, str, str]]:
    return zip(*(batch.column(name).to_pylist() for name in ("chunk_id", "input_hash", "text")), strict=True)


def _compare_rows(partition: PartitionSnapshot, table: TableSpec, prompt: str, excused: set[str], gaps: Gaps) -> None:
    """Count the differences between chunks and vectors in `gaps`; `excused` chunks may lack a vector."""
    with DiskMap("input_hash") as expected, DiskMap() as seen:
        for ids, hashes in _expected_rows(partition, prompt):
            expected.add(zip(ids, hashes, strict=True))
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


@dataclass(slots=True)
class Coverage:
    """How much of the documents' text is in a partition's chunks."""

    documents: int = 0
    """Documents of the partition."""
    uncovered_documents: int = 0
    """Documents with text, other than whitespace, that is in no chunk."""
    uncovered_characters: int = 0
    """Code points, other than whitespace, that are in no chunk."""
    gone_documents: int = 0
    """Documents that have chunks but no longer exist."""


def measure_coverage(partition: PartitionSnapshot) -> Coverage:
    """Compare the chunks' spans with the documents' texts.

    Holds 24 bytes per chunk in memory, twice that while sorting. Raises ``LakeError`` if raw_documents or
    chunks can't be read.
    """
    spans = _Spans(partition)
    found = Coverage()
    for batch in partition.rows(RAW, ["document_id", "text"]):
        found.documents += batch.num_rows
        places = spans.take(batch.column("document_id"))
        texts = batch.column("text")
        for i in np.flatnonzero(~spans.are_contiguous(places, pc.utf8_length(texts).to_numpy())).tolist():
            missing = _characters_outside(texts[i].as_py(), spans.of(int(places[i])))
            found.uncovered_documents += bool(missing)
            found.uncovered_characters += missing
    found.gone_documents = spans.untaken_documents
    return found


class _Spans:
    """Start and end of each chunk of a partition, by document, as compact arrays."""

    def __init__(self, partition: PartitionSnapshot) -> None:
        columns = (array("q"), array("q"), array("q"))
        for batch in partition.rows(CHUNK_TABLE, ["document_id", "char_start", "char_end"]):
            columns[0].frombytes(_short_hashes(batch.column(0)).tobytes())
            for values, name in zip(columns[1:], ("char_start", "char_end"), strict=True):
                values.frombytes(batch.column(name).to_numpy().tobytes())
        documents, starts, ends = (np.frombuffer(c, np.int64) if c else np.empty(0, np.int64) for c in columns)
        order = np.lexsort((starts, documents))
        self._starts, self._ends = starts[order], ends[order]
        self._documents, self._first = np.unique(documents[order], return_index=True)
        self._is_taken = np.zeros(len(self._documents), bool)
        self._reached, self._is_contiguous = self._measured()

    def _measured(self) -> tuple[np.ndarray, np.ndarray]:
        """For each document, how far its chunks reach, and whether they leave no gap up to there."""
        if not len(self._documents):
            return np.empty(0, np.int64), np.empty(0, bool)
        number = np.repeat(np.arange(len(self._first)), np.diff(self._first, append=len(self._starts)))
        # Ends that were reached so far, within each document: its number in the upper bits keeps documents apart.
        reached = np.maximum.accumulate((number << _POSITION_BITS) | self._ends) & ((1 << _POSITION_BITS) - 1)
        before = np.concatenate([[0], reached[:-1]])
        before[self._first] = 0
        has_gap = np.logical_or.reduceat(self._starts > before, self._first)
        return np.maximum.reduceat(reached, self._first), ~has_gap

    def take(self, document_ids: pa.StringArray) -> np.ndarray:
        """int64, shape (n,): the places of the documents, which count as taken; -1 for those without chunks."""
        names = _short_hashes(document_ids)
        if not len(self._documents):
            return np.full(len(names), -1)
        places = np.minimum(np.searchsorted(self._documents, names), len(self._documents) - 1)
        places = np.where(self._documents[places] == names, places, -1)
        self._is_taken[places[places >= 0]] = True
        return places

    def are_contiguous(self, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """bool, shape (n,): whether the chunks of the documents at `places` cover all of their `lengths`, gapless."""
        found = places >= 0
        are = np.zeros(len(places), bool)
        are[found] = self._is_contiguous[places[found]] & (self._reached[places[found]] >= lengths[found])
        return are

    def of(self, place: int) -> list[tuple[int, int]]:
        """(start, end) of the chunks of the document at a place, in code points, sorted by start; none at -1."""
        if place < 0:
            return []
        first = self._first[place]
        last = self._first[place + 1] if place + 1 < len(self._first) else len(self._starts)
        return list(zip(self._starts[first:last].tolist(), self._ends[first:last].tolist(), strict=True))

    @property
    def untaken_documents(self) -> int:
        """Number of documents that `take` was never called for."""
        return int((~self._is_taken).sum())


def _short_hashes(document_ids: pa.StringArray) -> np.ndarray:
    """int64, shape (n,): Python's own hashes, which are fast and the same within a process."""
    return np.fromiter(map(hash, document_ids.to_pylist()), np.int64, len(document_ids))


def _count_altered(partition: PartitionSnapshot, table: TableSpec, hashes: str) -> int:
    """Number of rows whose text does not match its hash, which is in the column `hashes`."""
    altered = 0
    for batch in partition.rows(table, ["text", hashes]):
        rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        altered += sum(hash_text(text) != text_hash for text, text_hash in rows)
    return altered


def _characters_outside(text: str, spans: list[tuple[int, int]]) -> int:
    """Number of characters in none of the spans, not counting whitespace."""
    missing = reached = 0
    for start, end in [*sorted(spans), (len(text), len(text))]:
        if start > reached:
            missing += len("".join(text[reached:start].split()))
        reached = max(reached, end)
    return missing


def _is_readable(partition: PartitionSnapshot, table: TableSpec) -> bool:
    try:
        for _ in partition.rows(table, table.schema.names):
            pass
    except LakeError:
        return False
    return True


def _rejected_chunks(partition: PartitionSnapshot, space: str) -> set[str]:
    """Ids of the chunks that the space's model can't embed."""
    try:
        return {
            chunk_of(detail)
            for batch in partition.rows(REJECTED, ["reason", "detail"])
            for reason, detail in zip(*(column.to_pylist() for column in batch.columns), strict=True)
            if reason == NOT_EMBEDDABLE and is_chunk_of(space, detail)
        }
    except LakeError:
        return set()  # then they count as missing, and materializing again repairs the table


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
