"""The event log's databases stay open while many events are written, and at no other time."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import dagster as dg
import pytest

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
