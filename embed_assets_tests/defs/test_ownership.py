"""Rows that something else replaced are not fresh any more, and a lake holds one corpus."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from embed_assets.definitions import definitions_over
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import ALLOW_EMPTY_TAG, ASSETS
from embed_assets.defs.staleness import load_history
from embed_assets.errors import LakeError
from embed_assets.lake.maintenance import maintain
from embed_assets.lake.owner import Owner
from embed_assets.lake.tables import RAW, Lake
from embed_assets_tests.conftest import Project
from embed_assets_tests.defs.dagster_runs import definitions, latest

REPLACED = "its rows are not those that were recorded: somebody else replaced them"


@pytest.fixture
def instance(project: Project) -> Iterator[dg.DagsterInstance]:
    with open_instance() as opened:
        yield opened


def states(project: Project, key: str = "a") -> dict[str, Any]:
    rows = {row["partition_key"]: row["assets"] for row in project.json("plan")["partitions"]}
    return {asset: (found["state"], found["reasons"]) for asset, found in rows[key].items()}


def use_instance(project: Project, name: str) -> None:
    """Switch to another Dagster instance, on the same source and lake."""
    home = project.root / name
    if not home.exists():
        home.mkdir()
        text = (project.root / "dagster.yaml").read_text()
        (home / "dagster.yaml").write_text(text.replace(".dagster", str(home)))
    project.monkeypatch.setenv("DAGSTER_HOME", str(home))


def test_a_second_corpus_on_a_lake_is_refused(project: Project) -> None:
    project.write("docs/one.md", "The first corpus.")
    project.sync()
    second = project.root / "second"
    (second / "docs").mkdir(parents=True)
    (second / "docs/other.md").write_text("The second corpus.")
    project.set(SOURCE=str(second))
    for command in (["sync"], ["plan"], ["discover"], ["verify"], ["forget", "docs"]):
        result = project.run(*command)
        assert result.exit_code == 1
        assert "a lake holds one corpus" in result.stderr and "'embed-assets adopt'" in result.stderr
        assert "../landing" in result.stderr and "../second" in result.stderr
    assert [row["text"] for row in project.rows("text")] == ["The first corpus."]
    project.set(SOURCE=str(project.landing))
    assert project.sync()["partitions"]["docs"]["state"] == "fresh"


def test_a_step_of_another_corpus_is_refused(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("docs/one.md", "The first corpus.")
    project.sync()
    (project.root / "second/docs").mkdir(parents=True)
    project.set(SOURCE="second")
    job = definitions().resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, partition_key="docs", raise_on_error=False)
    [failure] = [event for event in result.all_events if event.is_step_failure]
    assert "a lake holds one corpus" in str(failure.event_specific_data)
    assert len(project.rows("text")) == 1


def test_two_corpora_that_create_a_lake_at_once_do_not_share_it(project: Project) -> None:
    """The second one checks before there is a table."""
    project.write("docs/one.md", "The first corpus.")
    first = project.pipeline()
    project.set(SOURCE="second")
    (project.root / "second").mkdir()
    second = project.pipeline()
    second.lake.check_usable(second.embeddings_table)
    first.lake.create(RAW)
    with pytest.raises(LakeError, match="a lake holds one corpus"):
        second.lake.create(RAW)


def test_documents_that_moved_are_adopted(project: Project) -> None:
    project.write("docs/one.md", "One.")
    project.sync()
    shutil.move(project.landing, project.root / "moved")
    project.set(SOURCE="moved")
    assert project.run("sync").exit_code == 1
    assert project.json("adopt")["adopted"]
    assert not project.json("adopt")["adopted"]
    assert states(project, "docs")["raw_documents"][1] == [f"its documents were read from '{project.landing}'"]
    assert project.sync()["embedded"] == 0
    assert [row["uri"] for row in project.rows("uri")] == [f"file://{project.root}/moved/docs/one.md"]
    assert {state for state, _ in states(project, "docs").values()} == {"fresh"}
    assert project.json("verify")["ok"]
    project.set(SOURCE="landing")
    project.landing.mkdir()
    assert "a lake holds one corpus" in project.run("plan").stderr


def test_a_project_can_be_moved_with_its_lake(project: Project) -> None:
    project.write("docs/one.md", "One.")
    project.sync()
    moved = project.root.with_name(project.root.name + "_moved")
    shutil.move(project.root, moved)
    project.monkeypatch.chdir(moved)
    assert Project(moved, project.monkeypatch).sync()["embedded"] == 0


def test_a_link_to_the_source_counts_as_the_source(project: Project) -> None:
    project.write("docs/one.md", "One.")
    project.sync()
    (project.root / "link").symlink_to(project.landing)
    project.set(SOURCE="link")
    assert project.sync()["embedded"] == 0


def test_a_rolled_back_source_is_detected_by_the_instance_that_recorded_it(project: Project) -> None:
    """Instance 1 knows version 1; instance 2 embeds version 2; the source goes back to what instance 1 recorded."""
    file = project.write("a/one.md", "Version 1.")
    backup = project.root / "backup.md"
    shutil.copy2(file, backup)
    use_instance(project, "first")
    project.sync()
    use_instance(project, "second")
    project.write("a/one.md", "Version 2, longer.")
    project.sync()
    shutil.copy2(backup, file)
    use_instance(project, "first")
    assert {state for state, _ in states(project).values()} == {"stale"}
    assert all(REPLACED in reasons for _, reasons in states(project).values())
    assert project.sync()["partitions"]["a"]["state"] == "materialized"
    assert [row["text"] for row in project.rows("text")] == ["Version 1."]
    assert {state for state, _ in states(project).values()} == {"fresh"}
    use_instance(project, "second")
    assert REPLACED in states(project)["chunks"][1]


def test_rows_in_a_table_that_an_instance_never_saw_are_detected(project: Project) -> None:
    """Instance 1 recorded an empty document before there were tables; instance 2 fills it, and the source goes back."""
    file = project.write("a/one.md", " ")
    os.utime(file, (5, 5))
    use_instance(project, "first")
    project.sync()
    use_instance(project, "second")
    project.write("a/one.md", "Text!")
    project.sync()
    project.write("a/one.md", " ")
    os.utime(file, (5, 5))
    use_instance(project, "first")
    assert "stale" in {state for state, _ in states(project).values()}
    project.sync()
    assert project.rows("text") == [] and project.json("verify")["ok"]


@pytest.mark.parametrize("look", [1, 2])
def test_two_corpora_that_claim_an_old_lake_at_once_do_not_share_it(project: Project, look: int) -> None:
    project.write("docs/one.md", "One.")
    project.sync()
    DeltaTable(project.root / "lake/raw_documents").alter.set_table_properties(
        {"embed_assets.source": ""}, raise_if_not_exists=False
    )

    class Slow(Lake):
        """A lake that another corpus claims right after it was checked."""

        def open_path(self, path: str, version: int | None = None) -> DeltaTable | None:
            opened = super().open_path(path, version)
            if path == "raw_documents" and next(looks) == look:
                first.check_usable(table)
            return opened

    looks = iter(range(100))
    first, table = project.pipeline().lake, project.pipeline().embeddings_table
    with pytest.raises(LakeError, match="a lake holds one corpus"):
        Slow(first.root, owner=Owner("", "../second")).check_usable(table)
    delta = DeltaTable(project.root / "lake/raw_documents")
    assert Owner.of(delta) == first.owner


def test_rows_written_by_another_tool_are_detected(project: Project) -> None:
    project.write("a/one.md", "One.")
    project.write("b/one.md", "Another.")
    project.sync()
    DeltaTable(project.root / "lake/chunks").update({"heading_path": "'changed'"}, predicate="partition_key = 'a'")
    assert states(project)["chunks"] == ("stale", [REPLACED])
    assert states(project, "b")["chunks"] == ("fresh", [])
    assert project.sync()["embedded"] == 0
    assert {state for state, _ in states(project).values()} == {"fresh"}


def test_rows_where_none_were_recorded_are_detected(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/one.md", "One.")
    project.write("b/empty.md", " ")
    project.sync()
    delta = DeltaTable(project.root / "lake/raw_documents")
    write_deltalake(delta, _as_partition(delta, "b"), mode="append")
    assert states(project, "b")["raw_documents"] == ("stale", [REPLACED])


def _as_partition(delta: DeltaTable, key: str) -> pa.Table:
    rows = pa.RecordBatchReader.from_stream(delta.scan()).read_all()
    return pa.Table.from_pylist([row | {"partition_key": key} for row in rows.to_pylist()], schema=rows.schema)


@pytest.mark.parametrize("is_old", [False, True], ids=["new records", "records of before"])
def test_compaction_does_not_count_as_replacement(project: Project, instance: dg.DagsterInstance, is_old: bool) -> None:
    for key in "ab":
        project.write(f"{key}/one.md", f"One of {key}.\n\nAnd more.")
    project.sync()
    if is_old:
        forget_files(instance)
    # The same rows in several files, as in large partitions, and then in one.
    for table in ("raw_documents", "chunks", f"embeddings/{project.pipeline().model.space.name}"):
        delta = DeltaTable(project.root / "lake" / table)
        rows = delta.to_pyarrow_table([("partition_key", "=", "a")])
        write_deltalake(delta, rows, mode="overwrite", predicate="partition_key = 'a'", target_file_size=1)
    assert {state for state, _ in states(project).values()} == {"fresh"}
    pipeline = project.pipeline()
    maintain(pipeline.lake, [pipeline.model.space.name], timedelta(), dry_run=False)
    assert {state for state, _ in states(project).values()} == {"fresh"}
    assert project.sync()["partitions"]["a"]["state"] == "fresh"


def forget_files(instance: dg.DagsterInstance) -> None:
    """Record everything as older versions did, without the names of data files."""
    for asset in ASSETS:
        for key in "ab":
            found = latest(instance, asset, key)
            metadata = {name: value for name, value in found.metadata.items() if name != "data_files"}
            instance.report_runless_asset_event(found._replace(metadata=metadata))


def test_older_records_are_trusted_until_files_are_newer(project: Project, instance: dg.DagsterInstance) -> None:
    for key in "ab":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.sync()
    forget_files(instance)
    assert {state for state, _ in states(project).values()} == {"fresh"}
    DeltaTable(project.root / "lake/chunks").update({"heading_path": "'changed'"}, predicate="partition_key = 'a'")
    assert states(project)["chunks"] == ("stale", [REPLACED])


def test_contents_are_compared_only_once(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/one.md", "One.")
    project.sync()
    delta = DeltaTable(project.root / "lake/chunks")
    write_deltalake(delta, delta.to_pyarrow_table(), mode="overwrite", predicate="partition_key = 'a'")
    pipeline = project.pipeline()
    first = load_history(instance, pipeline)
    versions = pipeline.code_versions
    assert first.status("chunks", "a", versions["chunks"], {}).state == "fresh"
    for file in (project.root / "lake/chunks/partition_key=a").glob("*.parquet"):
        file.unlink()
    again = load_history(instance, pipeline, earlier=first)
    assert again.status("chunks", "a", versions["chunks"], {}).state == "fresh"
    anew = load_history(instance, pipeline)
    assert anew.status("chunks", "a", versions["chunks"], {}).reasons == (REPLACED,)


def drop_source(project: Project) -> None:
    shutil.rmtree(project.landing)
    project.landing.mkdir()


def test_an_emptied_source_is_refused_by_sync(project: Project) -> None:
    for key in "ab":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.sync()
    drop_source(project)
    for arguments in ([], ["--partition", "a"]):
        result = project.run("sync", *arguments)
        assert result.exit_code == 1
        assert "is empty, and 2 partitions hold documents" in result.stderr and "--allow-empty" in result.stderr
    project.json("discover")  # observing that it is empty does not confirm it
    assert project.run("sync").exit_code == 1
    assert len(project.rows("text")) == 2
    done = project.sync("--allow-empty")
    assert done["dropped"] == 2 and project.rows("text") == []
    assert {p["state"] for p in project.sync()["partitions"].values()} == {"fresh"}


def test_an_emptied_source_is_refused_by_runs(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/one.md", "One.")
    project.sync()
    drop_source(project)
    patient = definitions_over(project.pipeline(), retries=dg.RetryPolicy(max_retries=0))
    job = patient.resolve_implicit_global_asset_job_def()
    refused = job.execute_in_process(instance=instance, partition_key="a", raise_on_error=False)
    assert not refused.success and len(project.rows("text")) == 1
    allowed = job.execute_in_process(instance=instance, partition_key="a", tags={ALLOW_EMPTY_TAG: "true"})
    assert allowed.success and project.rows("text") == []


def test_a_source_that_was_never_filled_may_be_empty(project: Project) -> None:
    assert project.sync()["partitions"] == {}
    project.write("a/empty.md", "")
    project.sync()
    Path(project.landing / "a/empty.md").unlink()
    assert "1 partitions hold documents" in project.run("sync").stderr  # a rejection is a row, too
    project.write("b/one.md", "Not all is gone.")
    assert project.sync()["partitions"]["a"]["rejected"] == 0
