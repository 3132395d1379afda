"""Documents that did not change are neither read nor split again, however their partition changes.

The tests tamper with files in a way that their listing does not show: whoever reads one again finds other words.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from embed_assets.corpus.source import Source
from embed_assets.definitions import definitions_over
from embed_assets.defs.instance import open_instance
from embed_assets.defs.sync import SyncRequest, run_sync
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED
from embed_assets.lake.writer import Provenance
from embed_assets.records import Rejection, rejection_batch, utc_now
from embed_assets.stages.changes import ChangeFinder, Changes
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import DatedListing
from embed_assets_tests.conftest import Project

NAMES = ("one", "two", "three", "four", "sub/five")


def tamper(project: Project, *paths: str) -> None:
    """Change the words of files without a trace in the listing."""
    for path in paths:
        file = project.landing / path
        stat = file.stat()
        file.write_bytes(file.read_bytes().replace(b"original", b"tampered"))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def touch(project: Project, *paths: str) -> None:
    for path in paths:
        stat = (project.landing / path).stat()
        os.utime(project.landing / path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


def texts(project: Project, table: str = "embeddings") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in project.rows("document_id", "text", table=table):
        found.setdefault(row["document_id"], []).append(row["text"])
    return {name: sorted(words) for name, words in found.items()}


def commits(project: Project, table: str) -> list[dict[str, Any]]:
    """What the commits that wrote rows say of themselves, newest first."""
    history = DeltaTable(f"{project.pipeline().lake.root}/{table}").history()
    return [commit["embed_assets"] for commit in history if "embed_assets" in commit]


@pytest.fixture
def corpus(project: Project) -> Project:
    """A synced corpus of five documents in one partition."""
    for name in NAMES:
        project.write(f"p/{name}.md", f"# {name}\n\nThe original words of {name}.")
    assert project.sync()["embedded"] == len(NAMES)
    return project


@pytest.fixture(params=["0", "2"])
def processes(request: pytest.FixtureRequest, project: Project) -> None:
    project.set(PREPARE_PROCESSES=request.param)


def edit(project: Project) -> None:
    project.write("p/two.md", "# two\n\nNew words.")


def add(project: Project) -> None:
    project.write("p/a new one.md", "Words of a new document.")


def delete(project: Project) -> None:
    (project.landing / "p/two.md").unlink()


def rename(project: Project) -> None:
    (project.landing / "p/two.md").rename(project.landing / "p/zwei.md")


def reject(project: Project) -> None:
    project.write("p/two.md", b"")


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("change", "embedded", "dropped"),
    [(edit, 1, 1), (add, 1, 0), (delete, 0, 1), (rename, 0, 1), (reject, 0, 1)],
)
def test_only_what_changed_is_read(
    corpus: Project, change: Callable[[Project], None], embedded: int, dropped: int
) -> None:
    before = texts(corpus)
    tamper(corpus, *(f"p/{name}.md" for name in NAMES if name != "two"))
    change(corpus)
    plan = corpus.json("plan", "--count")
    answer = corpus.sync()
    assert (answer["embedded"], answer["dropped"]) == (embedded, dropped)
    assert (plan["chunks_to_embed"], plan["chunks_to_drop"]) == (embedded, dropped)
    after = texts(corpus)
    assert all(after[f"{name}.md"] == before[f"{name}.md"] for name in NAMES if name != "two")
    assert set(after) == set(texts(corpus, "raw_documents")) == set(texts(corpus, "chunks"))
    partition = answer["partitions"]["p"]
    assert partition["documents"] == len(after) == partition["chunks"]
    assert partition["reused"] == len(after) - embedded
    assert partition["rejected"] == (change is reject)
    assert corpus.json("verify")["ok"]
    assert corpus.sync()["partitions"]["p"]["state"] == "fresh"


def test_the_tables_are_those_of_a_fresh_start(corpus: Project) -> None:
    for change in (edit, add, rename, reject):
        change(corpus)
        corpus.sync()
    versions = {table: commits(corpus, table)[0]["data_version"] for table in ("raw_documents", "chunks")}
    columns = ("document_id", "text", "uri", "title", "char_start", "input_hash", "embedding")
    grown = sorted(map(str, corpus.rows(*columns)))
    corpus.set(LAKE="fresh")
    os.rename(".dagster", "kept")
    corpus.sync()
    assert sorted(map(str, corpus.rows(*columns))) == grown
    assert versions == {table: commits(corpus, table)[0]["data_version"] for table in versions}


def rows_file(project: Project, rows: Sequence[dict[str, str]]) -> None:
    project.write("p/rows.jsonl", "\n".join(map(json.dumps, rows)))


@pytest.mark.usefixtures("processes")
def test_of_a_changed_file_of_rows_only_changed_rows_are_split(corpus: Project) -> None:
    rows = [{"id": f"r{i}", "text": f"The original words of row {i}."} for i in range(20)]
    rows_file(corpus, rows)
    corpus.sync()
    tables = [CHUNK_TABLE, corpus.pipeline().embeddings_table]
    with Snapshot(corpus.pipeline().lake) as snapshot:
        files = [snapshot.partition("p").state(table).files for table in tables]
    rows[7] = {"id": "r7", "text": "Other words."}
    del rows[12]
    rows_file(corpus, rows)
    answer = corpus.sync()
    assert (answer["embedded"], answer["dropped"]) == (1, 2)
    assert texts(corpus)["rows.jsonl#r7"] == ["Other words."]
    assert "rows.jsonl#r12" not in texts(corpus)
    assert len(texts(corpus)) == len(NAMES) + 19
    with Snapshot(corpus.pipeline().lake) as snapshot:
        assert [snapshot.partition("p").state(table).files for table in tables] != files
    assert corpus.json("verify")["ok"]
    # All rows of the file name its new version, so that it is kept when another file changes.
    tamper(corpus, "p/rows.jsonl", "p/one.md")
    edit(corpus)
    corpus.sync()
    assert texts(corpus)["rows.jsonl#r3"] == ["The original words of row 3."]
    assert len(texts(corpus)) == len(NAMES) + 19


def test_files_that_were_only_touched_are_read_and_not_split(corpus: Project) -> None:
    touch(corpus, *(f"p/{name}.md" for name in NAMES))
    edit(corpus)
    answer = corpus.sync()
    assert (answer["embedded"], answer["dropped"], answer["partitions"]["p"]["chunks"]) == (1, 1, 5)
    tamper(corpus, "p/one.md", "p/three.md")  # their new times were noted
    corpus.write("p/four.md", "Yet other words.")
    corpus.sync()
    assert texts(corpus)["one.md"] == ["# one\n\nThe original words of one."]
    touch(corpus, "p/three.md", "p/one.md")
    assert corpus.sync()["embedded"] == 2


def test_rejected_files_stay_rejected_unless_they_change(corpus: Project) -> None:
    corpus.write("p/empty.md", b"")
    corpus.write("p/mixed.jsonl", '{"text": "The original words."}\nno json\n')
    answer = corpus.sync()["partitions"]["p"]
    assert (answer["documents"], answer["rejected"]) == (6, 2)
    with Snapshot(corpus.pipeline().lake) as snapshot:
        version = snapshot.version(REJECTED)
    tamper(corpus, "p/mixed.jsonl")
    edit(corpus)
    answer = corpus.sync()["partitions"]["p"]
    assert (answer["documents"], answer["rejected"], answer["embedded"]) == (6, 2, 1)
    with Snapshot(corpus.pipeline().lake) as snapshot:
        assert snapshot.version(REJECTED) == version
    corpus.write("p/empty.md", "Not empty any more.")
    answer = corpus.sync()["partitions"]["p"]
    assert (answer["documents"], answer["rejected"]) == (7, 1)
    (corpus.landing / "p/mixed.jsonl").unlink()
    answer = corpus.sync()["partitions"]["p"]
    assert (answer["documents"], answer["rejected"]) == (6, 0)
    assert corpus.rows("document_id", table="rejected_documents") == []


def test_text_that_moves_between_documents_is_not_embedded_again(corpus: Project) -> None:
    corpus.write("p/two.md", (corpus.landing / "p/one.md").read_bytes())
    answer = corpus.sync()
    assert (answer["embedded"], answer["dropped"]) == (0, 1)
    assert texts(corpus)["two.md"] == texts(corpus)["one.md"]


def test_the_same_rows_in_other_files_are_still_kept(corpus: Project) -> None:
    """As compaction leaves them."""
    pipeline = corpus.pipeline()
    for spec in (RAW, CHUNK_TABLE, pipeline.embeddings_table):
        table = DeltaTable(pipeline.lake.uri(spec))
        write_deltalake(table, pa.table(table.scan()), mode="overwrite", predicate="partition_key = 'p'")
    tamper(corpus, "p/one.md")
    edit(corpus)
    assert corpus.sync()["embedded"] == 1
    assert texts(corpus)["one.md"] == ["# one\n\nThe original words of one."]


@pytest.mark.parametrize("table", ["raw_documents", "chunks", "embeddings"])
def test_a_partition_that_something_else_replaced_is_rebuilt_as_a_whole(corpus: Project, table: str) -> None:
    pipeline = corpus.pipeline()
    specs = {spec.kind: spec for spec in (RAW, CHUNK_TABLE, pipeline.embeddings_table)}
    delta = DeltaTable(pipeline.lake.uri(specs[table]))
    delta.delete("document_id = 'one.md'")
    edit(corpus)
    corpus.sync()
    assert set(texts(corpus, table)) == {f"{name}.md" for name in NAMES}
    assert corpus.json("verify")["ok"]


def test_after_a_run_that_ended_between_two_tables_all_is_consistent(corpus: Project) -> None:
    """The record of the chunks is lost, as if the run was killed before it."""
    edit(corpus)
    corpus.write("p/one.md", "Other words for the first.")
    corpus.sync()
    forget_last(corpus, "chunks", "embeddings")
    corpus.write("p/three.md", "Other words for the third.")
    answer = corpus.sync()
    assert answer["embedded"] == 1
    assert texts(corpus)["three.md"] == ["Other words for the third."]
    assert len(texts(corpus)) == len(texts(corpus, "chunks")) == 5
    assert corpus.json("verify")["ok"]


def forget_last(project: Project, *assets: str) -> None:
    """Delete the latest materialization of the partition from Dagster's event log."""
    for database in Path(".dagster").rglob("index.db"):
        with sqlite3.connect(database) as connection:
            for asset in assets:
                connection.execute(
                    "DELETE FROM event_logs WHERE id = (SELECT max(id) FROM event_logs WHERE "
                    "dagster_event_type = 'ASSET_MATERIALIZATION' AND asset_key LIKE ?)",
                    (f'%"{asset}"%',),
                )


