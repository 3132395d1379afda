"""`embed-assets search`, and searching and reading from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import duckdb
import numpy as np
import polars as pl
import pytest

import embed_assets
from embed_assets import Searcher, SearchOptions, read_embeddings, search
from embed_assets.errors import LakeError, SettingsError
from embed_assets_tests.conftest import SAMPLE_MODEL, Project, Shelf, topic

GUIDE = "# Guide\n\n## Paint\n\nPaint the wall red.\n\n## Bake\n\nBake the bread for an hour.\n"


def fill(project: Project) -> None:
    """Two partitions, embedded by the real model."""
    project.set(MODEL=SAMPLE_MODEL)
    project.write("a/guide.md", GUIDE)
    project.write("b/try.rst", topic("try"))
    project.write("b/bread.txt", "Bake the bread for one hour.")
    project.sync()


@pytest.fixture
def corpus(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = shelf.take("search", fill, monkeypatch)
    project.set(MODEL=SAMPLE_MODEL)
    return project


def test_a_filter_is_applied_before_ranking(corpus: Project) -> None:
    results = corpus.json("search", "how long to bake bread", "-k", "3", "--where", "partition_key = 'b'")["results"]
    assert len(results) == 3 and {row["partition_key"] for row in results} == {"b"}
    assert results[0]["document_id"] == "bread.txt" and results[0]["title"] == "bread.txt"
    [one] = corpus.json("search", "bread", "--where", "heading_path like '%> Paint'")["results"]
    assert one["text"].endswith("Paint the wall red.") and one["char_end"] > one["char_start"]


def test_a_wrong_filter_is_said_before_the_model_is_loaded(corpus: Project) -> None:
    assert "must name columns" in corpus.json("search", "x", "--where", "yaer = 3", exit_code=1)["error"]


def test_context_widens_a_result(corpus: Project) -> None:
    arguments = ("search", "baking", "-k", "1", "--where", "partition_key = 'a'")
    assert corpus.json(*arguments)["results"][0]["context"] is None
    assert corpus.json(*arguments, "--context", "1")["results"][0]["context"] == GUIDE.strip()
    shown = corpus.run(*arguments, "--context", "section").stdout
    assert "Bake the bread" in shown and "Paint" not in shown
    assert corpus.run(*arguments, "--context", "all").exit_code == 2


def test_distinct_leaves_out_near_duplicates(corpus: Project) -> None:
    both = corpus.json("search", "bake the bread for an hour", "-k", "2")["results"]
    assert {row["partition_key"] for row in both} == {"a", "b"}
    options = ("-k", "2", "--distinct")
    assert len(corpus.json("search", "bake the bread for an hour", *options)["results"]) == 2


def test_several_queries_in_one_call(corpus: Project) -> None:
    lines = [
        "bread",
        "",
        json.dumps({"query_id": "q7", "query": "an exception is raised"}),
        '{"_id": 3, "text": "red"}',
    ]
    (corpus.root / "queries.txt").write_text("\n".join(lines))
    answers = corpus.json("search", "--queries", "queries.txt", "-k", "1")["queries"]
    assert [(row["query_id"], row["query"]) for row in answers] == [
        ("1", "bread"),
        ("q7", "an exception is raised"),
        ("3", "red"),
    ]
    assert [row["results"][0]["document_id"] for row in answers] == ["bread.txt", "try.rst", "guide.md"]
    assert "an exception is raised" in corpus.run("search", "--queries", "queries.txt").stdout
    (corpus.root / "queries.txt").write_text('{"q": 1}')
    assert "line 1" in corpus.json("search", "--queries", "queries.txt", exit_code=1)["error"]
    for wrong in ((), ("x", "--queries", "queries.txt")):
        assert corpus.run("search", *wrong).exit_code == 2


@pytest.fixture
def searcher(corpus: Project) -> Iterator[Searcher]:
    with Searcher() as made:
        yield made


def test_python_finds_what_the_command_finds(corpus: Project) -> None:
    command = corpus.json("search", "raise an exception", "-k", "4", "--context", "1", "--where", "chunk_index > 0")
    found = search("raise an exception", 4, where="chunk_index > 0", context=1)
    assert [hit.text for hit in found] == [row["text"] for row in command["results"]]
    assert [hit.context for hit in found] == [row["context"] for row in command["results"]]
    several = search(["raise an exception", "bread"], 4, where="chunk_index > 0", context=1)
    assert [hit.chunk_id for hit in several[0]] == [hit.chunk_id for hit in found] and len(several) == 2
    assert search([], 4) == []


def test_a_searcher_sees_what_is_new(corpus: Project, searcher: Searcher) -> None:
    options = SearchOptions(1)
    [[before]] = searcher.search(["an apple tree"], options)
    corpus.write("c/tree.txt", "The apple tree has blossoms.")
    corpus.sync()
    [[after]] = searcher.search(["an apple tree"], options)
    assert before.partition_key != after.partition_key == "c"


def test_a_searcher_follows_the_active_space(corpus: Project, searcher: Searcher) -> None:
    [[before]] = searcher.search(["bread"], SearchOptions(1))
    corpus.set(TRUNCATE_DIM="64")
    corpus.sync()
    active = corpus.json("spaces")["active"]
    assert searcher.search(["bread"], SearchOptions(1)) == [[before]]
    other = next(each["space"] for each in corpus.json("spaces")["spaces"] if each["space"] != active)
    [[there]] = searcher.search(["bread"], SearchOptions(1), other)
    assert there.text == before.text and there.score != before.score


def test_vectors_and_rows_are_read_in_several_forms(corpus: Project) -> None:
    rows = {
        (row["partition_key"], row["chunk_id"]): row for row in corpus.rows("partition_key", "chunk_id", "embedding")
    }
    found = read_embeddings()
    ids, matrix = found.numpy()
    assert matrix.shape == (len(rows), 384) and matrix.dtype == np.float32
    for key, chunk_id, vector in zip(
        ids["partition_key"].to_pylist(), ids["chunk_id"].to_pylist(), matrix, strict=True
    ):
        assert np.array_equal(vector, np.array(rows.pop((key, chunk_id))["embedding"], np.float32))
    assert rows == {}
    reader = found.arrow(["text", "partition_key"])
    assert reader.schema.names == ["text", "partition_key"]
    texts = sorted(row["text"] for row in reader.read_all().to_pylist())
    assert sorted(found.polars().select("text").collect()["text"]) == texts
    assert found.table.schema.names == found.arrow().schema.names


def test_a_filter_holds_in_every_form(corpus: Project) -> None:
    found = read_embeddings(where="partition_key = 'a' and chunk_index = 1")
    assert len(found.numpy().matrix) == found.arrow().read_all().num_rows == 1
    frame = found.polars()
    assert frame.select("document_id").collect().to_dicts() == [{"document_id": "guide.md"}]
    assert frame.filter(pl.col("chunk_index") > 5).collect().height == 0
    assert read_embeddings(where="partition_key like '%'").polars().head(2).collect().height == 2
    empty = read_embeddings(where="partition_key = 'none'")
    assert empty.numpy().matrix.size == 0 and empty.polars().collect().height == 0


def test_older_versions_can_be_read(corpus: Project) -> None:
    before = read_embeddings()
    corpus.write("c/new.txt", "A new text.")
    corpus.sync()
    now = read_embeddings()
    assert now.version > before.version
    height = before.polars().collect().height
    assert now.polars().collect().height == height + 1
    assert read_embeddings(version=before.version).arrow(["text"]).read_all().num_rows == height
    with pytest.raises(LakeError, match="version"):
        read_embeddings(version=999)


def test_duckdb_reads_the_arrow_stream(corpus: Project) -> None:
    rows = read_embeddings().arrow(["partition_key", "token_count"])
    query = "select partition_key, count(*), avg(token_count) from rows group by all order by all"
    found = duckdb.sql(query).fetchall()
    assert rows is not None  # the query reads it by its name
    assert [key for key, *_ in found] == ["a", "b"]
    assert sum(count for _, count, _ in found) == len(corpus.rows("chunk_id"))


def test_what_is_wrong_is_said(project: Project, corpus: Project) -> None:
    with pytest.raises(SettingsError, match="must name columns"):
        read_embeddings(where="nope = 1")
    with pytest.raises(LakeError, match="no column 'nope'"):
        read_embeddings().arrow(["nope"])
    with pytest.raises(LakeError, match="no space 'none'"):
        read_embeddings(space="none")
    with pytest.raises(LakeError, match="there are no embeddings in the lake"):
        read_embeddings("elsewhere")
    with pytest.raises(LakeError, match="there are no embeddings in the lake"):
        search("x", lake="elsewhere")


def test_importing_the_package_is_cheap_and_its_names_are_known() -> None:
    code = "import embed_assets, sys; print(len([m for m in sys.modules if m.startswith('embed_assets.')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "0"
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        embed_assets.nope  # type: ignore[attr-defined]  # noqa: B018
