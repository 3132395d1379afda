"""The CI recipe: the workflow's steps, run as a CI runner does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from embed_assets_tests.conftest import REPOSITORY, Project

WORKFLOW = yaml.safe_load((REPOSITORY / "deploy/github-actions.yaml").read_text("utf-8"))
STEPS: dict[str, dict[str, Any]] = {step["name"]: step for step in WORKFLOW["jobs"]["embed"]["steps"] if "name" in step}


PULL_REQUEST = "${{ github.event_name == 'pull_request' }}"


def step(name: str, project: Project, event: str = "push") -> subprocess.CompletedProcess[str]:
    """Run a step of the workflow with its environment, as on `event`, by `bash -e` in the checked-out folder."""
    evaluated = {PULL_REQUEST: "true" if event == "pull_request" else "false"}
    variables = {variable: evaluated.get(value, value) for variable, value in WORKFLOW["env"].items()}
    assert not any("${{" in value for value in variables.values()), "an expression that this test does not evaluate"
    environment = os.environ | variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-e", "-c", STEPS[name]["run"]]
    return subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def repository(project: Project) -> Project:
    for key in "abc":
        file = project.root / "docs" / key / "one.md"
        file.parent.mkdir(parents=True)
        file.write_text(f"# One of {key}\n\nSome text.")
    return project


@pytest.mark.long
def test_the_steps_in_order_then_again_from_the_cache(repository: Project) -> None:
    planned = step("plan", repository)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("3 chunks to embed, ")
    assert not (repository.root / "lake").exists()
    for name in ("sync", "verify"):
        done = step(name, repository)
        assert done.returncode == 0, done.stderr
    assert json.loads((repository.root / "sync.json").read_text())["embedded"] == 3
    for kept in STEPS["save the lake"]["with"]["path"].split():
        shutil.move(repository.root / kept, repository.root / f"cached-{kept}")
    for kept in STEPS["restore the lake"]["with"]["path"].split():
        shutil.move(repository.root / f"cached-{kept}", repository.root / kept)
    assert step("sync", repository).returncode == 0
    assert json.loads((repository.root / "sync.json").read_text())["embedded"] == 0


@pytest.mark.long
def test_a_pull_request_plans_and_its_environment_cannot_write(repository: Project) -> None:
    planned = step("plan", repository, event="pull_request")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("3 chunks to embed, ")
    refused = step("sync", repository, event="pull_request")
    assert refused.returncode != 0
    assert "EMBED_READ_ONLY" in refused.stderr
    assert not (repository.root / "lake").exists()
    assert all("!= 'pull_request'" in STEPS[name]["if"] for name in ("sync", "verify", "save the lake"))


@pytest.mark.long
def test_a_failed_partition_fails_the_step_and_the_next_run_does_only_that_one(repository: Project) -> None:
    assert step("sync", repository).returncode == 0
    damaged = next((repository.root / "lake/embeddings").glob("*/partition_key=b/*.parquet"))
    good = damaged.read_bytes()
    damaged.write_bytes(b"damaged")
    for key in "abc":
        (repository.root / "docs" / key / "one.md").write_text(f"Another of {key}.")
    failed = step("sync", repository)
    assert failed.returncode == 1
    assert "1 of 3 partitions failed" in failed.stderr
    assert step("verify", repository).returncode == 1
    damaged.write_bytes(good)
    assert step("sync", repository).returncode == 0
    found = json.loads((repository.root / "sync.json").read_text())["partitions"]
    assert {key: row["state"] for key, row in found.items()} == {"a": "fresh", "b": "materialized", "c": "fresh"}


@pytest.mark.long
def test_tables_without_their_record_and_records_without_tables_are_not_trusted(repository: Project) -> None:
    assert step("sync", repository).returncode == 0
    shutil.rmtree(repository.root / ".dagster")
    assert step("sync", repository).returncode == 0
    assert json.loads((repository.root / "sync.json").read_text())["embedded"] == 0
    shutil.rmtree(repository.root / "lake")
    assert step("sync", repository).returncode == 0
    assert json.loads((repository.root / "sync.json").read_text())["embedded"] == 3
