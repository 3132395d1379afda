"""EMBED_READ_ONLY: a second deployment on a lake plans, searches and checks, and changes nothing there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pytest

from embed_assets.definitions import build_definitions
from embed_assets.defs.instance import open_instance
from embed_assets.errors import SettingsError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import RAW
from embed_assets.lake.vectors import VECTOR_ROWS
from embed_assets.lake.writer import Provenance
from embed_assets.settings import load_settings
from embed_assets_tests.conftest import Project


@pytest.fixture
def reader(project: Project) -> Project:
    """A lake with two partitions, of which one has changed since, seen by a deployment that only reads."""
    for key in "ab":
        project.write(f"{key}/one.md", f"# {key}\n\nA document.")
    project.sync()
    project.write("a/two.md", "A new document.")
    project.write("c/one.md", "A new partition.")
    project.set(READ_ONLY="true")
    return project


def files(project: Project) -> dict[str, str]:
    """Every file of the lake, with a hash of its content."""
    lake = project.root / "lake"
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(lake.rglob("*")) if f.is_file()}


REFUSED = "this deployment must not change the lake"


def test_it_plans_searches_and_verifies(reader: Project) -> None:
    before = files(reader)
    planned = reader.json("plan", "--count")
    states = {p["partition_key"]: p["assets"]["raw_documents"]["state"] for p in planned["partitions"]}
    assert states == {"a": "stale", "b": "fresh", "c": "missing"}
    assert reader.run("search", "a document", "-k", "1").exit_code == 0
    assert reader.run("verify").exit_code == 0
    assert reader.run("discover").exit_code == 0
    assert reader.run("maintain", "--dry-run").exit_code == 0
    assert files(reader) == before


@pytest.mark.parametrize(
    "command",
    [["sync"], ["sync", "--partition", "a"], ["forget", "b"], ["adopt"], ["maintain"], ["verify", "--repair"]],
)
def test_commands_that_change_the_lake_are_refused_in_one_line(reader: Project, command: list[str]) -> None:
    before = files(reader)
    done = reader.run(*command)
    assert done.exit_code == 1
    assert REFUSED in done.stderr and "EMBED_READ_ONLY" in done.stderr
    assert files(reader) == before


def test_runs_fail_in_one_line_and_checks_alone_run(reader: Project) -> None:
    before = files(reader)
    definitions = build_definitions(load_settings())
    job = definitions.resolve_implicit_global_asset_job_def()
    with open_instance() as instance:
        failed = job.execute_in_process(instance=instance, partition_key="b", raise_on_error=False)
        [event] = [event for event in failed.all_events if event.is_step_failure]
        assert REFUSED in str(event.step_failure_data.user_failure_data)
        ask = dg.define_asset_job("ask", dg.AssetSelection.all_asset_checks())
        asking = dg.Definitions.merge(definitions, dg.Definitions(jobs=[ask])).resolve_job_def("ask")
        assert asking.execute_in_process(instance=instance, tags={"dagster/partition": "b"}).success
        maintained = definitions.resolve_job_def("maintain").execute_in_process(instance=instance, raise_on_error=False)
        assert not maintained.success
        assert definitions.resolve_job_def("plan").execute_in_process(instance=instance).success
    assert files(reader) == before


def test_no_sensor_requests_runs(reader: Project) -> None:
    definitions = build_definitions(load_settings())
    assert [sensor.name for sensor in definitions.sensors or ()] == ["arrivals"]
    graph = definitions.resolve_asset_graph()
    assert {graph.get(key).automation_condition for key in graph.get_all_asset_keys()} == {None}


def test_the_lake_itself_refuses(reader: Project) -> None:
    pipeline = reader.pipeline()
    before = files(reader)
    with Snapshot(pipeline.lake) as tables, pytest.raises(SettingsError, match=REFUSED):
        tables.partition("b").replace(RAW, [], Provenance("test"))
    with pytest.raises(SettingsError, match=REFUSED):
        Staging(pipeline.lake, pipeline.embeddings_table, "b").write(pa.RecordBatch.from_pylist([], schema=VECTOR_ROWS))
    assert files(reader) == before


def test_an_empty_place_stays_empty(project: Project) -> None:
    project.write("a/one.md", "One.")
    project.set(READ_ONLY="true")
    assert project.json("plan")["partitions"][0]["assets"]["embeddings"]["state"] == "missing"
    assert project.run("sync").exit_code == 1
    assert not Path("lake").exists()
