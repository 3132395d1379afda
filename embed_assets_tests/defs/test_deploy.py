"""The instance files for shared deployments, on a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import ASSETS
from embed_assets.settings import load_settings
from embed_assets_tests.conftest import MEMORY, REPOSITORY, Project, topic
from embed_assets_tests.defs.dagster_runs import dagster_says, materialize, we_say

SHARED = ("deploy/postgres.yaml", "deploy/many-workers.yaml", "deploy/ray.yaml")


def as_postgres(*command: str | Path) -> None:
    """Run one of the server's tools, as the user `postgres` if we are root: they refuse to run as root."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    subprocess.run([*prefix, *map(str, command)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """URL of a server on loopback with an empty database."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = installed[-1].parent if installed else shutil.which("initdb") and Path(str(shutil.which("initdb"))).parent
    assert found, "these tests need PostgreSQL: apt-get install postgresql"
    # Not below pytest's folder: that is for its own user, and pytest sees to it whenever it starts.
    home = Path(tempfile.mkdtemp(prefix="postgres", dir=MEMORY if MEMORY.is_dir() else None))
    if os.geteuid() == 0:
        shutil.chown(home, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    as_postgres(found / "initdb", "-D", home / "data", "-A", "trust", "-U", "dagster", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {home} -c fsync=off"
    as_postgres(found / "pg_ctl", "-D", home / "data", "-w", "-o", options, "-l", home / "log", "start")
    try:
        yield f"postgresql+psycopg2://dagster:secret@127.0.0.1:{port}/postgres"
    finally:
        as_postgres(found / "pg_ctl", "-D", home / "data", "-m", "immediate", "stop")
        shutil.rmtree(home)


@pytest.mark.long
@pytest.mark.parametrize("name", ["postgres", "many-workers"])
def test_the_whole_pipeline_on_postgres(
    project: Project, postgres: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(REPOSITORY / f"deploy/{name}.yaml", project.root / "dagster.yaml")
    monkeypatch.setenv("DAGSTER_HOME", str(project.root))
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", postgres)
    project.set(NAME_PREFIX="" if name == "postgres" else "second")
    for key in "abc":
        project.write(f"{key}/try.rst", topic("try"))
    assert project.sync()["embedded"] > 0
    assert project.sync()["embedded"] == 0
    project.write("b/with.rst", topic("with"))
    plan = {p["partition_key"]: p["assets"] for p in project.json("plan")["partitions"]}
    assert plan["b"]["raw_documents"] == {"state": "stale", "reasons": ["source files changed"]}
    assert plan["a"]["embeddings"]["state"] == "fresh"
    if name == "postgres":
        done = materialize("--partition-range", "a...c")
        assert done.returncode == 0, done.stderr
        with open_instance() as instance:
            assert type(instance.event_log_storage).__name__ == "PostgresEventLogStorage"
            assert we_say(instance, *"abc") == dagster_says(instance, *"abc")
            assert dagster_says(instance, "b")["b"] == dict.fromkeys(ASSETS, "fresh")
    assert project.json("verify")["ok"]
    assert postgres.partition("//")[2] not in "".join(f.read_text() for f in project.root.glob("*.yaml"))


@pytest.mark.long
def test_without_the_database_the_error_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(REPOSITORY / "deploy/postgres.yaml", project.root / "dagster.yaml")
    monkeypatch.setenv("DAGSTER_HOME", str(project.root))
    assert "DAGSTER_POSTGRES_URL" in project.run("plan").stderr
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql+psycopg2://user:hidden@127.0.0.1:1/none")
    result = project.run("plan")
    assert result.exit_code == 1
    assert "hidden" not in result.output + result.stderr


def test_every_instance_file_has_the_settings_that_the_step_relies_on() -> None:
    import yaml

    for file in [REPOSITORY / name for name in ("dagster.yaml", *SHARED)]:
        settings = yaml.safe_load(file.read_text())
        assert settings["concurrency"]["pools"]["default_limit"] >= 1
        assert settings["concurrency"]["pools"]["granularity"] == "op"
        assert settings["run_monitoring"]["enabled"] and settings["run_monitoring"]["free_slots_after_run_end_seconds"]
        assert settings["run_retries"] == settings["run_retries"] | {
            "enabled": True,
            "retry_on_asset_or_op_failure": False,
        }
        assert settings["telemetry"] == {"enabled": False}


def test_the_ray_launcher_and_cluster_files_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two files must match; `embed_assets_tests/cluster/test_dagster_ray.py` tests that such a run works."""
    import yaml
    from dagster._serdes import ConfigurableClassData

    monkeypatch.setenv("RAY_JOBS_ADDRESS", "http://127.0.0.1:8265")
    settings = yaml.safe_load((REPOSITORY / "deploy/ray.yaml").read_text())["run_launcher"]
    launcher = ConfigurableClassData(settings["module"], settings["class"], yaml.dump(settings["config"])).rehydrate()
    assert launcher.address == "http://127.0.0.1:8265"
    assert "EMBED_COMPUTE=ray" in launcher.env_vars
    assert not any("POSTGRES" in name or "OPTIONS" in name for name in launcher.env_vars), "no secrets"
    given = dict(variable.split("=") for variable in launcher.env_vars if "=" in variable)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    made = load_settings()
    cluster = yaml.safe_load((REPOSITORY / "deploy/kuberay.yaml").read_text())
    assert cluster["kind"] == "RayCluster"
    assert f"ray=={cluster['spec']['rayVersion']}\n" in (REPOSITORY / "constraints.txt").read_text()
    [workers] = cluster["spec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    [head] = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    on_a_node = int(limits["nvidia.com/gpu"]) / (made.ray_gpus_per_replica or 0)
    assert made.replica_range == (1, on_a_node * workers["maxReplicas"]), "every GPU is filled, and none is doubled"
    assert int(limits["cpu"]) >= on_a_node, "a CPU for each"
    assert container["envFrom"] == head["envFrom"]
