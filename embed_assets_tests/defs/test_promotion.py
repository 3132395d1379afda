"""The asset `active_embeddings`: promotions, gates and their history in Dagster."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pytest

from embed_assets.definitions import build_definitions
from embed_assets.defs.active_asset import show_active
from embed_assets.defs.instance import open_instance
from embed_assets.lake.generations import read_generations
from embed_assets.settings import load_settings
from embed_assets.stages.gates import GATES
from embed_assets_tests.conftest import Project, topic
from embed_assets_tests.defs.dagster_runs import definitions, materialize

ACTIVE = dg.AssetKey("active_embeddings")
OLD, NEW = "fake:16", "fake:24@new"


@pytest.fixture
def instance(project: Project) -> Iterator[dg.DagsterInstance]:
    """Two partitions, embedded by the old model; the settings name the new one."""
    project.set(MODEL=OLD)
    project.write("a/try.rst", topic("try"))
    project.write("b/with.rst", topic("with"))
    project.sync()
    project.set(MODEL=NEW)
    with open_instance() as instance:
        yield instance


def promote(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """Materialize the asset alone, as the button in the UI does."""
    job = definitions().resolve_implicit_global_asset_job_def()
    return job.execute_in_process(instance=instance, asset_selection=[ACTIVE], raise_on_error=False)


def shown(instance: dg.DagsterInstance) -> dict[str, object]:
    """Metadata of the latest materialization."""
    event = instance.get_latest_materialization_event(ACTIVE)
    assert event is not None and event.asset_materialization is not None
    return {name: value.value for name, value in event.asset_materialization.metadata.items()}


def verdicts(instance: dg.DagsterInstance) -> dict[str, bool]:
    """The latest result of each gate."""
    keys = [dg.AssetCheckKey(ACTIVE, gate.name) for gate in GATES]
    records = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    found = {key.name: record.event.dagster_event for key, record in records.items() if record.event}
    return {name: event.event_specific_data.passed for name, event in found.items() if event}  # type: ignore[union-attr]


def active_model(project: Project) -> str:
    found = project.json("spaces")
    return str(next(each["model"] for each in found["spaces"] if each["space"] == found["active"]))


def test_materializing_the_asset_promotes_and_records_the_gates(instance: dg.DagsterInstance, project: Project) -> None:
    project.sync()
    assert promote(instance).success
    assert active_model(project) == NEW
    assert shown(instance)["space"] == read_generations(project.pipeline().lake).active
    assert "first" in str(shown(instance)["history"]) and "promoted" in str(shown(instance)["history"])
    assert verdicts(instance) == {gate.name: True for gate in GATES}


def test_a_gate_that_fails_fails_the_run_and_changes_nothing(instance: dg.DagsterInstance, project: Project) -> None:
    project.sync("--partition", "a")
    before = shown(instance)
    assert not promote(instance).success
    assert active_model(project) == OLD
    assert shown(instance) == before
    assert [name for name, passed in verdicts(instance).items() if not passed] == ["coverage"]


def test_a_run_of_checks_alone_evaluates_the_gates(instance: dg.DagsterInstance, project: Project) -> None:
    project.sync("--partition", "a")
    selection = dg.AssetSelection.checks_for_assets(ACTIVE)
    job = dg.Definitions.merge(definitions(), dg.Definitions(jobs=[dg.define_asset_job("ask", selection)]))
    assert job.resolve_job_def("ask").execute_in_process(instance=instance).success
    assert verdicts(instance) == {gate.name: gate.name != "coverage" for gate in GATES}
    assert active_model(project) == OLD


def test_runs_of_partitions_promote_nothing(instance: dg.DagsterInstance, project: Project) -> None:
    project.json("discover")
    for key in "ab":
        done = materialize("--partition", key)
        assert done.returncode == 0, done.stderr
        assert "did not yield" not in done.stderr
    assert active_model(project) == OLD


def test_the_daemon_promotes_once_if_told(instance: dg.DagsterInstance, project: Project) -> None:
    project.set(PROMOTE="auto")
    cursor: object = None

    def is_requested() -> bool:
        nonlocal cursor
        made = build_definitions(load_settings())
        result = dg.evaluate_automation_conditions(made, instance, cursor=cursor)  # type: ignore[arg-type]
        cursor = result.cursor
        return result.get_num_requested(ACTIVE) > 0

    project.json("discover")
    assert not is_requested()
    assert materialize("--partition", "a", select="embeddings*,+embeddings,chunks,raw_documents").returncode == 0
    assert not is_requested()
    project.set(PROMOTE="manual")
    project.sync()
    project.set(PROMOTE="auto")
    assert is_requested()
    assert not is_requested()  # not again while it is complete


def test_changes_by_the_command_line_are_shown(instance: dg.DagsterInstance, project: Project) -> None:
    project.sync()
    project.json("promote", "--why", "better on our queries")
    assert shown(instance)["reason"] == "better on our queries"
    assert verdicts(instance) == {gate.name: True for gate in GATES}
    project.json("rollback")
    show_active(instance, project.pipeline())
    assert shown(instance)["space"] == read_generations(project.pipeline().lake).active
    events = len(instance.fetch_materializations(ACTIVE, limit=100).records)
    show_active(instance, project.pipeline())
    assert len(instance.fetch_materializations(ACTIVE, limit=100).records) == events
