"""Small copies of a space's vectors, made from those that are stored: a bit or a byte per dimension.

A search finds candidates in a copy, which is 32 or 4 times as small, and scores them by the vectors themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.errors import LakeError
from embed_assets.lake.filters import Filter, all_of, one_of
from embed_assets.lake.nearest import BestCandidates, Hit, hit_columns, nearest_rows, vectors_of
from embed_assets.lake.reader import PartitionFiles
from embed_assets.lake.row_source import RowSource
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.spaces import space_table
from embed_assets.lake.tables import MOST_VALUES, Lake, TableSpec, dimension_of, partition_predicate
from embed_assets.lake.writer import Provenance
from embed_assets.records import COPIES, COPY_KINDS, CopyKind, slices

_WORD = 8
"""Bytes that codes of bits are filled up to: they are compared 64 bits at a time."""
CANDIDATES: Mapping[CopyKind, int] = {"binary": 80, "int8": 4}
"""Candidates per result: 500 sentences find 99.6 and 100 % of their ten nearest chunks with these, 98.4 and 99.7 %
with half of them; 300 queries of four words 97.4 and 99.7 %, and 93.8 and 97.9 % (16,146 chunks of Rust RFCs)."""


@dataclass(frozen=True, slots=True)
class CopyUpdate:
    """What was done to bring a copy up to date."""

    space: str
    kind: CopyKind
    partitions: int
    """Partitions that were made or dropped."""
    rows: int
    """Rows that it has now."""
    bytes_per_vector: int


def copy_table(space: str, kind: CopyKind) -> TableSpec:
    """The table of a copy."""
    return TableSpec("copies", f"{space}-{kind}")


def copies_of(tables: Snapshot, space: str) -> list[CopyKind]:
    """The copies that a space has."""
    return [kind for kind in COPY_KINDS if tables.table(copy_table(space, kind)) is not None]


def update_copy(tables: Snapshot, space: str, kind: CopyKind) -> CopyUpdate:
    """Make a copy of a space, or bring it up to date: only partitions that changed since are read.

    Raises ``LakeError`` if the space has no table.
    """
    source, copy = space_table(space), copy_table(space, kind)
    state = tables.state(source)
    if state is None:
        raise LakeError(f"a copy needs a space with a table, got {space!r}; 'embed-assets spaces' lists them")
    known = _origins(tables, copy)
    changed = [key for key, files in state.partitions.items() if known.get(key) != files.files]
    gone = [key for key in known if key not in state.partitions]
    for key in [*changed, *gone]:
        rows = _copied(tables, source, key, state.partitions.get(key), kind)
        tables.partition(key).replace(copy, rows, Provenance("derive"))
    tables.refreshed(copy)
    made, delta = tables.state(copy), tables.table(source)
    width = bytes_per_vector(kind, (dimension_of(delta) if delta is not None else None) or 0)
    return CopyUpdate(space, kind, len(changed) + len(gone), made.rows if made else 0, width)


def update_copies(lake: Lake, spaces: Iterable[str]) -> None:
    """Bring the copies that these spaces have up to date. Raises ``LakeError``."""
    with Snapshot(lake) as tables:
        for space in spaces:
            for kind in copies_of(tables, space):
                update_copy(tables, space, kind)


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that candidates are found in."""

    tables: Snapshot
    space: str
    kind: CopyKind

    def nearest(
        self, source: RowSource, query: np.ndarray, k: int, columns: Sequence[str], keep: Filter | None = None
    ) -> list[Hit]:
        """The `k` chunks nearest to a unit-norm query, as far as the copy finds them, with `columns`, best first.

        `source` has the rows of the space, of which those that `keep` keeps are searched. Partitions that changed since
        the copy was made are searched exactly. Raises ``LakeError`` if there is no copy.
        """
        copy = copy_table(self.space, self.kind)
        if self.tables.table(copy) is None:
            raise LakeError(
                f"the space {self.space!r} has no {self.kind} copy; make it: 'embed-assets derive {self.kind}'"
            )
        state, known = self.tables.state(space_table(self.space)), _origins(self.tables, copy)
        partitions = state.partitions if state else {}
        changed = one_of("partition_key", [key for key, files in partitions.items() if known.get(key) != files.files])
        names = hit_columns([*columns, "embedding"])

        def rows() -> Iterator[pa.RecordBatch]:
            for some in slices(self._candidates(source, query, k * CANDIDATES[self.kind], keep), MOST_VALUES):
                yield from source.read(names, all_of(one_of("chunk_id", some), ~changed, keep))
            yield from source.read(names, all_of(changed, keep))

        return nearest_rows(rows(), query[None], k, columns)[0]

    def _candidates(self, source: RowSource, query: np.ndarray, count: int, keep: Filter | None) -> list[str]:
        """Ids of the chunks whose codes are nearest to the query's, in no particular order."""
        names = ["partition_key", "chunk_id"]
        kept_chunks = [] if keep is None else [_joined(batch) for batch in source.read(names, keep)]
        allowed = pa.chunked_array(kept_chunks, pa.string()).combine_chunks()
        best, ids, first = BestCandidates(1, count), dict[int, str](), 0
        for batch in self.tables.rows(copy_table(self.space, self.kind), [*names, "code", "scale"]):
            if keep is not None:
                batch = batch.filter(pc.is_in(_joined(batch), value_set=allowed))
                if not batch.num_rows:
                    continue
            scores = _similar(self.kind, _codes(batch.column("code")), batch.column("scale").to_numpy(), query)
            best.add(scores[:, None], np.arange(first, first + batch.num_rows))
            kept, chunk_ids = best.kept(), batch.column("chunk_id")
            ids = {number: name for number, name in ids.items() if number in kept}
            ids |= {number: chunk_ids[number - first].as_py() for number in kept if number >= first}
            first += batch.num_rows
        return list(ids.values())


