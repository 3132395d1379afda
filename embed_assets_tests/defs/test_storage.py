"""The event log's databases stay open while many events are written, and planned checks take little space."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import dagster as dg
import pytest
from dagster import DagsterEventType
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationPlanned
from dagster._core.definitions.partitions.subset import DefaultPartitionsSubset
from dagster._core.utils import make_new_run_id

from embed_assets.defs.instance import open_instance
from embed_assets.defs.storage import kept_open
from embed_assets_tests.conftest import REPOSITORY, Project


def open_databases() -> set[str]:
    """Names of the event log's databases that this process has open."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.endswith(".db") and "/history/runs/" in target:
            found.add(os.path.basename(target))
    return found


def observe(instance: dg.DagsterInstance, key: str) -> None:
    instance.report_runless_asset_event(dg.AssetObservation("documents", partition=key))


def count(instance: dg.DagsterInstance) -> int:
    return len(instance.fetch_observations(dg.AssetKey("documents"), limit=1000).records)


def test_databases_are_open_only_inside(project: Project) -> None:
    with open_instance() as instance:
        observe(instance, "a")
        assert open_databases() == set()
        with kept_open(instance), kept_open(instance):
            observe(instance, "b")
            assert "index.db" in open_databases()
            with kept_open(instance):
                observe(instance, "c")
            assert "index.db" in open_databases()
        assert open_databases() == set()
        observe(instance, "d")
        assert count(instance) == 4


def test_of_many_runs_only_the_newest_stays_open(project: Project) -> None:
    for name in "abcd":
        project.write(f"{name}/one.md", name)
    project.sync()
    with open_instance() as instance, kept_open(instance):
        runs = [run.run_id for run in instance.get_runs()]
        for run_id in [*runs, "other", "another"]:
            assert instance.get_records_for_run(run_id).records is not None
            assert len(open_databases()) <= 2
        observe(instance, "a")
        assert "index.db" in open_databases()


def test_an_error_inside_closes_them_and_undoes_nothing(project: Project) -> None:
    with open_instance() as instance:
        with pytest.raises(RuntimeError), kept_open(instance):
            observe(instance, "a")
            raise RuntimeError("in the middle")
        assert open_databases() == set()
        assert count(instance) == 1


def test_threads_and_other_processes_write_at_the_same_time(project: Project) -> None:
    code = (
        "from embed_assets_tests.defs.test_storage import *\n"
        "with open_instance() as instance, kept_open(instance):\n"
        "    [observe(instance, str(i)) for i in range(40)]\n"
    )
    with open_instance() as instance:
        observe(instance, "first")
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        others = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]

        def write(number: int) -> None:
            with kept_open(instance):
                observe(instance, str(number))

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, range(40)))
        assert [other.wait() for other in others] == [0, 0]
        assert open_databases() == set()
        assert count(instance) == 121


def plan_check(instance: dg.DagsterInstance, keys: set[str] | None) -> None:
    """Record, as a run over some partitions does, that it will evaluate a check on them."""
    planned = AssetCheckEvaluationPlanned(
        asset_key=dg.AssetKey("chunks"),
        check_name="coverage",
        partitions_subset=None if keys is None else DefaultPartitionsSubset(keys),
    )
    event = dg.DagsterEvent(DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED.value, "job", event_specific_data=planned)
    instance.report_dagster_event(event, run_id=make_new_run_id())


def planned_checks(project: Project) -> tuple[list[str | None], int]:
    """The partitions with a planned check, sorted, and the bytes that are stored for each."""
    [database] = (project.root / ".dagster").rglob("index.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT partition, length(evaluation_event) FROM asset_check_executions").fetchall()
    return sorted(key for key, _ in rows), max(size for _, size in rows)


@pytest.mark.parametrize("count", [1, 99, 100, 101, 2000])
def test_a_planned_check_takes_the_same_space_per_partition_however_many_there_are(
    project: Project, count: int
) -> None:
    keys = {f"partition {i:05}" for i in range(count)}
    with open_instance() as instance:
        plan_check(instance, keys)
    stored, byte_size = planned_checks(project)
    assert stored == sorted(keys)
    assert byte_size < 4000


def test_a_check_without_partitions_is_planned_once(project: Project) -> None:
    with open_instance() as instance:
        plan_check(instance, None)
    assert planned_checks(project)[0] == [None]
