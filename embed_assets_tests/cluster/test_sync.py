"""`sync` on a Ray cluster: the same tables as in one process, also when a node is lost.

The last tests lose a node and the head of the cluster that all use.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from dagster import DagsterEventType

from embed_assets.defs.instance import open_instance
from embed_assets.lake.staging import batches_of
from embed_assets_tests.cluster.clusters import STORE_BYTES, is_at_work, kill, ray_cluster
from embed_assets_tests.conftest import SAMPLE_MODEL, Project
from embed_assets_tests.defs.dagster_runs import latest


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(nodes=3) as made:
        yield made


def write_documents(project: Project, partitions: int, documents: int) -> None:
    """Pages of the language reference; texts of their own in each partition."""
    pages = sorted(topics)
    for n in range(partitions * documents):
        page = topics[pages[n % len(pages)]]
        project.write(f"p{n % partitions}/{pages[n % len(pages)]}.md", f"# {n}\n\n{page}")


def table(project: Project) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by key, without what time made of them."""
    rows = project.rows()
    assert rows
    for row in rows:
        del row["embedded_at"]
    return {(row["partition_key"], row["chunk_id"]): row for row in rows}


def assert_same(mine: dict[tuple[str, str], dict[str, Any]], other: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert mine.keys() == other.keys()
    for key, row in mine.items():
        a, b = np.array(row.pop("embedding")), np.array(other[key].pop("embedding"))
        assert a @ b > 0.99999
        assert row == other[key]


@pytest.mark.long
def test_the_table_is_the_local_engines_row_for_row(project: Project, cluster: Any) -> None:
    project.set(MODEL=SAMPLE_MODEL, MAX_BATCH_TOKENS="1024", CONTEXT="title,headings", METADATA="author:string")
    write_documents(project, partitions=3, documents=3)
    project.write("p0/_meta.json", '{"author": "Ann"}')
    local = project.sync()
    expected = table(project)
    project.set(LAKE="other", COMPUTE="ray", RAY_ADDRESS=cluster.address, REUSE="partition")
    project.monkeypatch.setenv("DAGSTER_HOME", str(project.root / "home"))
    (project.root / "home").mkdir()
    remote = project.sync()
    for name in ("embedded", "reused", "dropped", "tokens"):
        assert remote[name] == local[name]
    assert {row["meta_author"] for row in project.rows()} == {"Ann", None}
    assert_same(table(project), expected)
    assert project.json("verify")["ok"]
    assert project.sync()["embedded"] == 0
    assert list((project.root / "other").rglob("_staging/*")) == []


@pytest.mark.long
def test_metadata_tells_who_did_it(project: Project, cluster: Any) -> None:
    project.set(COMPUTE="ray", RAY_ADDRESS=cluster.address, RAY_REPLICAS="2")
    write_documents(project, partitions=2, documents=6)
    assert not [r for r in project.sync()["partitions"].values() if r["error"]]
    with open_instance() as instance:
        metadata = latest(instance, "embeddings", "p0").metadata
    assert 1 <= metadata["ray_workers"].value <= 2
    assert metadata["ray_nodes"].value == 4
    assert cluster.address in metadata["ray_cluster"].value
    assert metadata["tokens_per_second"].value > 0
    assert 0 < metadata["ray_utilization_percent"].value <= 100
    assert len(metadata["ray_tokens_per_second_per_worker"].records) == metadata["ray_workers"].value


def test_without_the_extra_everything_works_and_asking_for_ray_says_what_to_install(project: Project) -> None:
    write_documents(project, partitions=1, documents=1)
    with project.monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)  # what an import finds where it is not installed
        assert project.sync()["embedded"] > 0
        project.set(COMPUTE="ray")
        error = project.json("sync", exit_code=1)["error"]
    assert "pip install 'embed-assets[ray]'" in error
    assert "\n" not in error


@contextlib.contextmanager
def sync_in_the_middle(
    project: Project, cluster: Any, model: str = "fake:16~250", **settings: str
) -> Iterator[subprocess.Popen[str]]:
    """A slow sync into a lake of its own, with three windows staged and more to come."""
    project.set(MODEL=model, LAKE="other", COMPUTE="ray", RAY_ADDRESS=cluster.address, **settings)
    project.monkeypatch.setenv("DAGSTER_HOME", str(project.root / "home"))
    (project.root / "home").mkdir()
    process = project.start_sync()
    try:
        until = time.monotonic() + 240
        while len(staged_windows(project)) < 3:
            assert process.poll() is None and time.monotonic() < until, "there was no middle"
            time.sleep(0.1)
        yield process
    finally:
        process.kill()


