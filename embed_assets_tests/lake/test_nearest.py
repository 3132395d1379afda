"""Exact nearest neighbours, and candidates from small copies, against brute force."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_assets.errors import LakeError
from embed_assets.lake.copies import Copy, copies_of, encode, update_copies, update_copy
from embed_assets.lake.maintenance import remove_space
from embed_assets.lake.nearest import Hit, nearest_chunks, nearest_documents, nearest_rows
from embed_assets.lake.row_source import StoredRows
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.spaces import space_table
from embed_assets.lake.tables import Lake
from embed_assets.lake.vectors import vector_array
from embed_assets.lake.writer import Provenance
from embed_assets.records import COPY_KINDS, CopyKind, hash_text, utc_now

DIMENSION = 24
SPACE = "model-12345678"


def unit(count: int, seed: int, dimension: int = DIMENSION) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def batch(vectors: np.ndarray, documents: Sequence[str]) -> pa.RecordBatch:
    names = [f"{i:03}" for i in range(len(vectors))]
    columns = {"chunk_id": names, "partition_key": ["p"] * len(names), "document_id": list(documents)}
    return pa.RecordBatch.from_pydict({**columns, "embedding": vector_array(vectors)})


def cut(whole: pa.RecordBatch, places: Sequence[int]) -> Iterator[pa.RecordBatch]:
    ends = sorted(place % (whole.num_rows + 1) for place in places)
    for start, end in zip([0, *ends], [*ends, whole.num_rows], strict=True):
        if end > start:
            yield whole.slice(start, end - start)


@settings(deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 5), st.integers(1, 12), st.lists(st.integers(0, 99), max_size=4), st.integers()
)
def test_chunks_are_those_of_a_sort(count: int, queries: int, k: int, places: list[int], seed: int) -> None:
    vectors, wanted = unit(count, abs(seed) % 2**32), unit(queries, (abs(seed) + 1) % 2**32)
    found = nearest_rows(cut(batch(vectors, ["d"] * count), places), wanted, k, ["document_id"])
    for query, hits in zip(wanted, found, strict=True):
        best = np.sort(vectors @ query)[::-1][:k]
        assert np.allclose([hit.score for hit in hits], best, atol=1e-6)
        assert len({hit.row["chunk_id"] for hit in hits}) == len(hits) == min(k, count)


class FakeTables:
    """Batches in place of a table."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = batches

    def rows(self, table: object, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        return (part.select(list(columns)) for part in self._batches)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), st.integers(1, 9), st.lists(st.integers(0, 99)))
def test_a_documents_score_is_that_of_its_best_chunk(documents: list[str], depth: int, places: list[int]) -> None:
    vectors, [query] = unit(len(documents), len(documents)), unit(1, 7)
    tables = FakeTables(list(cut(batch(vectors, documents), places)))
    [found] = nearest_documents(tables, space_table(SPACE), query[None], depth)  # type: ignore[arg-type]
    best: dict[str, float] = {}
    for document, score in zip(documents, (vectors @ query).tolist(), strict=True):
        best[f"p/{document}"] = max(score, best.get(f"p/{document}", -2.0))
    expected = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:depth]
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert np.allclose([score for _, score in found], [score for _, score in expected], atol=1e-6)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake(str(tmp_path))
    for seed, key in enumerate(("a", "b")):
        write(lake, key, unit(300, seed))
    return lake


def write(lake: Lake, key: str, vectors: np.ndarray) -> None:
    """Replace a partition of the space by rows with these vectors."""
    count, table = len(vectors), space_table(SPACE)
    ids = [hash_text(f"{key}{i}{vectors[i].sum()}") for i in range(count)]
    texts = ("uri", "title", "text", "heading_path")
    values = {"partition_key": [key] * count, "chunk_id": ids, "document_id": ["d"] * count, "input_hash": ids}
    values |= {name: ["x"] * count for name in texts}
    values |= {name: list(range(count)) for name in ("chunk_index", "char_start", "char_end", "token_count")}
    values |= {"is_truncated": [False] * count, "embedded_at": [utc_now()] * count}
    values |= {"embedding": vector_array(vectors), "page_start": [None] * count, "page_end": [None] * count}
    rows = pa.RecordBatch.from_pydict(values, schema=table.schema)
    Snapshot(lake).partition(key).replace(table, [rows], Provenance("test"), dimension=DIMENSION)


