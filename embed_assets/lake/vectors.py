"""Keep a partition's vectors on local disk, keyed by input hash, while the partition is processed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType

import numpy as np
import pyarrow as pa

from embed_assets.records import TIMESTAMP, VECTOR
from embed_assets.scratch import DiskMap, scratch_errors, scratch_file

VECTOR_ROWS = pa.schema(
    [
        pa.field("input_hash", pa.string(), False),
        pa.field("embedding", VECTOR, False),
        pa.field("is_truncated", pa.bool_(), False),
        pa.field("embedded_at", TIMESTAMP, False),
    ]
)
VECTOR_COLUMNS: tuple[str, ...] = tuple(VECTOR_ROWS.names)
_SQUARED_NORM_TOLERANCE = 2e-3
"""Largest deviation of a squared norm from 1, about 0.1 % of the norm: loose enough for vectors that were
normalized in half precision, tight enough to reject those that never were."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class StoredVectors:
    """Vectors and their attributes, in the order of the requested hashes."""

    vectors: np.ndarray
    """float32, shape (n, dimension)."""
    is_truncated: list[bool]
    """Whether the model saw only the first tokens of the text."""
    embedded_at: list[int]
    """Microseconds since 1970, UTC."""


def is_unit(vectors: np.ndarray) -> np.ndarray:
    """Boolean mask, shape (n,): which rows of a float32 array of shape (n, dimension) are finite and of unit norm."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.abs(np.einsum("ij,ij->i", vectors, vectors) - 1) < _SQUARED_NORM_TOLERANCE)


class VectorStore:
    """Vectors keyed by input hash, in temporary files, so that memory does not grow with their number."""

    def __init__(self) -> None:
        self._file = scratch_file()
        self._rows = DiskMap("place", "is_truncated", "embedded_at")
        self._count = 0
        self.dimension: int | None = None
        """Length of the vectors; None while the store is empty."""

    def __enter__(self) -> VectorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary files."""
        self._rows.close()
        self._file.close()

    def __contains__(self, input_hash: str) -> bool:
        return bytes.fromhex(input_hash) in self._rows

    def __len__(self) -> int:
        return self._count

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the rows of a batch that has at least `VECTOR_COLUMNS`. Hashes already present keep their vectors.

        Vectors of another dimension or without unit norm are skipped, so that their texts are embedded again.
        """
        if not batch.num_rows:
            return
        matrix = self._matrix(batch.column("embedding"))
        is_usable = is_unit(matrix).tolist()
        truncated = batch.column("is_truncated").to_pylist()
        times = batch.column("embedded_at").cast(pa.int64()).to_pylist()
        new: dict[bytes, int] = {}
        for i, input_hash in enumerate(batch.column("input_hash").to_pylist()):
            key = bytes.fromhex(input_hash)
            if is_usable[i] and key not in new and key not in self._rows:
                new[key] = i
        self._rows.add((key, self._count + n, truncated[i], times[i]) for n, (key, i) in enumerate(new.items()))
        self._count += len(new)
        with scratch_errors():
            self._file.seek(0, 2)
            self._file.write((matrix if len(new) == len(matrix) else matrix[list(new.values())]).data)

    def _matrix(self, column: pa.ListArray) -> np.ndarray:
        """The vectors as a float32 array of shape (rows, dimension). Vectors of another length become NaN."""
        lengths = np.diff(column.offsets.to_numpy())
        if self.dimension is None:
            self.dimension = int(lengths[0])
        values = np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
        if (lengths == self.dimension).all():
            return values.reshape(-1, self.dimension)
        matrix = np.full((len(lengths), self.dimension), np.nan, dtype=np.float32)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        for i in np.flatnonzero(lengths == self.dimension):
            matrix[i] = values[starts[i] : starts[i + 1]]
        return matrix

    def get(self, input_hashes: Sequence[str]) -> StoredVectors:
        """The vectors for the hashes, in their order. Raises ``KeyError`` for an unknown hash."""
        rows: list[tuple[int, int, int]] = []
        for input_hash, row in zip(input_hashes, self._rows.get([bytes.fromhex(h) for h in input_hashes]), strict=True):
            if row is None:
                raise KeyError(input_hash)
            rows.append(row)
        places = [place for place, _, _ in rows]
        dimension = self.dimension or 0
        vectors = np.empty((len(places), dimension), dtype=np.float32)
        with scratch_errors():
            self._file.flush()
        # Adjacent vectors are read in one go: most chunks arrive in the order in which they were stored.
        order = np.argsort(places, kind="stable")
        ordered = np.array(places, dtype=np.int64)[order]
        breaks = np.flatnonzero(np.diff(ordered) > 1) + 1
        for run in np.split(np.arange(len(places)), breaks) if places else []:
            first, last = int(ordered[run[0]]), int(ordered[run[-1]])
            self._file.seek(first * dimension * 4)
            block = np.frombuffer(self._file.read((last - first + 1) * dimension * 4), dtype=np.float32)
            vectors[order[run]] = block.reshape(-1, dimension)[ordered[run] - first]
        return StoredVectors(vectors, [bool(truncated) for _, truncated, _ in rows], [when for _, _, when in rows])


def vector_batch(
    input_hashes: Sequence[str], vectors: np.ndarray, is_truncated: np.ndarray, embedded_at: datetime
) -> pa.RecordBatch:
    """A batch with `VECTOR_COLUMNS` from float32 vectors of shape (n, dimension)."""
    when = (embedded_at - _EPOCH).total_seconds()
    times = pa.array(np.full(len(input_hashes), int(when * 1e6), dtype=np.int64)).cast(TIMESTAMP)
    return pa.RecordBatch.from_arrays(
        [pa.array(input_hashes, pa.string()), vector_array(vectors), pa.array(is_truncated), times], schema=VECTOR_ROWS
    )


def vector_array(vectors: np.ndarray) -> pa.ListArray:
    """The rows of a float32 array of shape (n, dimension) as an Arrow list<float32> array, without a copy per row."""
    rows, dimension = vectors.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * dimension)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(vectors).reshape(-1)), type=VECTOR)