def _joined(batch: pa.RecordBatch) -> pa.StringArray:
    """Partition and id of each chunk in one string: documents of one path and text have the same ids everywhere."""
    return pc.binary_join_element_wise(batch.column("partition_key"), batch.column("chunk_id"), "\n")


def _similar(kind: CopyKind, codes: np.ndarray, scales: np.ndarray, query: np.ndarray) -> np.ndarray:
    """float32, shape (n,): about the cosine for int8, minus the number of different signs for binary."""
    if kind == "int8":
        return np.asarray((codes.view(np.int8).astype(np.float32) @ query) * scales)
    wanted, _ = encode("binary", query[None])
    different = np.bitwise_count(codes.view(np.uint64) ^ wanted.view(np.uint64)).sum(axis=1, dtype=np.int32)
    return np.asarray(-different, dtype=np.float32)


def _codes(column: pa.BinaryArray) -> np.ndarray:
    """uint8, shape (n, bytes): codes, all of one length."""
    _, offsets, data = column.buffers()
    starts = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8)[starts[0] : starts[-1]].reshape(len(column), -1)


def bytes_per_vector(kind: CopyKind, dimension: int) -> int:
    """Bytes of a code."""
    return dimension if kind == "int8" else -(-dimension // (8 * _WORD)) * _WORD


def encode(kind: CopyKind, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8, shape (n, bytes), and float32, shape (n,): codes of unit-norm vectors, and what a code's 1 stands for.

    "int8" has a signed byte per dimension, in units of the vector's largest value over 127; "binary" has the signs, a
    bit each, filled up with zeros to whole words of 64.
    """
    if kind == "int8":
        scales = np.maximum(np.abs(vectors).max(axis=1), np.finfo(np.float32).tiny) / 127
        return np.rint(vectors / scales[:, None]).astype(np.int8).view(np.uint8), scales.astype(np.float32)
    bits = np.packbits(vectors > 0, axis=1)
    padding = -bits.shape[1] % _WORD
    return np.pad(bits, ((0, 0), (0, padding))), np.ones(len(vectors), np.float32)


def _copied(
    tables: Snapshot, source: TableSpec, key: str, files: PartitionFiles | None, kind: CopyKind
) -> Iterator[pa.RecordBatch]:
    """Rows of a copy: those of a partition of its source, which are in these files; None: it has none any more."""
    if files is None:
        return
    for batch in tables.rows(source, ["chunk_id", "embedding"], partition_predicate(key)):
        codes, scales = encode(kind, vectors_of(batch))
        count, width = codes.shape
        offsets = pa.py_buffer((np.arange(count + 1, dtype=np.int32) * width).tobytes())
        columns = [
            pa.repeat(pa.scalar(key, pa.string()), count),
            batch.column("chunk_id"),
            pa.Array.from_buffers(pa.binary(), count, [None, offsets, pa.py_buffer(codes.tobytes())]),
            pa.array(scales),
            pa.repeat(pa.scalar(files.files, pa.string()), count),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=COPIES)


def _origins(tables: Snapshot, copy: TableSpec) -> dict[str, str]:
    """For each partition of a copy, the hash of the files that it was made from."""
    found: dict[str, str] = {}
    for batch in tables.rows(copy, ["partition_key", "origin"]):
        pairs = pa.table([batch.column(0), batch.column(1)], names=["key", "origin"]).group_by(["key", "origin"])
        found |= dict(zip(*(column.to_pylist() for column in pairs.aggregate([]).columns), strict=True))
    return found