def staged_windows(project: Project) -> list[Path]:
    return list((project.root / "other").rglob("_staging/*.arrow"))


@pytest.mark.long
def test_a_lost_node_costs_its_windows(project: Project, cluster: Any) -> None:
    write_documents(project, partitions=4, documents=12)
    project.set(MODEL="fake:16", CHUNK_TOKENS="64")
    local = project.sync()
    expected = table(project)
    with sync_in_the_middle(project, cluster, RAY_REPLICAS="3") as process:
        # Windows may be staged before every node has a worker: the loss of one without is nothing to tell.
        while not (at_work := [node for node in cluster.worker_nodes if is_at_work(node)]):
            assert process.poll() is None, "there was no middle"
            time.sleep(0.1)
        cluster.worker_nodes.remove(at_work[0])
        kill(at_work[0])
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "was lost" in stderr and "windows are given to others" in stderr
    result = json.loads(stdout)
    assert result["embedded"] == local["embedded"]
    assert_same(table(project), expected)
    assert staged_windows(project) == []


@pytest.mark.long
def test_partitions_are_ingested_on_the_cluster_as_here_even_if_a_node_is_lost(project: Project, cluster: Any) -> None:
    for n in range(24):
        project.write(f"p{n % 8}/{n}.md", "".join(f"Sentence {i} of document {n}.\n\n" for i in range(4000)))
    project.set(MODEL="fake:16", COMPUTE="ray", RAY_ADDRESS=cluster.address, RAY_REPLICAS="1", LAKE="other")
    project.monkeypatch.setenv("DAGSTER_HOME", str(project.root / "home"))
    (project.root / "home").mkdir()
    process = project.start_sync()
    until = time.monotonic() + 240
    while not list((project.root / "other/chunks").glob("partition_key=*")):
        assert process.poll() is None and time.monotonic() < until, "there was no middle"
        time.sleep(0.05)
    kill(cluster.worker_nodes.pop())
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    assert "partitions are read and split on the cluster" in stderr
    remote, made = json.loads(stdout), table(project)
    project.monkeypatch.delenv("DAGSTER_HOME")
    project.set(COMPUTE="local", LAKE="lake")
    local = project.sync()
    assert remote["embedded"] == local["embedded"] > 1000
    assert_same(made, table(project))


def embedded_texts(project: Project) -> set[str]:
    """Hashes of the texts whose vectors are staged or committed in the lake of `sync_in_the_middle`."""
    found: set[str] = set()
    for file in staged_windows(project):
        with contextlib.suppress(FileNotFoundError):  # committed since it was listed
            for batch in batches_of(file.read_bytes()):
                found.update(batch.column("input_hash").to_pylist())
    return found | {row["input_hash"] for row in project.rows("input_hash")}


@pytest.mark.long
def test_a_lost_head_is_one_line_and_the_next_run_goes_on_from_what_is_staged(project: Project, cluster: Any) -> None:
    # So much that it takes minutes: workers go on until the loss is noticed, and a run whose texts are all staged by
    # then needs no cluster to end well.
    write_documents(project, partitions=4, documents=60)
    project.set(CHUNK_TOKENS="64")
    with sync_in_the_middle(project, cluster, "fake:16~20", RAY_REPLICAS="1") as process:
        before = embedded_texts(project)
        kill(cluster.head_node)
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 1, stderr
    answer = json.loads(stdout)
    errors = {answer["error"]} if "error" in answer else {r["error"] for r in answer["partitions"].values()}
    # The loss, or what the retries of the run found: nobody listens at the address.
    assert any(re.search("was lost|gave up|ended with status|no connection", str(error)) for error in errors), answer
    assert not any("\n" in str(error) for error in errors), answer
    assert "Traceback" not in stderr
    with open_instance() as instance:
        [run] = instance.get_run_records(limit=1)
        retried = instance.all_logs(run.dagster_run.run_id, of_type=DagsterEventType.STEP_UP_FOR_RETRY)
    assert retried, "the loss of a head is retryable"
    kept = embedded_texts(project)
    assert before and before <= kept, "what was staged when the head was lost is still there"
    project.set(COMPUTE="local", MODEL="fake:16")
    again = project.sync()
    chunks = project.rows("input_hash")
    assert again["embedded"] <= len(chunks) - len(kept)
    assert kept <= {row["input_hash"] for row in chunks}
    assert staged_windows(project) == []
    assert project.json("verify")["ok"]
