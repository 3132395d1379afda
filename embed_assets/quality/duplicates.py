"""Chunks that repeat another one, exactly or nearly, and which of them a search can leave out.

Chunks of one text are one row from the start. Rows near each other are found by sorting: a row's code is the signs of
512 random projections, and codes of near rows have long runs in common. In the order of each of 32 runs every row is
compared with the next 8, whose cosine is computed if few bits differ. So the work grows as n log n for n different
texts, even if all are near each other. Memory holds 110 n bytes, a temporary file 4 n bytes per dimension.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.errors import LakeError, SettingsError

Rows = Callable[[Sequence[str]], Iterable[pa.RecordBatch]]
"""Reads the named columns of an embeddings table: at each call the same rows, in any order."""
REDUNDANT = pa.schema(
    [
        pa.field(name, pa.string(), False)
        for name in ("partition_key", "chunk_id", "kept_partition_key", "kept_chunk_id")
    ]
)
DEFAULT_COSINE = 0.95
"""Of chunks of Rust RFCs by all-MiniLM-L6-v2, 86 % stayed above it with one word changed, 62 % with three, 94 % with a
line put before. Of pairs from 0.93 to 0.97, 3 in 4 had 70 % of their words in common, in order; from 0.90 to 0.93, 1 in
3. With another number or a "not", 98 % stayed above 0.95 and over 80 % above 0.99: no cosine tells the same meaning. In
a space where texts about different things have cosines of 0.7 and more, it must be higher."""
LOWEST_COSINE, HIGHEST_COSINE = 0.8, 0.999
_WORDS = 8
"""64 bits each, in a code."""
_BITS = 64 * _WORDS
_ORDERS, _WINDOW = 32, 8
"""Of the near-duplicates among 11,924 vectors of that model, these found all from a cosine of 0.95 on, 99.7 % from 0.85
and 98.9 % from 0.8; half the orders 99.9, 97.5 and 94.6 %, half the window 100, 99.0 and 97.6 %. Of 50,000 pairs from
0.95 on, planted in a million random vectors, 99.9 %. Of 20,000 with a mean cosine of 0.8, 96 %."""
_DEVIATIONS = 3.0
"""Standard deviations by which more bits may differ than do on average at the lowest cosine: 2 lose 0.1 % of the
near-duplicates from 0.95 on; 4 find no more of them, and a quarter more cosines are computed."""
_ROUNDS = 50
"""Chunks of a group that can stand for others. Each takes as long as a look at all that are left."""
_ROWS_AT_ONCE = 1 << 15
_VECTORS_AT_ONCE = 1 << 9
"""They stay in a core's cache: 4,096 take three times as long."""
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
    redundant: int
    """Chunks that another one stands for, in any partition."""


@dataclass(frozen=True, slots=True)
class NearPair:
    """Two chunks with different texts and nearly the same vector."""

    cosine: float
    partition_key: str
    chunk_id: str
    other_partition_key: str
    other_chunk_id: str


@dataclass(frozen=True, slots=True)
class Representatives:
    """Which chunk stands for which, in 40 bytes of memory per different text."""

    partition_keys: Sequence[str]
    """Sorted."""
    texts: np.ndarray
    """The digests of the different texts, sorted."""
    first: np.ndarray
    """Each text's chunk with the smallest id, and partition, as sortable bytes."""
    kept: np.ndarray
    """int32: the number of the text that stands for each text; its own where none other does."""

    def chunk(self, text: int) -> tuple[str, str]:
        """Partition and id of a text's first chunk."""
        place = bytes(self.first[text]).ljust(20, b"\0")
        return self.partition_keys[int.from_bytes(place[16:], "big")], place[:16].hex()

    def redundant(self, rows: Rows, only_repeats: bool = False) -> Iterator[pa.RecordBatch]:
        """The chunks that a search can leave out, each with the one that stands for it, in the schema `REDUNDANT`.

        With `only_repeats`, those that have the same text as the one that is kept. Raises ``LakeError`` if the rows
        are not those of before.
        """
        for batch in rows(["partition_key", "chunk_id", "input_hash"]):
            texts = _texts_of(batch, self.texts)
            kept = texts if only_repeats else self.kept[texts]
            left_out = np.flatnonzero(self.first[kept] != _places_of(batch, self.partition_keys)[0])
            if len(left_out):
                keys, ids = zip(*map(self.chunk, kept[left_out].tolist()), strict=True)
                own = [batch.column(name).take(pa.array(left_out)) for name in REDUNDANT.names[:2]]
                yield pa.RecordBatch.from_arrays([*own, pa.array(keys), pa.array(ids)], schema=REDUNDANT)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """The chunks of an embedding space that repeat another one."""

    total: Counts
    partitions: Mapping[str, Counts]
    """By partition key, sorted."""
    examples: tuple[NearPair, ...]
    """Of each group of near-duplicates the pair with the highest cosine found, the highest first."""
    representatives: Representatives


