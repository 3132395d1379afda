"""With dagster-ray: a resource that connects the step, and runs that are jobs of a Ray cluster."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from embed_assets.defs.instance import open_instance
from embed_assets_tests.cluster.clusters import ray_cluster
from embed_assets_tests.conftest import Project, topic
from embed_assets_tests.defs.dagster_runs import latest

pytestmark = pytest.mark.long
BIN = Path(sys.executable).parent
WITH_A_RESOURCE = """
from dagster_ray import LocalRay
from embed_assets.definitions import build_definitions
from embed_assets.settings import load_settings

options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000}
defs = build_definitions(load_settings(), resources={"ray": LocalRay(ray_init_options=options)})
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=300)


def test_the_step_uses_the_cluster_that_a_resource_connects_to(project: Project) -> None:
    project.write("a/try.md", topic("try"))
    project.set(COMPUTE="ray")
    project.json("discover")
    (project.root / "corpus.py").write_text(WITH_A_RESOURCE)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        project.monkeypatch.setenv("RAY_TMPDIR", folder)  # no other cluster of this machine is taken for it
        done = run(BIN / "dagster", "asset", "materialize", "-f", "corpus.py", "--select", "*", "--partition", "a")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the Ray cluster at" in done.stderr, "not one of its own"
    assert project.json("verify")["ok"]


def test_a_run_is_a_job_of_the_cluster(project: Project) -> None:
    project.monkeypatch.setenv("PATH", f"{BIN}:/usr/bin:/bin")
    project.write("a/try.md", topic("try"))
    project.set(COMPUTE="ray", SOURCE=str(project.landing), LAKE=str(project.root / "lake"))
    with ray_cluster(nodes=0, num_cpus=3, include_dashboard=True) as cluster:
        address = f"http://{cluster.head_node.webui_url}"
        config = {"address": address, "num_cpus": 1, "env_vars": ["EMBED_MODEL", "EMBED_SOURCE", "EMBED_LAKE"]}
        config["env_vars"] += ["EMBED_COMPUTE=ray", f"DAGSTER_HOME={project.root}"]
        instance = yaml.safe_load((project.root / "dagster.yaml").read_text())
        # The launcher puts the instance between single quotes of a shell, and the YAML of a storage of ours has some.
        instance["storage"] = {"sqlite": {"base_dir": ".dagster/storage"}}
        instance["run_launcher"] = {"module": "dagster_ray", "class": "RayRunLauncher", "config": {"ray": config}}
        del instance["concurrency"]["runs"]  # its queue would need the daemon
        instance["run_coordinator"] = {"module": "dagster._core.run_coordinator", "class": "DefaultRunCoordinator"}
        (project.root / "dagster.yaml").write_text(yaml.dump(instance))
        project.monkeypatch.setenv("DAGSTER_HOME", str(project.root))
        project.json("discover")
        tags = '{"dagster/partition": "a"}'
        job = (BIN / "dagster", "job", "launch", "-m", "embed_assets.definitions", "-j", "__ASSET_JOB", "--tags", tags)
        until = time.monotonic() + 240
        while (launched := run(*job)).returncode:  # the head's agent takes its time
            assert time.monotonic() < until, launched.stderr[-3000:]
            time.sleep(2)
        with open_instance() as opened:
            while not (record := opened.get_run_records(limit=1)[0]).dagster_run.is_finished:
                assert time.monotonic() < until, run(BIN / "ray", "job", "list", "--address", address).stdout
                time.sleep(0.5)
            assert record.dagster_run.is_success
            metadata = latest(opened, "embeddings", "a").metadata
    assert metadata["ray_workers"].value == 1
    assert str(metadata["ray_dashboard"].value).startswith("http://127.0.0.1:")
    assert project.json("verify")["ok"]
