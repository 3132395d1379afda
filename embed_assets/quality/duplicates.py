"""Chunks that repeat another one, exactly or nearly.

Chunks of one text are one row from the start. Memory holds 110 bytes per different text, a temporary file 4 bytes per
dimension of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.errors import LakeError, SettingsError
from embed_assets.quality.near import NearSearch, search_near

Rows = Callable[[Sequence[str]], Iterable[pa.RecordBatch]]
"""Reads the named columns of an embeddings table: at each call the same rows, in any order."""
DEFAULT_COSINE = 0.95
"""Of chunks of Rust RFCs by all-MiniLM-L6-v2, 86 % stayed above it with one word changed, 62 % with three, 94 % with a
line put before. Of pairs from 0.93 to 0.97, 3 in 4 had 70 % of their words in common, in order; from 0.90 to 0.93, 1 in
3. With another number or a "not", 98 % stayed above 0.95 and over 80 % above 0.99: no cosine tells the same meaning. In
a space where texts about different things have cosines of 0.7 and more, it must be higher."""
LOWEST_COSINE, HIGHEST_COSINE = 0.8, 0.999
_ROWS_AT_ONCE = 1 << 15
_SQUARED_NORM_TOLERANCE = 2e-3
"""As of the check of vectors: loose enough for those that were normalized in half precision."""
_DIGEST = "S16"
"""Sortable bytes of 32 hex digits. NumPy ignores trailing zero bytes, which makes no difference at one length."""
_PLACE = "S20"
"""The same for a chunk: the digest that is its id, then the number of its partition."""
_NO_PLACE = b"\xff" * 20
"""After all places."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many chunks repeat another one."""

    chunks: int
    repeats: int
    """Chunks minus different texts among them."""
    near_duplicates: int
    """Chunks near one with another text, in any partition."""


@dataclass(frozen=True, slots=True)
class NearPair:
    """Two chunks with different texts and nearly the same vector."""

    cosine: float
    partition_key: str
    chunk_id: str
    other_partition_key: str
    other_chunk_id: str


@dataclass(frozen=True, slots=True)
class Duplicates:
    """The chunks of an embedding space that repeat another one."""

    total: Counts
    partitions: Mapping[str, Counts]
    """By partition key, sorted."""
    examples: tuple[NearPair, ...]
    """Of each group of near-duplicates the pair with the highest cosine found, in each partition that it is in; the
    highest first. Where there are too many, partitions get equally many."""


def find_duplicates(
    rows: Rows, scratch: IO[bytes], cosine: float = DEFAULT_COSINE, max_examples: int = 100
) -> Duplicates:
    """Chunks with the same input hash as another one, or with another one and a cosine of at least `cosine`.

    Near-duplicates are approximate: a few pairs are missed. The rows are read three times, and their order does not
    matter. `scratch` is an empty temporary file. Raises ``LakeError`` if it can't grow, or if the rows change or hold
    unusable values, ``SettingsError`` if `cosine` is out of range.
    """
    if not LOWEST_COSINE <= cosine <= HIGHEST_COSINE:
        raise SettingsError(
            f"the cosine of near-duplicates must be from {LOWEST_COSINE} to {HIGHEST_COSINE}, got {cosine}; "
            f"the default is {DEFAULT_COSINE}"
        )
    keys, texts = _keys_and_texts(rows)
    near = search_near(_store_vectors(rows, texts, scratch), cosine)
    counts, first = _count(rows, keys, texts, near.other >= 0)
    partitions = {key: Counts(*row) for key, *row in zip(keys, *(column.tolist() for column in counts), strict=True)}
    chunks, _, near_duplicates = (int(column.sum()) for column in counts)
    total = Counts(chunks, chunks - len(texts), near_duplicates)
    return Duplicates(total, partitions, _examples(near, keys, first, max_examples))