def find_duplicates(
    rows: Rows, scratch: IO[bytes], cosine: float = DEFAULT_COSINE, max_examples: int = 20
) -> Duplicates:
    """Chunks with the same input hash as another one, or with another one and a cosine of at least `cosine`.

    Near-duplicates are approximate: a few pairs are missed. Of each group of them, chunks are kept in the order of
    their ids, unless one that is kept is near enough: that one stands for them. The order of the rows does not matter.
    They are read three times. `scratch` is an empty temporary file. Raises ``LakeError`` if it can't grow, or if the
    rows change or hold unusable values, ``SettingsError`` if `cosine` is out of range.
    """
    if not LOWEST_COSINE <= cosine <= HIGHEST_COSINE:
        raise SettingsError(
            f"the cosine of near-duplicates must be from {LOWEST_COSINE} to {HIGHEST_COSINE}, got {cosine}; "
            f"the default is {DEFAULT_COSINE}"
        )
    keys, texts = _keys_and_texts(rows)
    vectors = _store_vectors(rows, texts, scratch)
    near = _search(vectors, cosine)
    counts, first = _count(rows, keys, texts, near.other >= 0)
    kept = _represent(vectors, cosine, near, first)
    numbers = first[kept == np.arange(len(kept))].view(np.uint8).reshape(-1, 20)[:, 16:].copy().view(">u4")[:, 0]
    columns = [*counts, counts[0] - np.bincount(numbers, minlength=len(keys))]
    partitions = {key: Counts(*row) for key, *row in zip(keys, *(column.tolist() for column in columns), strict=True)}
    chunks, _, near_duplicates, redundant = (int(column.sum()) for column in columns)
    total = Counts(chunks, chunks - len(texts), near_duplicates, redundant)
    representatives = Representatives(keys, texts, first, kept)
    return Duplicates(total, partitions, _examples(near, representatives, max_examples), representatives)


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


