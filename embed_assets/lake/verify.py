"""Does the table hold exactly one finite, right-sized vector per chunk, for the chunk's current text?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from embed_assets.errors import LakeError
from embed_assets.lake.reader import partition_keys, read_partition
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, Lake, TableSpec, dimension_of
from embed_assets.lake.vectors import is_unit
from embed_assets.records import NOT_EMBEDDABLE, chunk_of, hash_text, is_chunk_of


@dataclass(slots=True)
class Gaps:
    """What is wrong with a partition: rows of each kind."""

    uncovered_documents: int = 0
    """Documents of whose text something is in no chunk, whitespace aside."""
    gone_documents: int = 0
    """Documents that have chunks, and no text any more."""
    missing: int = 0
    """Chunks without a vector, but for those that are in rejected_documents as not embeddable."""
    extra: int = 0
    """Vectors whose chunk is gone."""
    duplicated: int = 0
    """Further rows of a chunk that has one."""
    stale_text: int = 0
    """Vectors of another text than the chunk's."""
    not_finite: int = 0
    not_unit_norm: int = 0
    wrong_dimension: int = 0
    unreadable_documents: int = 0
    """1 when the partition's files of raw_documents can't be read; then nothing else is counted, as below."""
    unreadable_chunks: int = 0
    unreadable_vectors: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    @property
    def assets(self) -> tuple[str, ...]:
        """Names of the assets that must be made anew."""
        are_chunks_wrong = self.unreadable_chunks or self.uncovered_documents or self.gone_documents
        if self.unreadable_documents or are_chunks_wrong:
            return ("raw_documents",) * self.unreadable_documents + ("chunks",) * bool(are_chunks_wrong)
        return ("embeddings",) if self.total else ()


def verify(lake: Lake, table: TableSpec, prompt: str) -> Iterator[tuple[str, Gaps]]:
    """Each partition of raw_documents, chunks or the space's table, with its gaps.

    One partition's hashes (about 150 bytes per chunk) and one batch of its vectors are in memory at a time.
    """
    delta = lake.open(table)
    dimension = None if delta is None else dimension_of(delta)
    tables = (RAW, CHUNK_TABLE, table)
    for key in sorted(set().union(*(partition_keys(lake, spec) for spec in tables))):
        yield key, verify_partition(lake, table, key, prompt, dimension)


def verify_partition(lake: Lake, table: TableSpec, key: str, prompt: str, dimension: int | None) -> Gaps:
    """What is wrong with one partition, whose vectors should have this dimension (that of the first one, if None)."""
    gaps = Gaps()
    try:
        found = measure_coverage(lake, key)
        gaps.uncovered_documents, gaps.gone_documents = found.uncovered_documents, found.gone_documents
    except LakeError:  # of either table: which one it is shows when each is read alone
        gaps.unreadable_documents = int(not _is_readable(lake, RAW, key))
        gaps.unreadable_chunks = int(not _is_readable(lake, CHUNK_TABLE, key))
    return gaps if gaps.total else verify_vectors(lake, table, key, prompt, dimension)


def verify_vectors(lake: Lake, table: TableSpec, key: str, prompt: str, dimension: int | None) -> Gaps:
    """What is wrong with one partition's vectors, given its chunks."""
    expected: dict[str, str] = {}
    try:
        for batch in read_partition(lake, CHUNK_TABLE, key, ["chunk_id", "text"]):
            for chunk_id, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                expected[chunk_id] = hash_text(prompt + text)
    except LakeError:
        return Gaps(unreadable_chunks=1)
    gaps = Gaps()
    try:
        _verify_rows(lake, table, key, prompt, dimension, expected, _rejected_chunks(lake, table.space, key), gaps)
    except LakeError:
        return Gaps(unreadable_vectors=1)
    return gaps


@dataclass(slots=True)
class Coverage:
    """How much of a partition's documents is in chunks."""

    documents: int = 0
    uncovered_documents: int = 0
    uncovered_characters: int = 0
    gone_documents: int = 0


def measure_coverage(lake: Lake, key: str) -> Coverage:
    """Compare the chunks' spans with the documents' texts; about 100 bytes per chunk are in memory."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for batch in read_partition(lake, CHUNK_TABLE, key, ["document_id", "char_start", "char_end"]):
        for document_id, start, end in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            spans.setdefault(document_id, []).append((start, end))
    found = Coverage()
    for batch in read_partition(lake, RAW, key, ["document_id", "text"]):
        for i in range(batch.num_rows):
            document_id, text = (batch.column(column)[i].as_py() for column in range(2))
            missing = _characters_outside(text, spans.pop(document_id, []))
            found.documents += 1
            found.uncovered_documents += bool(missing)
            found.uncovered_characters += missing
    found.gone_documents = len(spans)
    return found


def _characters_outside(text: str, spans: list[tuple[int, int]]) -> int:
    """Characters of the text that are in none of the spans, whitespace aside."""
    missing = reached = 0
    for start, end in [*sorted(spans), (len(text), len(text))]:
        if start > reached:
            missing += len("".join(text[reached:start].split()))
        reached = max(reached, end)
    return missing


def _is_readable(lake: Lake, table: TableSpec, key: str) -> bool:
    try:
        for _ in read_partition(lake, table, key, table.schema.names):
            pass
    except LakeError:
        return False
    return True


def _rejected_chunks(lake: Lake, space: str, key: str) -> set[str]:
    """Ids of the chunks that the space's model can't embed."""
    try:
        return {
            chunk_of(detail)
            for batch in read_partition(lake, REJECTED, key, ["reason", "detail"])
            for reason, detail in zip(*(column.to_pylist() for column in batch.columns), strict=True)
            if reason == NOT_EMBEDDABLE and is_chunk_of(space, detail)
        }
    except LakeError:
        return set()  # then they count as missing, and making them anew mends the table


def _verify_rows(
    lake: Lake,
    table: TableSpec,
    key: str,
    prompt: str,
    dimension: int | None,
    expected: dict[str, str],
    excused: set[str],
    gaps: Gaps,
) -> None:
    """Compare the rows with the chunks' ids and input hashes; `excused` chunks may be without a vector."""
    seen: set[str] = set()
    for batch in read_partition(lake, table, key, ["chunk_id", "input_hash", "text", "embedding"]):
        _verify_vectors(batch.column("embedding"), dimension, gaps)
        rows = zip(*(batch.column(name).to_pylist() for name in ("chunk_id", "input_hash", "text")), strict=True)
        for chunk_id, input_hash, text in rows:
            if chunk_id in seen:
                gaps.duplicated += 1
            elif chunk_id not in expected:
                gaps.extra += 1
            elif not input_hash == expected[chunk_id] == hash_text(prompt + text):
                gaps.stale_text += 1
            seen.add(chunk_id)
    gaps.missing = len(expected.keys() - seen - excused)


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