def test_a_new_parser_reads_everything_again(corpus: Project) -> None:
    tamper(corpus, "p/one.md")
    corpus.set(MAX_FILE_BYTES="1000000")
    edit(corpus)
    corpus.sync()
    assert texts(corpus)["one.md"] == ["# one\n\nThe tampered words of one."]


def test_a_changed_title_reaches_the_embeddings(corpus: Project) -> None:
    corpus.write("p/two.md", "# Another title\n\nThe original words of two.")
    corpus.sync()
    titles = {row["document_id"]: row["title"] for row in corpus.rows("document_id", "title")}
    assert titles["two.md"] == "Another title"
    assert titles["one.md"] == "one"


def test_pictures_are_drawn_of_all_of_the_partition(corpus: Project) -> None:
    """Ten chunks are enough for a picture, and the last ones are copies: nothing is embedded."""
    for i in range(4):
        corpus.write(f"p/copy{i}.md", (corpus.landing / "p/one.md").read_bytes())
    corpus.sync()
    corpus.write("p/last.md", (corpus.landing / "p/one.md").read_bytes())
    assert corpus.sync()["embedded"] == 0
    with open_instance() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("embeddings"))
    assert event is not None and event.asset_materialization is not None
    assert {"token_lengths", "map"} <= set(event.asset_materialization.metadata)


