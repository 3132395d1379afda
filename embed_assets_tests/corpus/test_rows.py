"""Rows as documents: which columns are read, what rows are called, and tables that are folders."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.parsing import read_documents
from embed_assets.corpus.source import Source
from embed_assets.records import Document
from embed_assets.settings import DEFAULT_IGNORE
from embed_assets_tests.corpus.test_parsing import parquet, read, read_file, reason, text


def jsonl(*rows: object) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


def test_a_rejected_row_has_its_id(tmp_path: Path) -> None:
    rows = [
        {"id": "k1", "text": None},
        {"id": "k2", "text": 5},
        {"id": "k3"},
        {"text": None},
        {"id": "k1", "text": "x"},
    ]
    items = read_file(tmp_path, "a.jsonl", jsonl(*rows))
    assert {name: reason(item) for name, item in items.items()} == {
        "a.jsonl#k1": "empty", "a.jsonl#k2": "missing_text", "a.jsonl#k3": "missing_text", "a.jsonl#line4": "empty",
        "a.jsonl#line5": "duplicate_id",
    }  # fmt: skip


def test_no_id_is_both_a_documents_and_a_rejections(tmp_path: Path) -> None:
    items = read_file(tmp_path, "a.jsonl", jsonl({"id": "line2", "text": "one"}) + b"\nno json\n")
    document, rejection = items.values()
    assert text(document) == "one" and reason(rejection) == "invalid_json"
    assert rejection.document_id == "a.jsonl#line2" and document.document_id.startswith("a.jsonl#line2~")
    twice = read_file(tmp_path, "b.jsonl", jsonl({"id": "k", "text": "x"}, {"id": "k", "text": None}))
    assert [name for name in twice if name.startswith("b.")] == ["b.jsonl#k", "b.jsonl#line2"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_columns_inside_columns(tmp_path: Path, name: str) -> None:
    rows = [{"doc": {"text": "One", "meta": {"key": 7}, "n": 1}}, {"doc": {"text": "Two", "meta": {"key": 8}, "n": 2}}]
    data = jsonl(*rows) if name == "a.jsonl" else parquet(doc=[row["doc"] for row in rows])
    options = ParseOptions(text_column="doc.text", id_column="doc.meta.key")
    items = read_file(tmp_path, name, data, options)
    assert {key: text(item) for key, item in items.items()} == {f"{name}#7": "One", f"{name}#8": "Two"}
    first = items[f"{name}#7"]
    assert isinstance(first, Document) and json.loads(first.metadata) == {"doc": {"meta": {}, "n": 1}}


def test_text_as_bytes_and_as_a_list_of_paragraphs(tmp_path: Path) -> None:
    items = read_file(tmp_path, "a.parquet", parquet(id=[1, 2], text=["é".encode(), b"\xff"]))
    assert text(items["a.parquet#1"]) == "é" and reason(items["a.parquet#2"]) == "missing_text"
    items = read_file(tmp_path, "b.parquet", parquet(id=[1, 2], text=[["One.", None, "Two."], []]))
    assert text(items["b.parquet#1"]) == "One.\n\nTwo." and reason(items["b.parquet#2"]) == "empty"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"id,text\n1,x\n"),
        ("a.parquet", parquet(id=[1], text=["x"])),
        ("a.jsonl", jsonl({"id": 1, "text": "x"})),
    ],
)
def test_a_configured_id_column_that_is_missing_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    [item] = read_file(tmp_path, name, data, ParseOptions(id_column="key")).values()
    assert reason(item) == "missing_id" and "EMBED_ID_COLUMN" in item.detail  # type: ignore[union-attr]


def test_a_configured_title_column_that_is_missing_is_an_error_where_files_have_columns(tmp_path: Path) -> None:
    options = ParseOptions(title_column="name")
    assert [reason(i) for i in read_file(tmp_path, "a.csv", b"id,text\n1,x\n", options).values()] == ["missing_title"]
    (tmp_path / "a.csv").unlink()
    assert text(read_file(tmp_path, "a.jsonl", jsonl({"id": 1, "text": "x"}), options)["a.jsonl#1"]) == "x"


def test_the_format_of_texts_in_rows(tmp_path: Path) -> None:
    data = jsonl(
        {"id": 1, "text": "# Pumps\n\nKeep *dry*."}, {"id": 2, "text": "<title>T</title><p>Über 10<sup>6</sup></p>"}
    )
    found = {
        form: list(read_file(tmp_path, "a.jsonl", data, ParseOptions(text_format=form)).values())
        for form in ("text", "markdown", "html")
    }
    kinds = {form: {item.media_type for item in items if isinstance(item, Document)} for form, items in found.items()}
    assert kinds == {"text": {"text/plain"}, "markdown": {"text/markdown"}, "html": {"text/markdown"}}
    page = found["html"][1]
    assert isinstance(page, Document) and (page.text.strip(), page.title) == ("Über 10^6", "T")


def table(root: Path, *versions: dict[str, list[object]]) -> None:
    for columns in versions:
        write_deltalake(str(root), pa.table(columns), mode="overwrite")


def test_a_delta_table_is_read_as_it_is_now(tmp_path: Path) -> None:
    faq = tmp_path / "shop/faq"
    table(faq, {"id": ["a", "b"], "text": ["old", "gone"]}, {"id": ["a", "c"], "text": ["new", "added"]})
    (tmp_path / "shop/note.txt").write_text("a file beside it")
    items = read(tmp_path)
    assert {name: text(item) for name, item in items.items()} == {
        "faq/faq.delta#a": "new", "faq/faq.delta#c": "added", "note.txt": "a file beside it",
    }  # fmt: skip
    assert items["faq/faq.delta#a"].uri == f"file://{faq}"


def test_a_delta_table_changes_its_partitions_version_with_each_commit(tmp_path: Path) -> None:
    table(tmp_path / "faq", {"id": ["a"], "text": ["one"]})
    source = Source(str(tmp_path), "folder")
    before = source.partitions()["faq"].version
    assert source.partitions()["faq"].version == before
    DeltaTable(str(tmp_path / "faq")).delete("id = 'a'")
    assert source.partitions()["faq"].version != before


def test_delta_tables_with_odd_names_and_partitions(tmp_path: Path) -> None:
    place = tmp_path / "my table é 100%"
    rows = pa.table({"id": ["a", "b"], "text": ["x", "y"], "city": ["New York", "Zü%20rich"]})
    write_deltalake(str(place), rows, partition_by=["city"])
    assert {text(item) for item in read(tmp_path).values()} == {"x", "y"}


def test_a_delta_table_with_files_elsewhere_is_a_rejection(tmp_path: Path) -> None:
    table(tmp_path / "outside", {"id": ["s"], "text": ["secret"]})
    table(tmp_path / "source/faq", {"id": ["a"], "text": ["one"]})
    [data] = (tmp_path / "source/faq").glob("*.parquet")
    data.unlink()
    data.symlink_to(next((tmp_path / "outside").glob("*.parquet")))
    [item] = read(tmp_path / "source").values()
    assert reason(item) == "broken_file"


def test_a_folder_that_is_only_named_like_a_log_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a/_delta_log").mkdir(parents=True)
    (tmp_path / "a/_delta_log/note.txt").write_text("Just a name.")
    assert text(read(tmp_path)["_delta_log/note.txt"]) == "Just a name."


def test_a_broken_delta_table_is_a_rejection(tmp_path: Path) -> None:
    table(tmp_path / "faq", {"id": ["a"], "text": ["one"]})
    [log] = (tmp_path / "faq/_delta_log").glob("*.json")
    log.write_text("no log")
    assert reason(read(tmp_path)["faq.delta"]) == "broken_file"


def test_the_source_itself_can_be_a_delta_table(tmp_path: Path) -> None:
    table(tmp_path / "faq", {"id": ["a"], "text": ["one"]})
    assert list(read(tmp_path / "faq")) == ["faq.delta#a"]


def test_a_delta_table_on_remote_storage_is_refused_by_name(tmp_path: Path) -> None:
    table(tmp_path / "faq", {"id": ["a"], "text": ["one"]})
    fsspec.filesystem("memory").put(str(tmp_path / "faq"), "/delta_source/faq", recursive=True)
    source = Source("memory://delta_source", "folder")
    [partition] = source.partitions().values()
    [item] = read_documents(source, partition, ParseOptions())
    assert (partition.key, item.document_id, reason(item)) == ("faq", "faq.delta", "delta_table")


def test_leftovers_of_programs_are_ignored_and_named(tmp_path: Path) -> None:
    for name in ("~$report.docx", "Thumbs.db", "_SUCCESS", "notes.md~", "__MACOSX/a.txt", "thumbs.DB.txt", "kept.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    listing = Source(str(tmp_path), "folder", ignore=DEFAULT_IGNORE).listing()
    assert sorted(f.path for p in listing.partitions.values() for f in p.files) == ["kept.txt", "thumbs.DB.txt"]
    assert listing.hidden == ("Thumbs.db", "_SUCCESS", "__MACOSX", "notes.md~", "~$report.docx")
    everything = Source(str(tmp_path), "folder", ignore="").listing()
    assert sum(len(p.files) for p in everything.partitions.values()) == 7
