"""Damaged storage is reported in one line, with the file and a remedy, and never built upon."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Field, write_deltalake
from deltalake.schema import PrimitiveType

from embed_assets_tests.conftest import Project, Shelf

TABLES = ("raw_documents", "chunks", "embeddings")


def fill(project: Project) -> None:
    for key in "ab":
        for i in range(3):
            project.write(f"{key}/{i}.md", f"Text {i} of {key}.")
    project.write("a/no.xyz", "rejected")
    project.sync()


@pytest.fixture
def corpus(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Project:
    return shelf.take("damage", fill, monkeypatch)


def table(project: Project, name: str) -> Path:
    lake = project.root / "lake"
    return next((lake / name).iterdir()) if name == "embeddings" else lake / name


def last_entry(folder: Path) -> Path:
    return max((folder / "_delta_log").glob("*.json"))


def _cut(folder: Path) -> Path:
    entry = last_entry(folder)
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    return entry


def _empty(folder: Path) -> Path:
    entry = last_entry(folder)
    entry.write_bytes(b"")
    return entry


def _garbage(folder: Path) -> Path:
    entry = last_entry(folder)
    entry.write_bytes(b"\xff garbage")
    return entry


def _gap(folder: Path) -> Path:
    entry = folder / "_delta_log/00000000000000000001.json"
    entry.unlink()
    return entry


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("damage", [_cut, _empty, _garbage, _gap])
def test_a_damaged_log_is_named_and_nothing_is_written(
    corpus: Project, name: str, damage: Callable[[Path], Path]
) -> None:
    corpus.write("a/0.md", "Another text.")
    folder = table(corpus, name)
    entry = damage(folder)
    before = sorted(p for p in (corpus.root / "lake").rglob("*") if p.is_file())
    for command in ("sync", "verify", "search"):
        result = corpus.run(command, *(["text"] if command == "search" else []))
        if command == "search" and name != "embeddings" and damage is not _empty:
            continue  # it reads only the space's table
        assert result.exit_code == 1, command
        [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert entry.name in line and "restore it" in line and "Traceback" not in result.output
    assert sorted(p for p in (corpus.root / "lake").rglob("*") if p.is_file()) == before


@pytest.mark.parametrize("name", TABLES)
def test_data_without_its_log_is_not_mistaken_for_no_data(corpus: Project, name: str) -> None:
    shutil.rmtree(table(corpus, name) / "_delta_log")
    result = corpus.json("sync", exit_code=1)
    errors = result.get("error") or " ".join(row["error"] or "" for row in result["partitions"].values())
    assert "no _delta_log" in errors and name in errors and "restore" in errors
    assert not (table(corpus, name) / "_delta_log").exists()


def test_a_table_of_another_space_is_refused(corpus: Project) -> None:
    own = table(corpus, "embeddings")
    corpus.set(MODEL="fake:4")
    corpus.sync()
    other = next(p for p in own.parent.iterdir() if p != own)
    shutil.rmtree(own)
    shutil.copytree(other, own)
    corpus.set(MODEL="fake:16")
    for command in ("sync", "verify", "search x"):
        result = corpus.run(*command.split())
        assert result.exit_code == 1 and "must be of the space" in result.stderr


def test_a_foreign_column_is_not_damage(corpus: Project) -> None:
    folder = corpus.root / "lake/embeddings" / corpus.pipeline().model.space.name
    DeltaTable(str(folder)).alter.add_columns([Field("label", PrimitiveType("string"))])
    corpus.write("a/new.md", "A text that is new.")
    assert corpus.sync()["embedded"] == 1
    assert corpus.json("verify")["ok"] and corpus.json("search", "text", "-k", "1")["results"]
    assert pa.table(DeltaTable(str(folder)).scan()).column("label").null_count == len(corpus.rows("chunk_id"))


def test_a_table_with_other_columns_is_refused(corpus: Project) -> None:
    folder = table(corpus, "chunks")
    rows = pa.table(DeltaTable(str(folder)).scan()).drop_columns(["heading_path"])
    write_deltalake(str(folder), rows, mode="overwrite", schema_mode="overwrite", partition_by=["partition_key"])
    result = corpus.run("sync")
    assert result.exit_code == 1 and "it has lost heading_path" in result.stderr


def _alter_texts(folder: Path) -> None:
    """Change the texts and nothing else, hashes included, as faulty memory or an intruder might."""
    rows = pa.table(DeltaTable(str(folder)).scan())
    texts = pa.array([text.replace("Text", "Next") for text in rows.column("text").to_pylist()])
    changed = rows.set_column(rows.schema.get_field_index("text"), "text", texts)
    write_deltalake(str(folder), changed, mode="overwrite", partition_by=["partition_key"])


@pytest.mark.parametrize(("name", "kind"), [("raw_documents", "altered_documents"), ("chunks", "altered_chunks")])
def test_an_altered_text_is_found_and_never_recorded_as_good(corpus: Project, name: str, kind: str) -> None:
    good = {row["text"] for row in corpus.rows("text")}
    _alter_texts(table(corpus, name))
    found = corpus.json("verify", exit_code=1)["partitions"]
    assert {key: gaps[kind] for key, gaps in found.items()} == {"a": 3, "b": 3}
    corpus.json("verify", "--repair", exit_code=1)
    stale = [row for row in corpus.json("plan")["partitions"] if row["assets"][name]["state"] == "stale"]
    assert {row["partition_key"] for row in stale} == {"a", "b"}
    corpus.sync()
    assert corpus.json("verify")["ok"]
    assert {row["text"] for row in corpus.rows("text")} == good
    assert {row["text"] for row in corpus.rows("text", table=name)} == good


@pytest.mark.parametrize("name", ["raw_documents", "chunks", "embeddings", "rejected_documents"])
@pytest.mark.parametrize("how", ["deleted", "truncated", "garbled"])
def test_a_lost_or_damaged_data_file_is_found_and_repaired(corpus: Project, name: str, how: str) -> None:
    before = corpus.rows("text")
    folder = table(corpus, name) / "partition_key=a"
    for file in folder.glob("*.parquet"):
        if how == "deleted":
            file.unlink()
        elif how == "truncated":
            file.write_bytes(file.read_bytes()[:-30])
        else:
            data = bytearray(file.read_bytes())
            data[8 : len(data) // 2] = bytes(len(data) // 2 - 8)
            file.write_bytes(data)
    assert list(corpus.json("verify", "--repair", exit_code=1)["partitions"]) == ["a"]
    corpus.sync()
    assert corpus.json("verify")["ok"]
    assert sorted(r["text"] for r in corpus.rows("text")) == sorted(r["text"] for r in before)
    assert len(corpus.rows("reason", table="rejected_documents")) == 1


def test_forget_does_not_touch_the_lake_of_another_corpus(corpus: Project) -> None:
    shutil.rmtree(corpus.landing / "b")
    corpus.set(NAME_PREFIX="other")
    result = corpus.run("forget", "b")
    assert result.exit_code == 1 and "a lake holds one corpus" in result.stderr
    assert len(corpus.rows("chunk_id")) == 6


def test_unregistered_partitions_are_reported_and_left_alone(corpus: Project) -> None:
    """The source may be the wrong one, so nothing may be emptied."""
    shutil.rmtree(corpus.root / ".dagster")
    shutil.rmtree(corpus.landing / "b")
    result = corpus.run("sync")
    assert "1 partitions of the lake are neither in the source nor in Dagster ('b')" in result.stderr
    assert len(corpus.rows("chunk_id")) == 6
    corpus.json("forget", "b")
    assert len(corpus.rows("chunk_id")) == 3
    assert "neither" not in corpus.run("sync").stderr


@pytest.mark.parametrize("damage", [b"", b"no database" * 500])
def test_a_damaged_instance_is_a_one_line_error_with_a_remedy(corpus: Project, damage: bytes) -> None:
    index = next((corpus.root / ".dagster").rglob("index.db"))
    index.write_bytes(damage)
    assert "nothing is embedded again" in corpus.json("plan", exit_code=1)["error"]
    shutil.rmtree(corpus.root / ".dagster")
    assert corpus.sync()["embedded"] == 0


def test_a_full_disk_is_reported_and_nothing_is_lost(project: Project) -> None:
    """Simulates a full disk by a limit on file sizes in a separate process."""
    import subprocess
    import sys

    rows = "\n".join(json.dumps({"text": f"Row {i}. " + "words and words " * 20}) for i in range(4000))
    project.write("a/rows.jsonl", rows)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)); "
    code = limit + "from embed_assets.cli import main; main(['sync', '--json'])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert "free some space" in process.stdout and "Traceback" not in process.stderr
    project.sync()
    assert project.json("verify")["ok"]
    assert len(project.rows("chunk_id")) == 4000


@pytest.mark.parametrize("source", ["lake", "lake/chunks", "lake/embeddings/x"])
def test_the_lake_is_refused_as_a_source(project: Project, source: str) -> None:
    (project.root / source).mkdir(parents=True)
    project.set(SOURCE=source)
    result = project.run("sync")
    assert result.exit_code == 1 and "must not be the lake" in result.stderr
