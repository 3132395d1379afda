"""Repeated and nearly repeated chunks: counts and pairs."""

from __future__ import annotations

import random
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embed_assets.errors import LakeError, SettingsError
from embed_assets.quality.duplicates import Counts, Duplicates, NearPair, Rows, find_duplicates
from embed_assets.records import VECTOR, hash_text, slices

COSINE = 0.95


@dataclass(frozen=True)
class Chunk:
    partition_key: str
    chunk_id: str
    input_hash: str
    embedding: np.ndarray


def number(value: int) -> str:
    """32 hex digits."""
    return f"{value:032x}"


def chunk(key: str, chunk_id: int, text: str, *vector: float) -> Chunk:
    values = np.array(vector)
    return Chunk(key, number(chunk_id), hash_text(text), (values / np.linalg.norm(values)).astype(np.float32))


def at(degrees: float) -> tuple[float, float]:
    """A point on the unit circle: the cosine of 18 degrees is 0.951, that of 19 degrees 0.946."""
    return float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))


def reader(chunks: Sequence[Chunk], at_once: int = 3) -> Rows:
    def rows(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for part in slices(chunks, at_once):
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array([getattr(chunk, name) for chunk in part], VECTOR if name == "embedding" else pa.string())
                    for name in columns
                ],
                names=list(columns),
            )

    return rows