def test_a_touched_file_of_which_a_row_was_rejected_loses_nothing(corpus: Project) -> None:
    """The two tables are written one after the other, and documents only if their content changed."""
    corpus.write("p/mixed.jsonl", '{"id": "good", "text": "The original words."}\nno json\n')
    corpus.sync()
    touch(corpus, "p/mixed.jsonl")
    corpus.write("p/junk.bin", b"no text")
    assert corpus.sync()["partitions"]["p"]["rejected"] == 2
    edit(corpus)
    answer = corpus.sync()["partitions"]["p"]
    assert (answer["documents"], answer["rejected"], answer["chunks"]) == (6, 2, 6)
    assert texts(corpus)["mixed.jsonl#good"] == ["The original words."]


@pytest.mark.parametrize("table", ["raw_documents", "rejected_documents", "chunks"])
def test_a_damaged_file_costs_its_partition_a_whole_reading_and_no_other_anything(corpus: Project, table: str) -> None:
    corpus.write("p/junk.bin", b"no text")
    corpus.write("q/one.md", "Of another partition.")
    corpus.sync()
    [file, *_] = (Path("lake") / table / "partition_key=p").glob("*.parquet")
    file.unlink()
    edit(corpus)
    corpus.write("q/one.md", "Other words of another partition.")
    corpus.json("plan", "--count")
    answer = corpus.sync()["partitions"]
    assert answer["q"]["state"] == answer["p"]["state"] == "materialized"
    assert (answer["p"]["documents"], answer["p"]["rejected"], answer["p"]["chunks"]) == (5, 1, 5)
    assert corpus.json("verify")["ok"]