def _digests(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """`_DIGEST`, shape (rows,): a column of hashes as 32 hex digits each. Raises ``LakeError`` for anything else."""
    hashes = batch.column(name).to_pylist()
    try:
        return np.frombuffer(b"".join(map(_digest, hashes)), _DIGEST)
    except (TypeError, ValueError) as error:
        raise LakeError(f"{name} must be 32 hexadecimal digits: {error}; run 'embed-assets verify'") from error


def _digest(digits: str) -> bytes:
    digest = bytes.fromhex(digits)
    if len(digest) != 16:
        raise ValueError(f"got {digits!r}")
    return digest


def _changed(what: str) -> LakeError:
    return LakeError(f"the rows must stay the same while duplicates are looked for, got {what}; run it again")


def _texts_of(batch: pa.RecordBatch, texts: np.ndarray) -> np.ndarray:
    """int64, shape (rows,): the place of each chunk's text among the sorted digests `texts`."""
    digests = _digests(batch, "input_hash")
    found = np.searchsorted(texts, digests)
    if (found == len(texts)).any() or (texts[found] != digests).any():
        raise _changed("a new input hash")
    return np.asarray(found)


def _places_of(batch: pa.RecordBatch, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Each chunk as `_PLACE`, and the int64 number of its partition, both of shape (rows,)."""
    column = batch.column("partition_key")
    numbers = pc.index_in(column, value_set=pa.array(keys, column.type))
    if numbers.null_count:
        raise _changed("a new partition")
    packed = np.empty((len(column), 20), np.uint8)
    packed[:, :16] = _digests(batch, "chunk_id").view(np.uint8).reshape(-1, 16)
    packed[:, 16:] = numbers.to_numpy().astype(">u4").view(np.uint8).reshape(-1, 4)
    return packed.view(_PLACE)[:, 0], numbers.to_numpy().astype(np.int64)


class _Distinct:
    """The different values among those that were added. At most three times as much memory as they take."""

    def __init__(self, kind: str) -> None:
        self._sorted, self._added = np.empty(0, kind), [np.empty(0, kind)]

    def add(self, values: np.ndarray) -> None:
        self._added.append(np.unique(values))
        if sum(map(len, self._added)) > max(len(self._sorted), _ROWS_AT_ONCE):
            self.sorted()

    def sorted(self) -> np.ndarray:
        """All of them."""
        merged = np.concatenate([self._sorted, *self._added])
        self._added = [merged[:0].copy()]
        merged.sort()
        is_first = np.ones(len(merged), bool)
        np.not_equal(merged[1:], merged[:-1], out=is_first[1:])
        self._sorted = merged[is_first]
        return self._sorted


def _keys_and_texts(rows: Rows) -> tuple[list[str], np.ndarray]:
    """The sorted partition keys, and the sorted digests of the different texts."""
    keys: set[str] = set()
    texts = _Distinct(_DIGEST)
    for batch in rows(["partition_key", "input_hash"]):
        keys.update(pc.unique(batch.column("partition_key")).to_pylist())
        texts.add(_digests(batch, "input_hash"))
    return sorted(keys), texts.sorted()


def _store_vectors(rows: Rows, texts: np.ndarray, scratch: IO[bytes]) -> np.ndarray:
    """float32, shape (texts, dimension): unit vectors, mapped from the file."""
    vectors = np.empty((len(texts), 0), np.float32)
    is_missing = np.ones(len(texts), bool)
    for batch in rows(["input_hash", "embedding"]):
        if not batch.num_rows:
            continue
        matrix = _unit_vectors(batch, vectors.shape[1])
        if not vectors.shape[1]:
            vectors = _mapped(scratch, (len(texts), matrix.shape[1]))
        found = _texts_of(batch, texts)
        is_new = is_missing[found]
        vectors[found[is_new]] = matrix[is_new]
        is_missing[found] = False
    if is_missing.any():
        raise _changed("fewer input hashes")
    return vectors


def _unit_vectors(batch: pa.RecordBatch, dimension: int) -> np.ndarray:
    """float32, shape (rows, dimension). Raises ``LakeError`` for another norm than 1 or, unless 0, `dimension`."""
    column = batch.column("embedding")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or dimension not in (0, lengths[0]):
        found = sorted({*lengths, dimension or lengths[0]})
        raise LakeError(f"vectors must have one dimension, got {found}; run 'embed-assets verify --repair'")
    matrix = np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(batch.num_rows, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", matrix, matrix)
        unusable = np.flatnonzero(~(np.abs(squares - 1) < _SQUARED_NORM_TOLERANCE))
    if len(unusable):
        first = int(unusable[0])
        raise LakeError(
            f"vectors must have a norm of 1, got {np.sqrt(squares[first]):g} for the input hash "
            f"{batch.column('input_hash')[first].as_py()!r}; run 'embed-assets verify --repair'"
        )
    return np.asarray(matrix / np.sqrt(squares)[:, None])


def _mapped(scratch: IO[bytes], shape: tuple[int, int]) -> np.ndarray:
    """A float32 array in the file. Its room is reserved: a map of a file that can't grow would end the process."""
    byte_size = 4 * shape[0] * shape[1]
    try:
        os.posix_fallocate(scratch.fileno(), 0, byte_size)
        return np.asarray(np.memmap(scratch, np.float32, "r+", shape=shape))
    except OSError as error:
        raise LakeError(
            f"the vectors of {shape[0]:,} texts must fit into a temporary file of {byte_size / 1e6:,.0f} MB: "
            f"{error.strerror}; free some space or set TMPDIR to a larger folder"
        ) from error


def _count(rows: Rows, keys: Sequence[str], texts: np.ndarray, is_near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64, shape (3, partitions): chunks, repeats, near-duplicates; and each text's first `_PLACE`."""
    chunks, near = np.zeros((2, len(keys)), np.int64)
    first = np.full(len(texts), _NO_PLACE, _PLACE)
    distinct = _Distinct("i8")
    for batch in rows(["partition_key", "chunk_id", "input_hash"]):
        found = _texts_of(batch, texts)
        places, numbers = _places_of(batch, keys)
        chunks += np.bincount(numbers, minlength=len(keys))
        near += np.bincount(numbers[is_near[found]], minlength=len(keys))
        distinct.add(found * len(keys) + numbers)
        order = np.lexsort((places, found))
        order = order[np.diff(found[order], prepend=-1) > 0]
        order = order[places[order] < first[found[order]]]
        first[found[order]] = places[order]
    if (first == _NO_PLACE).any():
        raise _changed("fewer input hashes")
    repeats = chunks - np.bincount(distinct.sorted() % max(len(keys), 1), minlength=len(keys))
    return np.stack([chunks, repeats, near]), first


def _examples(near: NearSearch, keys: Sequence[str], first: np.ndarray, most: int) -> tuple[NearPair, ...]:
    rows = np.flatnonzero(near.other >= 0)
    rows = rows[np.lexsort((first[rows], -near.cosine[rows]))]
    pairs = np.stack([rows, near.other[rows]])
    rows = rows[_firsts(np.sort(pairs, axis=0))]
    partitions = np.array([_partition(place) for place in first[rows].tolist()], np.int64)
    is_shown = _firsts(np.stack([partitions, near.groups()[rows]]))
    rows, partitions = rows[is_shown], partitions[is_shown]
    order = np.argsort(partitions, kind="stable")
    starts = np.flatnonzero(np.diff(partitions[order], prepend=-1))
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    shown = np.sort(np.argsort(rank, kind="stable")[:most])
    return tuple(
        NearPair(float(near.cosine[row]), *_chunk(keys, first[row]), *_chunk(keys, first[near.other[row]]))
        for row in rows[shown].tolist()
    )


def _firsts(columns: np.ndarray) -> np.ndarray:
    """The places of the first of each different column of an array, in their order."""
    return np.sort(np.unique(columns, axis=1, return_index=True)[1])


def _chunk(keys: Sequence[str], place: bytes) -> tuple[str, str]:
    """Partition and id of a chunk."""
    return keys[_partition(place)], place.ljust(20, b"\0")[:16].hex()


def _partition(place: bytes) -> int:
    return int.from_bytes(place.ljust(20, b"\0")[16:], "big")