def many(vectors: np.ndarray, at_once: int = 8192) -> Rows:
    """A chunk with a text of its own per vector of shape (n, dimension), in two partitions."""

    def column(name: str, numbers: Sequence[int]) -> pa.Array:
        if name == "partition_key":
            return pa.array(["ab"[value % 2] for value in numbers])
        if name != "embedding":
            return pa.array([hash_text(f"{name} {value}") for value in numbers])
        part = vectors[numbers[0] : numbers[-1] + 1]
        offsets = pa.array(np.arange(len(part) + 1, dtype=np.int32) * part.shape[1])
        return pa.ListArray.from_arrays(offsets, pa.array(part.reshape(-1)), type=VECTOR)

    def rows(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for part in slices(range(len(vectors)), at_once):
            yield pa.RecordBatch.from_arrays([column(name, part) for name in columns], names=list(columns))

    return rows


def found_in(rows: Rows, cosine: float = COSINE, max_examples: int = 20) -> Duplicates:
    with tempfile.TemporaryFile() as scratch:
        return find_duplicates(rows, scratch, cosine, max_examples)


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def planted(count: int, dimension: int, pairs: int, lean: float = 0.0) -> np.ndarray:
    """Random unit vectors, float32 of shape (count, dimension), of which the last `pairs` are near one of the first.

    With `lean`, all point to one side: their cosines are lean² / (1 + lean²) on average.
    """
    generator = np.random.default_rng(1)
    vectors = unit(generator.standard_normal((count, dimension)))
    vectors[:, 0] += lean
    vectors = unit(vectors)
    near = vectors[:pairs]
    away = generator.standard_normal(near.shape)
    away = unit(away - (away * near).sum(axis=1, keepdims=True) * near)
    cosines = generator.uniform(COSINE + 0.0005, 1, (pairs, 1))
    vectors[count - pairs :] = cosines * near + np.sqrt(1 - cosines**2) * away
    return unit(vectors)


def test_chunks_are_counted_by_partition() -> None:
    chunks = [
        chunk("a", 1, "text", *at(0)),
        chunk("a", 2, "text", *at(0)),
        chunk("a", 3, "text!", *at(10)),
        chunk("b", 4, "text", *at(0)),
        chunk("b", 5, "another", *at(90)),
        chunk("c", 6, "alone", *at(200)),
    ]
    found = found_in(reader(chunks))
    assert found.total == Counts(chunks=6, repeats=2, near_duplicates=4)
    # Text that two partitions have in common is repeated in neither of them.
    assert found.partitions == {
        "a": Counts(chunks=3, repeats=1, near_duplicates=3),
        "b": Counts(chunks=2, repeats=0, near_duplicates=1),
        "c": Counts(chunks=1, repeats=0, near_duplicates=0),
    }
    [pair] = found.examples
    assert pair == NearPair(pair.cosine, "a", number(1), "a", number(3))
    assert pair.cosine == pytest.approx(np.cos(np.radians(10)))


def test_equal_texts_are_no_near_duplicates() -> None:
    found = found_in(reader([chunk("a", n, "text", *at(0)) for n in range(5)]))
    assert found.total == Counts(chunks=5, repeats=4, near_duplicates=0)
    assert found.examples == ()


@pytest.mark.parametrize("degrees, near", [(17.5, 2), (18.5, 0)])
def test_the_cosine_decides(degrees: float, near: int) -> None:
    chunks = [chunk("a", 1, "x", *at(0)), chunk("b", 2, "y", *at(degrees)), chunk("b", 3, "z", *at(180))]
    assert found_in(reader(chunks)).total.near_duplicates == near
    assert found_in(reader(chunks), 0.8).total.near_duplicates == 2
    assert found_in(reader(chunks), 0.97).total.near_duplicates == 0


def test_examples_are_the_closest_pair_of_each_group() -> None:
    places = {"x": 0, "y": 9, "z": 12, "p": 100, "q": 101, "r": 200, "s": 207, "t": 300}
    chunks = [chunk("a", place, text, *at(place)) for text, place in places.items()]
    found = found_in(reader(chunks)).examples
    assert [(pair.chunk_id, pair.other_chunk_id) for pair in found] == [
        (number(one), number(other)) for one, other in ((100, 101), (9, 12), (200, 207))
    ]
    assert [pair.cosine for pair in found] == pytest.approx(np.cos(np.radians([1, 3, 7])), abs=1e-6)
    assert found_in(reader(chunks), max_examples=2).examples == found[:2]
    assert found_in(reader(chunks), max_examples=0).examples == ()


def test_examples_are_of_all_partitions() -> None:
    places = [("a", 0), ("a", 1), ("a", 50), ("a", 52), ("b", 100), ("b", 105), ("c", 107), ("c", 200)]
    chunks = [chunk(key, place, f"{place}", *at(place)) for key, place in places]
    pairs = [(pair.partition_key, pair.chunk_id, pair.other_chunk_id) for pair in found_in(reader(chunks)).examples]
    expected = [("a", 0, 1), ("a", 50, 52), ("b", 105, 107)]
    assert pairs == [(key, number(one), number(other)) for key, one, other in expected]
    few = [pair.partition_key for pair in found_in(reader(chunks), max_examples=2).examples]
    assert few == ["a", "b"]


def test_the_closest_pair_is_mostly_found_in_whatever_order_a_group_is_joined() -> None:
    generator = np.random.default_rng(3)
    missed = 0
    for _ in range(40):
        vectors = unit(np.ones((1, 16)) + 0.2 * generator.standard_normal((9, 16)))
        [pair] = found_in(reader([chunk("a", n, f"{n}", *vector) for n, vector in enumerate(vectors)]), 0.85).examples
        highest = np.triu(vectors @ vectors.T, 1).max()
        assert pair.cosine <= highest + 1e-6
        missed += pair.cosine < highest - 1e-6
    assert missed < 8


def test_cosines_are_at_most_1() -> None:
    vectors = unit(np.random.default_rng(4).standard_normal((30, 384)))
    found = found_in(reader([chunk("a", n, f"{n}", *vectors[n // 2]) for n in range(60)]))
    assert len(found.examples) == 20
    assert all(pair.cosine == pytest.approx(1) and pair.cosine <= 1 for pair in found.examples)


def test_norms_that_are_off_a_little_do_not_move_cosines() -> None:
    chunks = [chunk("a", 1, "x", *at(0)), chunk("a", 2, "y", *at(18.1))]
    short = [replace(chunk, embedding=chunk.embedding * np.float32(0.9995)) for chunk in chunks]
    [pair] = found_in(reader(short)).examples
    assert pair.cosine == pytest.approx(np.cos(np.radians(18.1)), abs=1e-6)


@pytest.mark.parametrize("rows", [reader([]), lambda columns: reader([chunk("a", 1, "x", 1)])(columns)])
def test_one_chunk_or_none_repeats_nothing(rows: Rows) -> None:
    found = found_in(rows)
    assert found.total == Counts(found.total.chunks, 0, 0)
    assert found.examples == ()


def test_empty_batches_are_skipped() -> None:
    full = reader([chunk("a", 1, "x", *at(0)), chunk("a", 2, "y", *at(1))])

    def rows(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in full(columns):
            yield from (batch.slice(0, 0), batch, batch.slice(0, 0))

    assert found_in(rows).total == Counts(2, 0, 2)


@st.composite
def small_tables(draw: st.DrawFn) -> list[Chunk]:
    """Chunks of at most 9 texts, so that all pairs are compared, in up to 3 directions; some texts are repeated.

    Cosines are well above or below the limit.
    """
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    dimension, texts = draw(st.integers(2, 20)), draw(st.integers(1, 9))
    directions = unit(generator.standard_normal((draw(st.integers(1, 3)), dimension)))
    spread = draw(st.sampled_from([0.05, 0.1, 0.6]))
    noise = spread * unit(generator.standard_normal((texts, dimension)))
    vectors = unit(directions[generator.integers(len(directions), size=texts)] + noise)
    assume((np.abs(vectors @ vectors.T - COSINE) > 0.01).all())
    shift = draw(st.sampled_from([0, 8, 120]))  # ids and hashes that begin or end with zeros
    keys = st.sampled_from(["a", "é", ""])
    return [
        Chunk(draw(keys), number(place << shift), number(text << shift), vectors[text])
        for place, text in enumerate([*range(texts), *draw(st.lists(st.integers(0, texts - 1), max_size=8))], 1)
    ]


@settings(deadline=None)
@given(small_tables(), st.randoms(use_true_random=False), st.integers(1, 20))
def test_few_chunks_are_found_as_by_comparing_all(chunks: list[Chunk], chance: random.Random, at_once: int) -> None:
    found = found_in(reader(chunks))
    near = {
        one.chunk_id
        for one in chunks
        for other in chunks
        if one.input_hash != other.input_hash and one.embedding @ other.embedding >= COSINE
    }
    for key, counts in found.partitions.items():
        mine = [chunk for chunk in chunks if chunk.partition_key == key]
        assert counts.chunks == len(mine)
        assert counts.repeats == len(mine) - len({chunk.input_hash for chunk in mine})
        assert counts.near_duplicates == sum(chunk.chunk_id in near for chunk in mine)
    assert list(found.partitions) == sorted({chunk.partition_key for chunk in chunks})
    assert found.total.repeats == len(chunks) - len({chunk.input_hash for chunk in chunks})
    chance.shuffle(chunks)
    again = found_in(reader(chunks, at_once))
    assert (again.total, again.partitions, again.examples) == (found.total, found.partitions, found.examples)


@pytest.mark.parametrize("lean, share", [(0.0, 0.995), (2.0, 0.95)])
def test_nearly_all_near_duplicates_are_found(lean: float, share: float) -> None:
    vectors = planted(10_000, 64, 500, lean)
    truth = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), 500):
        cosines = vectors[start : start + 500] @ vectors.T
        truth[start : start + 500] = (cosines >= COSINE).sum(axis=1) > 1
    found = found_in(many(vectors))
    assert truth.sum() >= 1000
    assert share * truth.sum() <= found.total.near_duplicates <= truth.sum()
    assert all(pair.cosine >= COSINE for pair in found.examples) and len(found.examples) == 20


def repeated(times: int) -> Rows:
    """One text in many chunks, and another near it."""

    def rows(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from reader([chunk("a", 0, "other", *at(5))])(columns)
        [one] = reader([chunk("a", 1, "text", *at(0))])(columns)
        for part in slices(range(1, times + 1), 1000):
            batch = one.take(pa.array([0] * len(part)))
            if "chunk_id" in columns:
                ids = pa.array([number(value) for value in part])
                batch = batch.set_column(list(columns).index("chunk_id"), "chunk_id", ids)
            yield batch

    return rows


def peak_of(rows: Rows) -> int:
    """Bytes of memory that it takes at most, without the map of the file."""
    tracemalloc.start()
    try:
        found_in(rows)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_text_in_many_chunks_is_one_row() -> None:
    found = found_in(repeated(100_000))
    assert found.total == Counts(chunks=100_001, repeats=99_999, near_duplicates=100_001)
    assert len(found.examples) == 1
    assert peak_of(repeated(50_000)) - peak_of(repeated(10_000)) < 40_000


def template(count: int) -> np.ndarray:
    """Vectors of which most pairs, but not all, are near."""
    generator = np.random.default_rng(2)
    return unit(unit(np.ones((1, 32))) + 0.22 * unit(generator.standard_normal((count, 32))))


def test_many_texts_near_each_other_are_one_group() -> None:
    vectors = template(20_000)
    assert 0.5 < (vectors[:100] @ vectors.T >= COSINE).mean() < 0.99
    found = found_in(many(vectors))
    assert found.total.near_duplicates == 20_000
    assert len(found.examples) == 2  # one in each of the two partitions


@pytest.mark.long
@pytest.mark.parametrize("vectors_of", [template, lambda count: planted(count, 32, count // 20)])
def test_memory_grows_by_few_bytes_per_text(vectors_of: Callable[[int], np.ndarray]) -> None:
    found_in(many(vectors_of(100)))  # imports what it needs
    few, more = (many(vectors_of(count), at_once=2048) for count in (50_000, 100_000))
    assert peak_of(more) - peak_of(few) < 150 * 50_000


@pytest.mark.parametrize("cosine", [0.5, 1.0, float("nan")])
def test_a_cosine_out_of_range_is_refused(cosine: float) -> None:
    with pytest.raises(SettingsError, match=r"from 0\.8 to 0\.999, got .*; the default is 0\.95"):
        found_in(reader([]), cosine)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embedding": np.array([1.0, 1.0], np.float32)}, "norm of 1, got 1.41421 for the input hash '4cf61fa3"),
        ({"embedding": np.array([np.nan, 1.0], np.float32)}, "norm of 1, got nan"),
        ({"embedding": np.array([0.0, 0.0], np.float32)}, "norm of 1, got 0 for"),
        ({"embedding": np.array([1.0], np.float32)}, r"one dimension, got \[1, 2\]; run 'embed-assets verify"),
        ({"input_hash": "12"}, "input_hash must be 32 hexadecimal digits: got '12'"),
        ({"input_hash": "x" * 32}, "input_hash must be 32 hexadecimal digits: non-hexadecimal"),
        ({"chunk_id": None}, "chunk_id must be 32 hexadecimal digits: .*not None"),
    ],
)
@pytest.mark.parametrize("at_once", [1, 3])
def test_unusable_rows_are_refused(change: dict[str, object], message: str, at_once: int) -> None:
    chunks = [chunk("a", 1, "x", *at(0)), chunk("a", 2, "y", *at(90)), chunk("a", 3, "z", *at(180))]
    chunks[1] = replace(chunks[1], **change)  # type: ignore[arg-type]
    with pytest.raises(LakeError, match=message):
        found_in(reader(chunks, at_once))


@pytest.mark.parametrize(
    "kinds, message",
    [
        (["same", "more"], "a new input hash"),
        (["same", "same", "more"], "a new input hash"),
        (["same", "fewer", "same"], "fewer input hashes"),
        (["same", "same", "fewer"], "fewer input hashes"),
        (["same", "same", "moved"], "a new partition"),
    ],
)
def test_rows_that_change_meanwhile_are_refused(kinds: list[str], message: str) -> None:
    same = [chunk("a", 1, "x", *at(0)), chunk("a", 2, "y", *at(90))]
    tables = {
        "same": same,
        "more": [*same, chunk("a", 3, "z", *at(180))],
        "fewer": same[:1],
        "moved": [same[0], replace(same[1], partition_key="b")],
    }
    reads = iter(kinds)

    def rows(columns: Sequence[str]) -> Iterable[pa.RecordBatch]:
        return reader(tables[next(reads)])(columns)

    with pytest.raises(LakeError, match=f"must stay the same .*, got {message}; run it again"):
        found_in(rows)


def test_a_file_that_cannot_grow_is_an_error() -> None:
    rows = reader([chunk("a", 1, "x", *at(0))])
    with (
        Path("/dev/full").open("r+b", buffering=0) as scratch,
        pytest.raises(LakeError, match=r"vectors of 1 texts must fit into a temporary file of 0 MB: .*set TMPDIR"),
    ):
        find_duplicates(rows, scratch)