def by_copy(lake: Lake, kind: CopyKind, query: np.ndarray, k: int) -> list[Hit]:
    tables = Snapshot(lake)
    return Copy(tables, SPACE, kind).nearest(StoredRows(tables, space_table(SPACE)), query, k, [])


@pytest.mark.parametrize("kind", COPY_KINDS)
def test_a_copy_is_made_once_and_then_only_where_the_space_changed(lake: Lake, kind: CopyKind) -> None:
    assert update_copy(Snapshot(lake), SPACE, kind).partitions == 2
    assert update_copy(Snapshot(lake), SPACE, kind).partitions == 0
    write(lake, "b", unit(50, 9))
    done = update_copy(Snapshot(lake), SPACE, kind)
    assert (done.partitions, done.rows) == (1, 350)
    Snapshot(lake).partition("a").replace(space_table(SPACE), [], Provenance("test"))
    assert update_copy(Snapshot(lake), SPACE, kind).rows == 50


@pytest.mark.parametrize("kind", COPY_KINDS)
def test_a_copy_finds_nearly_all_of_the_nearest(lake: Lake, kind: CopyKind) -> None:
    update_copy(Snapshot(lake), SPACE, kind)
    shares = []
    for query in unit(20, 5):
        [exact] = nearest_chunks(Snapshot(lake), space_table(SPACE), query[None], 10, [])
        found = by_copy(lake, kind, query, 10)
        known = {hit.row["chunk_id"]: hit.score for hit in exact}
        assert all(abs(hit.score - known.get(hit.row["chunk_id"], hit.score)) < 1e-6 for hit in found)
        shares.append(len(known.keys() & {hit.row["chunk_id"] for hit in found}) / 10)
    assert np.mean(shares) > 0.95


@pytest.mark.parametrize("kind", COPY_KINDS)
def test_rows_that_a_copy_does_not_have_yet_are_found(lake: Lake, kind: CopyKind) -> None:
    update_copy(Snapshot(lake), SPACE, kind)
    fresh = unit(3, 77)
    write(lake, "c", fresh)
    write(lake, "a", unit(5, 78))
    [best, *_] = by_copy(lake, kind, fresh[0], 5)
    assert best.row["partition_key"] == "c" and best.score > 0.9999


def test_a_missing_copy_is_said_and_removed_with_its_space(lake: Lake) -> None:
    with pytest.raises(LakeError, match="embed-assets derive int8"):
        by_copy(lake, "int8", unit(1, 0)[0], 3)
    with pytest.raises(LakeError, match="a copy needs a space with a table"):
        update_copy(Snapshot(lake), "none-12345678", "int8")
    update_copy(Snapshot(lake), SPACE, "int8")
    assert copies_of(Snapshot(lake), SPACE) == ["int8"]
    write(lake, "d", unit(2, 3))
    update_copies(lake, [SPACE, "none-12345678"])
    assert update_copy(Snapshot(lake), SPACE, "int8").partitions == 0
    remove_space(lake, SPACE)
    assert copies_of(Snapshot(lake), SPACE) == []


def test_codes_say_what_the_vectors_say() -> None:
    vectors = unit(100, 3)
    codes, scales = encode("int8", vectors)
    assert codes.shape == (100, DIMENSION)
    assert np.abs(codes.view(np.int8) * scales[:, None] - vectors).max() < 0.004
    signs, _ = encode("binary", vectors)
    assert signs.shape == (100, 8)  # filled up to 64 bits
    assert ((np.unpackbits(signs, axis=1)[:, :DIMENSION] == 1) == (vectors > 0)).all()