def test_what_may_be_readable_the_next_time_is_read_again(corpus: Project) -> None:
    """A file of rows, one of which was rejected for lack of memory: such rejections name no version of the file."""
    corpus.write("p/rows.jsonl", '{"text": "The original words."}')
    corpus.sync()
    pipeline = corpus.pipeline()
    source, lake = pipeline.corpus.source, pipeline.lake
    [file] = [file for file in source.partitions()["p"].files if file.path == "p/rows.jsonl"]
    finder = ChangeFinder(Snapshot(lake), source, lambda partition: True)
    assert [f.path for f in found(finder, source).files.files] == []
    rejection = Rejection("rows.jsonl#2", source.uri(file), "too_costly", "it took too long")
    rows = [rejection_batch([rejection], "p", utc_now())]
    Snapshot(lake).partition("p").replace(REJECTED, rows, Provenance("run"))
    finder = ChangeFinder(Snapshot(lake), source, lambda partition: True)
    assert [f.path for f in found(finder, source).files.files] == ["p/rows.jsonl"]
    assert len(found(finder, source).stale) == 1


def found(finder: ChangeFinder, source: Source) -> Changes:
    changes = finder.find(source.partitions()["p"])
    assert changes is not None
    return changes


@pytest.mark.long
def test_many_texts_that_are_there_already(corpus: Project) -> None:
    """As in a daily dump: delta-rs can't take a predicate with so many values."""
    rows = "\n".join(json.dumps({"id": i, "text": f"row {i}"}) for i in range(28_000))
    corpus.write("p/monday.jsonl", rows)
    corpus.sync()
    corpus.write("p/tuesday.jsonl", rows)
    answer = corpus.sync()
    assert (answer["embedded"], answer["partitions"]["p"]["chunks"]) == (0, 56_005)


def test_a_listing_from_before_another_run_is_not_used(corpus: Project) -> None:
    pipeline = corpus.pipeline()
    early = DatedListing.of(pipeline)
    corpus.write("p/late.md", "Words that the listing does not know.")
    corpus.sync()
    (corpus.landing / "p/two.md").write_text("Words of neither.")

    class Silent:
        def progress(self, line: str, share: float) -> None: ...

        def news(self, line: str) -> None: ...

        def finished(self, outcome: PartitionOutcome, share: float) -> None: ...

    with open_instance() as instance:
        run_sync(instance, pipeline, partial(definitions_over, pipeline), Silent(), SyncRequest(listing=early))
    assert texts(corpus)["late.md"] == ["Words that the listing does not know."]