def _cosines(vectors: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float32, shape (pairs,), at most 1: cosines between the `vectors` of these numbers."""
    found = np.empty(len(one), np.float32)
    for start in range(0, len(one), _VECTORS_AT_ONCE):
        part = slice(start, start + _VECTORS_AT_ONCE)
        np.vecdot(vectors[one[part]], vectors[other[part]], out=found[part])
    return np.minimum(found, 1)


class _Near:
    """Pairs of near-duplicates among `vectors`, as they are found: their groups, and each one's nearest so far."""

    def __init__(self, vectors: np.ndarray, cosine: float) -> None:
        rows = len(vectors)
        self._vectors, self._threshold = vectors, cosine
        self._above = np.arange(rows, dtype=np.int32)
        """A smaller number of the same group; its own at the top."""
        share = math.acos(cosine) / math.pi  # of the projections, in which the signs differ
        self._most_bits = _BITS * share + _DEVIATIONS * math.sqrt(_BITS * share * (1 - share))
        self._bits = np.full(rows, _BITS, np.uint16)
        """Fewest differing bits to a near-duplicate."""
        self.cosine = np.full(rows, -1, np.float32)
        """Highest cosine found."""
        self.other = np.full(rows, -1, np.int32)
        """The near-duplicate with that cosine; -1 for none."""

    def groups(self) -> np.ndarray:
        """int32, shape (rows,): the smallest number of the group of each."""
        return self._group(np.arange(len(self._above)))

    def compare(self, rows: np.ndarray, codes: np.ndarray) -> None:
        """Compare each of the `rows` with the next `_WINDOW`. Their `codes` are uint64 of shape (_WORDS, rows)."""
        for step in range(1, min(_WINDOW + 1, len(rows))):
            bits = np.bitwise_count(codes[:, :-step] ^ codes[:, step:]).sum(axis=0, dtype=np.uint16)
            close = np.flatnonzero(bits <= self._most_bits)
            if len(close):
                self._decide(rows[close], rows[close + step], bits[close])

    def _decide(self, one: np.ndarray, other: np.ndarray, bits: np.ndarray) -> None:
        """Compute the cosines of the pairs that would join two groups or be the closest of one of the two.

        No row may be twice in `one` or in `other`.
        """
        is_closer = (bits < self._bits[one]) | (bits < self._bits[other])
        asked = np.flatnonzero(is_closer | (self._group(one) != self._group(other)))
        cosines = _cosines(self._vectors, one[asked], other[asked])
        asked, cosines = (values[cosines >= self._threshold] for values in (asked, cosines))
        one, other, bits = one[asked], other[asked], bits[asked]
        for row, partner in ((one, other), (other, one)):
            self._bits[row] = np.minimum(self._bits[row], bits)
            is_higher = cosines > self.cosine[row]
            self.cosine[row[is_higher]], self.other[row[is_higher]] = cosines[is_higher], partner[is_higher]
        self._join(one, other)

    def _group(self, rows: np.ndarray) -> np.ndarray:
        """The top of each row, of which the rows are then direct followers."""
        while True:
            above = self._above[rows]
            top = self._above[above]
            if np.array_equal(above, top):
                return np.asarray(top)
            self._above[rows] = top

    def _join(self, one: np.ndarray, other: np.ndarray) -> None:
        while len(one):
            one, other = self._group(one), self._group(other)
            is_apart = one != other
            one, other = one[is_apart], other[is_apart]
            np.minimum.at(self._above, np.maximum(one, other), np.minimum(one, other))


def _search(vectors: np.ndarray, cosine: float) -> _Near:
    """Near-duplicates with at least this cosine."""
    near = _Near(vectors, cosine)
    codes = _codes(vectors)
    for run in _runs(codes):
        order = np.argsort(run, kind="stable").astype(np.int32)
        for start in range(0, len(order), _ROWS_AT_ONCE):
            part = order[start : start + _ROWS_AT_ONCE]
            near.compare(part, codes[:, part])
        near.groups()  # shortens the ways to the tops
    return near


def _runs(codes: np.ndarray) -> Iterator[np.ndarray]:
    """For each order, uint64 of shape (rows,): the bits of a word of each code, from another one on."""
    for word in codes:
        for start in range(0, 64, 64 * _WORDS // _ORDERS):
            yield word << start | word >> (64 - start) % 64


def _codes(vectors: np.ndarray) -> np.ndarray:
    """uint64, shape (_WORDS, rows): the signs of random projections of the vectors."""
    rows, dimension = vectors.shape
    projections = np.random.default_rng(0).standard_normal((dimension, _BITS), np.float32)
    codes = np.empty((_WORDS, rows), np.uint64)
    for start in range(0, rows, _VECTORS_AT_ONCE):
        part = slice(start, start + _VECTORS_AT_ONCE)
        codes[:, part] = np.packbits(vectors[part] @ projections > 0, axis=1).view(np.uint64).T
    return codes


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


def _represent(vectors: np.ndarray, cosine: float, near: _Near, first: np.ndarray) -> np.ndarray:
    """int32, shape (texts,): the text that stands for each text; its own where none does.

    In each round, the first of each group that is left stands for those that are near it. What is left after the last
    round stands for itself.
    """
    kept = np.arange(len(vectors), dtype=np.int32)
    groups = near.groups()
    left = np.flatnonzero(near.other >= 0)
    left = left[np.lexsort((first[left], groups[left]))]
    for _ in range(_ROUNDS):
        starts = np.flatnonzero(np.diff(groups[left], prepend=-1))
        leaders = np.repeat(left[starts], np.diff(starts, append=len(left)))
        is_near = (_cosines(vectors, left, leaders) >= cosine) | (left == leaders)
        kept[left[is_near]] = leaders[is_near]
        left = left[~is_near]
    return kept


def _examples(near: _Near, representatives: Representatives, most: int) -> tuple[NearPair, ...]:
    groups, rows = near.groups(), np.flatnonzero(near.other >= 0)
    first = representatives.first
    rows = rows[np.lexsort((first[rows], -near.cosine[rows], groups[rows]))]
    rows = rows[np.diff(groups[rows], prepend=-1) > 0]
    rows = rows[np.lexsort((first[rows], -near.cosine[rows]))][:most]
    return tuple(
        NearPair(float(near.cosine[row]), *representatives.chunk(row), *representatives.chunk(int(near.other[row])))
        for row in rows.tolist()
    )
