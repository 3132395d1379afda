"""Does the table hold exactly one finite, right-sized vector per chunk, for the chunk's current text?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from embed_assets.errors import LakeError
from embed_assets.lake.reader import partition_keys, read_partition
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, Lake, TableSpec, dimension_of
from embed_assets.records import NOT_EMBEDDABLE, chunk_of, hash_text, is_chunk_of


@dataclass(slots=True)
class Gaps:
    """What is wrong with a partition: rows of each kind."""

    missing: int = 0
    """Chunks without a vector, but for those that are in rejected_documents as not embeddable."""
    extra: int = 0
    """Vectors whose chunk is gone."""
    duplicated: int = 0
    """Further rows of a chunk that has one."""
    stale_text: int = 0
    """Vectors of another text than the chunk's."""
    not_finite: int = 0
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
        if self.unreadable_documents or self.unreadable_chunks:
            return ("raw_documents",) * self.unreadable_documents + ("chunks",) * self.unreadable_chunks
        return ("embeddings",) if self.total else ()


def verify(lake: Lake, table: TableSpec, prompt: str) -> Iterator[tuple[str, Gaps]]:
    """Each partition of raw_documents, chunks or the space's table, with its gaps.

    One partition's hashes (about 150 bytes per chunk) and one batch of its vectors are in memory at a time.
    """
    delta = lake.open(table)
    dimension = None if delta is None else dimension_of(delta)
    tables = (RAW, CHUNK_TABLE, table)
    for key in sorted(set().union(*(partition_keys(lake, spec) for spec in tables))):
        yield key, _verify_partition(lake, table, key, prompt, dimension)


def _verify_partition(lake: Lake, table: TableSpec, key: str, prompt: str, dimension: int | None) -> Gaps:
    gaps = Gaps()
    expected: dict[str, str] = {}
    excused = _rejected_chunks(lake, table.space, key)
    try:
        for _ in read_partition(lake, RAW, key, RAW.schema.names):
            pass
    except LakeError:
        gaps.unreadable_documents = 1
    try:
        for batch in read_partition(lake, CHUNK_TABLE, key, ["chunk_id", "text"]):
            for chunk_id, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                expected[chunk_id] = hash_text(prompt + text)
    except LakeError:
        gaps.unreadable_chunks = 1
    if gaps.total:
        return gaps
    try:
        _verify_rows(lake, table, key, prompt, dimension, expected, excused, gaps)
    except LakeError:
        return Gaps(unreadable_vectors=1)
    return gaps


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
    rows = np.repeat(np.arange(len(lengths)), lengths)
    gaps.not_finite += len(np.unique(rows[~np.isfinite(values)]))
