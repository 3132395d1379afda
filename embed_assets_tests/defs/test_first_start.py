"""Several processes that open an instance for the first time at the same time."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import dagster as dg
import pytest
import yaml

from embed_assets.defs.dagster_internals import LAST_UNSTAMPED_REVISION, InstanceRef, register_partitions
from embed_assets.defs.instance import open_instance
from embed_assets.defs.storage import LockedSqliteStorage
from embed_assets_tests.conftest import Project
from embed_assets_tests.defs.dagster_runs import DAGSTER

CLI = [sys.executable, "-m", "embed_assets.cli"]
DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")


@pytest.fixture
def project(bare_project: Project) -> Project:
    """A fresh clone."""
    return bare_project


def run_at_once(*commands: Iterable[str | Path]) -> None:
    pipe = subprocess.PIPE
    processes = [subprocess.Popen([*command], stdout=pipe, stderr=pipe, text=True) for command in commands]
    for process in processes:
        output = process.communicate()
        assert process.returncode == 0, output


def stamps(root: Path) -> dict[str, int]:
    """Schema revisions of each database."""
    found: dict[str, int] = {}
    for name in DATABASES:
        with contextlib.closing(sqlite3.connect(root / ".dagster/storage" / name)) as connection:
            [(found[name],)] = connection.execute("SELECT count(*) FROM alembic_version")
    return found


def use_plain_sqlite(project: Project) -> None:
    """Use Dagster's own storage, as older dagster.yaml files do."""
    file = project.root / "dagster.yaml"
    config = yaml.safe_load(file.read_text())
    config["storage"] = {"sqlite": {"base_dir": ".dagster/storage"}}
    file.write_text(yaml.safe_dump(config))


@pytest.mark.long
def test_concurrent_first_syncs_all_succeed(project: Project) -> None:
    for key in "abc":
        project.write(f"{key}/one.md", f"One of {key}.")
    run_at_once(*[[*CLI, "sync", "--json"]] * 4)
    assert stamps(project.root) == dict.fromkeys(DATABASES, 1)
    assert {p["state"] for p in project.sync()["partitions"].values()} == {"fresh"}


@pytest.mark.parametrize(
    "prepare",
    [lambda project: None, pytest.param(use_plain_sqlite, marks=pytest.mark.long)],
    ids=["ours", "plain sqlite"],
)
def test_concurrent_first_discovers_all_succeed(project: Project, prepare: Callable[[Project], None]) -> None:
    prepare(project)
    project.write("a/one.md", "One.")
    run_at_once(*[[*CLI, "discover", "--json"]] * 3)
    assert stamps(project.root) == dict.fromkeys(DATABASES, 1)


@pytest.mark.long
def test_dagsters_own_commands_wait_for_each_other_too(project: Project) -> None:
    """Its processes (webserver, daemon, code servers, runs) open the instance themselves."""
    job = project.root / "jobs.py"
    job.write_text("import dagster as dg\n\n\n@dg.asset\ndef one() -> None: ...\n\n\ndefs = dg.Definitions([one])\n")
    dagster = [DAGSTER, "asset", "materialize", "-f", str(job), "--select", "one"]
    run_at_once(dagster, dagster, [*CLI, "init"])
    assert stamps(project.root) == dict.fromkeys(DATABASES, 1)
    with open_instance() as instance:
        assert len(instance.get_runs()) == 2


@pytest.mark.parametrize("prepare", [lambda project: None, use_plain_sqlite], ids=["ours", "plain sqlite"])
def test_a_half_stamped_instance_is_repaired(project: Project, prepare: Callable[[Project], None]) -> None:
    prepare(project)
    project.write("a/one.md", "One.")
    project.sync()
    for name in DATABASES:
        with contextlib.closing(sqlite3.connect(project.root / ".dagster/storage" / name)) as database, database:
            database.execute("INSERT INTO alembic_version VALUES (?)", (LAST_UNSTAMPED_REVISION,))
    assert project.sync()["partitions"]["a"]["state"] == "fresh"
    assert stamps(project.root) == dict.fromkeys(DATABASES, 1)


def test_a_process_that_died_while_creating_the_databases_leaves_nothing_half_done(project: Project) -> None:
    draft = project.root / ".dagster/storage/.new/history"
    draft.mkdir(parents=True)
    (draft / "runs.db").write_bytes(b"half a database")
    assert project.json("init")["instance"]
    assert not draft.exists()
    assert stamps(project.root) == dict.fromkeys(DATABASES, 1)


def test_nothing_is_written_beside_dagster_home(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container only that folder may belong to the user, and it may have no dagster.yaml."""
    home = project.root / "opt/dagster"
    home.mkdir(parents=True)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    assert project.json("init")["instance"]
    assert [path.name for path in home.parent.iterdir()] == ["dagster"]
    assert all((home / name).exists() for name in DATABASES)


@pytest.mark.parametrize("left", DATABASES)
def test_missing_databases_are_created_next_to_existing_ones(project: Project, left: str) -> None:
    """The state after a process died between moving one database and the next."""
    project.json("init")
    for name in DATABASES:
        if name != left:
            (project.root / ".dagster/storage" / name).unlink()
    run_at_once(*[[*CLI, "init"]] * 3)
    assert stamps(project.root) == dict.fromkeys(DATABASES, 1)


def test_the_project_uses_the_locked_storage(project: Project) -> None:
    with open_instance() as instance:
        assert isinstance(instance.get_ref().storage, LockedSqliteStorage)


def test_a_folder_for_the_records_can_come_from_the_environment(project: Project) -> None:
    use_plain_sqlite(project)
    file = project.root / "dagster.yaml"
    config = yaml.safe_load(file.read_text())
    config["storage"]["sqlite"]["base_dir"] = {"env": "RECORDS"}
    file.write_text(yaml.safe_dump(config))
    project.monkeypatch.setenv("RECORDS", str(project.root / "elsewhere"))
    project.json("init")
    assert InstanceRef.from_dir(str(project.root)).storage_data is not None
    assert (project.root / "elsewhere/history/runs.db").exists()


def test_partitions_registered_concurrently_are_no_error() -> None:
    """Another process adds one of the keys between Dagster's look and its insert."""
    code = (
        "import sys, dagster as dg\n"
        "from embed_assets.defs.dagster_internals import register_partitions\n"
        "with dg.DagsterInstance.get() as instance:\n"
        "    print('ready', flush=True); sys.stdin.readline()\n"
        "    register_partitions(instance, 'corpus', [str(i) for i in range(3000)])\n"
    )
    with dg.instance_for_test() as instance:
        environment = os.environ | {"DAGSTER_HOME": instance.root_directory}
        pipe = subprocess.PIPE
        processes = [
            subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=environment)
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            process.communicate("go\n")
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert len(instance.get_dynamic_partitions("corpus")) == 3000
        register_partitions(instance, "corpus", ["0", "new"])
        assert len(instance.get_dynamic_partitions("corpus")) == 3001


def test_init_as_json(project: Project) -> None:
    assert json.loads(project.run("init", "--json").stdout).keys() == {"instance"}
