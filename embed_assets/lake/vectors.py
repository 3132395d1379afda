"""Keep a partition's vectors on local disk, keyed by input hash, while the partition is processed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType

import numpy as np
import pyarrow as pa

from embed_assets.records import TIMESTAMP, VECTOR
from embed_assets.scratch import scratch_errors, scratch_file

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
_KEY = "S16"
"""Sortable bytes. NumPy ignores trailing zero bytes, which makes no difference between hashes of one length."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class StoredVectors:
    """Vectors and their attributes, in the order of the requested hashes."""

    vectors: np.ndarray
    """float32, shape (n, dimension)."""
    is_truncated: np.ndarray
    """bool, shape (n,): whether the model saw only the first tokens of the text."""
    embedded_at: np.ndarray
    """int64, shape (n,): microseconds since 1970, UTC."""


def is_unit(vectors: np.ndarray) -> np.ndarray:
    """Boolean mask, shape (n,): which rows of a float32 array of shape (n, dimension) are finite and of unit norm."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.abs(np.einsum("ij,ij->i", vectors, vectors) - 1) < _SQUARED_NORM_TOLERANCE)


def hash_keys(hashes: pa.StringArray | Sequence[str]) -> np.ndarray:
    """128-bit hashes, given as 32 hex characters each, as an array of shape (n,) to look up in a `HashIndex`."""
    digits = "".join(hashes.to_pylist() if isinstance(hashes, pa.Array) else hashes)
    return np.frombuffer(bytes.fromhex(digits), dtype=_KEY)


class HashIndex:
    """Maps 128-bit hashes to numbers, in 24 bytes of memory each, and looks up many at a time."""

    def __init__(self) -> None:
        # Sorted runs, each at least twice as long as the next: adding n hashes takes n log n in all.
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._runs)

    def keys(self) -> np.ndarray:
        """All keys, in no particular order."""
        return np.concatenate([keys for keys, _ in self._runs]) if self._runs else np.empty(0, _KEY)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int64, shape (n,): the number of each key; -1 for one that is not there."""
        found = np.full(len(keys), -1, np.int64)
        for known, numbers in self._runs:
            places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            hits = known[places] == keys
            found[hits] = numbers[places[hits]]
        return found

    def is_new(self, keys: np.ndarray) -> np.ndarray:
        """bool, shape (n,): which keys are not there and not earlier in `keys`."""
        is_first = np.zeros(len(keys), bool)
        is_first[np.unique(keys, return_index=True)[1]] = True
        return is_first & (self.find(keys) < 0)

    def add(self, keys: np.ndarray, first: int = 0) -> None:
        """Add keys that are all new, numbered from `first`."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        run = keys[order], order + first
        while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
            other = self._runs.pop()
            merged, numbers = np.concatenate([other[0], run[0]]), np.concatenate([other[1], run[1]])
            order = np.argsort(merged, kind="stable")
            run = merged[order], numbers[order]
        self._runs.append(run)

    def add_new(self, keys: np.ndarray) -> None:
        """Add those of the keys that are new; their numbers mean nothing."""
        self.add(keys[self.is_new(keys)])


class VectorStore:
    """Vectors keyed by input hash. They are in a temporary file, so that memory hardly grows with their number."""

    def __init__(self) -> None:
        self._file = scratch_file()
        self._index = HashIndex()
        self._is_truncated = np.empty(0, bool)
        self._embedded_at = np.empty(0, np.int64)
        self.dimension: int | None = None
        """Length of the vectors; None while the store is empty."""

    def __enter__(self) -> VectorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._is_truncated)

    def keys(self) -> np.ndarray:
        """The `hash_keys` of all vectors."""
        return self._index.keys()

    def has(self, keys: np.ndarray) -> np.ndarray:
        """bool, shape (n,): which of the `hash_keys` have a vector."""
        return np.asarray(self._index.find(keys) >= 0)

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the rows of a batch that has at least `VECTOR_COLUMNS`. Hashes already present keep their vectors.

        Vectors of another dimension or without unit norm are skipped, so that their texts are embedded again.
        """
        if not batch.num_rows:
            return
        matrix = self._matrix(batch.column("embedding"))
        usable = np.flatnonzero(is_unit(matrix))
        keys = hash_keys(batch.column("input_hash"))
        new = usable[self._index.is_new(keys[usable])]
        self._index.add(keys[new], first=len(self))
        truncated = batch.column("is_truncated").to_numpy(zero_copy_only=False)[new]
        times = batch.column("embedded_at").cast(pa.int64()).to_numpy()[new]
        self._is_truncated = np.concatenate([self._is_truncated, truncated])
        self._embedded_at = np.concatenate([self._embedded_at, times])
        with scratch_errors():
            self._file.seek(0, 2)
            self._file.write((matrix if len(new) == len(matrix) else matrix[new]).data)

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

    def get(self, keys: np.ndarray) -> StoredVectors:
        """The vectors for the `hash_keys`, in their order. Raises ``KeyError`` for an unknown hash."""
        places = self._index.find(keys)
        if (places < 0).any():
            raise KeyError(keys[places < 0][0].hex())
        dimension = self.dimension or 0
        vectors = np.empty((len(places), dimension), dtype=np.float32)
        with scratch_errors():
            self._file.flush()
        # Adjacent vectors are read in one go: most chunks arrive in the order in which they were stored.
        order = np.argsort(places, kind="stable")
        ordered = places[order]
        breaks = np.flatnonzero(np.diff(ordered) > 1) + 1
        for run in np.split(np.arange(len(places)), breaks) if len(places) else []:
            first, last = int(ordered[run[0]]), int(ordered[run[-1]])
            self._file.seek(first * dimension * 4)
            block = np.frombuffer(self._file.read((last - first + 1) * dimension * 4), dtype=np.float32)
            vectors[order[run]] = block.reshape(-1, dimension)[ordered[run] - first]
        return StoredVectors(vectors, self._is_truncated[places], self._embedded_at[places])


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
