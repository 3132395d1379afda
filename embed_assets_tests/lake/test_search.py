"""Search over real tables, against brute force: with filters, from mapped copies, by small copies, and widened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embed_assets.lake.copies import Copy, update_copy
from embed_assets.lake.filters import parse_filter
from embed_assets.lake.row_source import MappedRows, RowSource, StoredRows
from embed_assets.lake.search import Search, SearchResult, search
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.spaces import space_table
from embed_assets.lake.tables import RAW, Lake, is_one_of
from embed_assets.lake.widening import Width, widened
from embed_assets.lake.writer import Provenance
from embed_assets.records import CopyKind, chunk_ids, hash_text, utc_now

NAME = "model-12345678"
SPACE = space_table(NAME)
RUN = Provenance("run")
Row = dict[str, Any]


def unit(count: int, seed: int, dimension: int = 8) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def rows_of(key: str, vectors: np.ndarray, texts: Sequence[str] | None = None, per_document: int = 10) -> list[Row]:
    """A row per vector; headings and documents repeat."""
    made = []
    for i, vector in enumerate(vectors):
        text = texts[i] if texts else f"text {i}"
        document = f"d{i // per_document}"
        [chunk_id] = chunk_ids(document, [hash_text(text)])
        made.append(
            {
                "partition_key": key,
                "chunk_id": chunk_id,
                "document_id": document,
                "chunk_index": i % per_document,
                "uri": f"s3://b/{key}/{document}",
                "title": f"Title {i % 3}",
                "text": text,
                "heading_path": f"H{i % 4}",
                "char_start": i,
                "char_end": i + 1,
                "token_count": i % 7,
                "is_truncated": i % 2 == 0,
                "input_hash": hash_text(text),
                "embedding": vector.tolist(),
                "embedded_at": utc_now(),
                "page_start": None,
                "page_end": None,
            }
        )
    return made


def write(lake: Lake, key: str, rows: list[Row]) -> None:
    batch = pa.RecordBatch.from_pylist(rows, schema=SPACE.schema)
    dimension = len(rows[0]["embedding"]) if rows else None
    Snapshot(lake).partition(key).replace(SPACE, [batch] if rows else [], RUN, dimension=dimension)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, list[Row]]:
    """A lake with three partitions and copies, and its rows."""
    lake = Lake(str(tmp_path_factory.mktemp("lake")))
    rows = [row for seed, key in enumerate("abc") for row in rows_of(key, unit(120, seed))]
    for key in "abc":
        write(lake, key, [row for row in rows if row["partition_key"] == key])
    update_copy(Snapshot(lake), NAME, "int8")
    update_copy(Snapshot(lake), NAME, "binary")
    return lake, rows


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> MappedRows:
    return MappedRows(tmp_path_factory.mktemp("mapped"))


CONDITIONS = [
    "partition_key = 'b'",
    "partition_key in ('a', 'c')",
    "partition_key = 'a' and partition_key = 'b'",
    "document_id = 'd3'",
    "uri like 's3://b/a/%'",
    "heading_path = 'H1'",
    "token_count >= 3 and not is_truncated = true",
    "title = 'Title 2' or chunk_index = 0",
    "page_start is null",
    "page_start >= 1",
]
TRUTHS = [
    lambda r: r["partition_key"] == "b",
    lambda r: r["partition_key"] in "ac",
    lambda r: False,
    lambda r: r["document_id"] == "d3",
    lambda r: r["partition_key"] == "a",
    lambda r: r["heading_path"] == "H1",
    lambda r: r["token_count"] >= 3 and not r["is_truncated"],
    lambda r: r["title"] == "Title 2" or r["chunk_index"] == 0,
    lambda r: True,
    lambda r: False,
]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, len(CONDITIONS) - 1), min_size=1, max_size=2),
    st.integers(1, 30),
    st.integers(0, 1000),
    st.booleans(),
)
def test_results_are_the_best_of_the_rows_that_match(
    filled: tuple[Lake, list[Row]], mapped: MappedRows, chosen: list[int], k: int, seed: int, is_mapped: bool
) -> None:
    lake, rows = filled
    queries = unit(2, seed)
    text = " and ".join(f"({CONDITIONS[i]})" for i in chosen)
    matching = [row for row in rows if all(TRUTHS[i](row) for i in chosen)]
    with Snapshot(lake) as tables:
        source: RowSource = mapped.of(tables, SPACE) if is_mapped else StoredRows(tables, SPACE)
        found = search(source, queries, Search(k, parse_filter(text, SPACE.schema)))
    for query, results in zip(queries, found, strict=True):
        scores = sorted((float(np.dot(row["embedding"], query)) for row in matching), reverse=True)[:k]
        assert np.allclose([result.score for result in results], scores, atol=1e-6)
        known = {(row["partition_key"], row["document_id"], row["chunk_id"]): row for row in matching}
        for result in results:
            row = known.pop((result.partition_key, result.document_id, result.chunk_id))
            assert (result.text, result.uri, result.char_start) == (row["text"], row["uri"], row["char_start"])


@pytest.mark.parametrize("kind", ["int8", "binary"])
@pytest.mark.parametrize("place", range(len(CONDITIONS)))
def test_a_search_by_a_copy_finds_only_rows_that_match(
    filled: tuple[Lake, list[Row]], kind: CopyKind, place: int
) -> None:
    lake, rows = filled
    [query], keep = unit(1, 5), parse_filter(CONDITIONS[place], SPACE.schema)
    matching = [row for row in rows if TRUTHS[place](row)]
    with Snapshot(lake) as tables:
        [found] = search(StoredRows(tables, SPACE), query[None], Search(5, keep), Copy(tables, NAME, kind))
    best = sorted((float(np.dot(row["embedding"], query)) for row in matching), reverse=True)[:5]
    assert np.allclose([result.score for result in found], best, atol=1e-6)


def texts_of(results: Sequence[SearchResult]) -> list[str]:
    return [result.text for result in results]


def test_mapped_rows_are_those_of_the_newest_version(tmp_path: Path) -> None:
    lake, mapped = Lake(str(tmp_path / "lake")), MappedRows(tmp_path)
    query = unit(1, 9)

    def found() -> list[str]:
        with Snapshot(lake) as tables:
            return sorted(texts_of(search(mapped.of(tables, SPACE), query, Search(9))[0]))

    assert found() == []
    write(lake, "a", rows_of("a", unit(2, 1), ["one", "two"]))
    write(lake, "b", rows_of("b", unit(1, 2), ["three"]))
    assert found() == ["one", "three", "two"]
    files = set(tmp_path.glob("*.arrow"))
    assert len(files) == 2
    write(lake, "b", rows_of("b", unit(1, 3), ["four"]))
    assert found() == ["four", "one", "two"]
    assert len(files & set(tmp_path.glob("*.arrow"))) == 1  # only the changed partition was copied again
    write(lake, "a", [])
    assert found() == ["four"] and len(list(tmp_path.glob("*.arrow"))) == 1


def test_a_distinct_search_leaves_out_what_repeats_a_better_result(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    degrees = np.radians([*range(0, 50, 10), 50, 50, 50, 90])
    vectors = np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32)
    texts = [*(f"text {i}" for i in range(5)), *["same"] * 3, "far"]
    write(lake, "a", rows_of("a", vectors, texts, per_document=1))
    query, source = np.array([[1, 0]], np.float32), StoredRows(Snapshot(lake), SPACE)

    def found(k: int, distinct: float) -> list[str]:
        return texts_of(search(source, query, Search(k, distinct=distinct))[0])

    # The cosine of 10 degrees is 0.985, that of 20 degrees 0.940.
    assert found(3, 0.95) == ["text 0", "text 2", "text 4"]
    assert found(9, 0.95) == ["text 0", "text 2", "text 4", "far"]
    assert found(9, 0.999) == [*texts[:6], "far"]


def test_chunks_of_the_same_id_are_told_apart(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    for seed, key in enumerate("ab"):
        write(lake, key, rows_of(key, unit(1, seed), ["same"]))
    [found] = search(StoredRows(Snapshot(lake), SPACE), unit(1, 3), Search(5))
    assert sorted((result.partition_key, result.uri) for result in found) == [
        ("a", "s3://b/a/d0"),
        ("b", "s3://b/b/d0"),
    ]


def test_a_search_reads_one_version_despite_a_concurrent_writer(tmp_path: Path) -> None:
    """All rows are replaced between the scan of the vectors and the lookup of the texts."""

    class Busy(Lake):
        """A lake whose table is replaced right after each time it is opened."""

        def open_path(self, path: str, version: int | None = None) -> DeltaTable | None:
            opened = super().open_path(path, version)
            write(lake, "a", rows_of("a", unit(30, 1), [f"text {next(counter)}" for _ in range(30)]))
            return opened

    counter: Iterator[int] = iter(range(100_000))
    lake = Lake(str(tmp_path / "lake"))
    write(lake, "a", rows_of("a", unit(30, 1)))
    for _ in range(2):
        [found] = search(StoredRows(Snapshot(Busy(lake.root)), SPACE), unit(1, 2), Search(5))
        assert len(found) == 5 and all(result.text.startswith("text ") for result in found)


def test_the_texts_of_results_are_read_only_from_their_partitions(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    for i in range(5):
        write(lake, f"p{i}", rows_of(f"p{i}", unit(4, i)))
    delta = lake.open(SPACE)
    assert delta is not None
    predicate = f"{is_one_of('partition_key', ['p1', 'p3'])} AND {is_one_of('chunk_id', ['x'])}"
    pruned = delta.file_uris(file_pruning_predicate=predicate)
    assert sorted(uri.split("partition_key=")[1][:2] for uri in pruned) == ["p1", "p3"]


SECTIONS = [
    ("Guide", "# Guide\n"),
    ("Guide > A", "## A\nfirst"),
    ("Guide > A", "second"),
    ("Guide > A > B", "### B"),
    ("C", "# C"),
]


@pytest.mark.parametrize(
    "width, hit, expected",
    [
        (0, "second", "second"),
        (1, "second", "## A\nfirst\n\nsecond\n\n### B"),
        (1, "# C", "### B\n\n# C"),
        (9, "# C", "\n\n".join(text for _, text in SECTIONS)),
        ("section", "second", "## A\nfirst\n\nsecond\n\n### B"),
        ("section", "### B", "### B"),
        ("section", "# Guide\n", "# Guide\n\n\n## A\nfirst\n\nsecond\n\n### B"),
        ("section", "# C", "# C"),
    ],
)
def test_results_are_widened_to_the_documents_own_text(tmp_path: Path, width: Width, hit: str, expected: str) -> None:
    lake = Lake(str(tmp_path))
    whole = "\n\n".join(text for _, text in SECTIONS)
    rows = rows_of("a", unit(len(SECTIONS), 0), [text for _, text in SECTIONS])
    for row, (path, text) in zip(rows, SECTIONS, strict=True):
        start = whole.index(text)
        row |= {"heading_path": path, "char_start": start, "char_end": start + len(text)}
    write(lake, "a", rows)
    write_document(lake, "a", whole)
    keep = parse_filter(f"text = '{hit}'", SPACE.schema)
    with Snapshot(lake) as tables:
        source = StoredRows(tables, SPACE)
        found = search(source, unit(1, 7), Search(1, keep))
        [[result]] = widened(source, tables, found, width)
        assert (result.text, result.context) == (hit, expected)
    write_document(lake, "a", "changed " + whole)
    with Snapshot(lake) as tables:
        source = StoredRows(tables, SPACE)
        [[result]] = widened(source, tables, search(source, unit(1, 7), Search(1, keep)), width)
        assert result.context == hit


def write_document(lake: Lake, key: str, text: str) -> None:
    document = {
        "partition_key": key,
        "document_id": "d0",
        "uri": "u",
        "media_type": "text/markdown",
        "title": "",
        "text": text,
        "content_hash": hash_text(text),
        "byte_size": 1,
        "modified_at": utc_now(),
        "metadata": "{}",
    }
    batch = pa.RecordBatch.from_pylist([document], schema=RAW.schema)
    Snapshot(lake).partition(key).replace(RAW, [batch], RUN)
