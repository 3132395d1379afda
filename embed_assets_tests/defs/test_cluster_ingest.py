"""Ingesting partitions as tasks that are sent elsewhere: the calls are pickled, and done in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embed_assets.defs.cluster_ingest import CheckCall, ClusterIngest, IngestCall
from embed_assets.defs.due import Due
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import ASSETS
from embed_assets.defs.staleness import load_history
from embed_assets.errors import EmbeddingError, ModelError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.stages.pipeline import Pipeline
from embed_assets_tests.conftest import Project

CHECKS = {"raw_documents": ["rejected_share"], "chunks": ["coverage", "duplicate_share"], "embeddings": ["vectors"]}


class Elsewhere:
    """Compute whose tasks are done at once, as another machine would."""

    def __init__(self, cpus: int = 3) -> None:
        self.cpus, self.calls = cpus, list[Any]()

    def spare_cpus(self) -> int:
        return self.cpus

    has_room_for_tasks = True

    def require_alive(self) -> None: ...

    def run_task(self, call: Callable[[], Any]) -> Future[Any]:
        self.calls.append(call)
        future: Future[Any] = Future()
        future.set_result(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(call))())))
        return future


@pytest.fixture
def pipeline(project: Project) -> Pipeline:
    for key in "abc":
        for i in range(5):
            text = "\n\n".join(f"Sentence {n} of document {i} in {key}." for n in range(3000))
            project.write(f"{key}/{i}.md", text)
    project.write("c/broken.pdf", "no document")
    return project.pipeline()


def ingest_of(
    pipeline: Pipeline, compute: Elsewhere, selected: Sequence[str] = ASSETS
) -> tuple[ClusterIngest | None, dict[str, Any]]:
    partitions = pipeline.corpus.source.partitions()
    with open_instance() as instance:
        due = Due(pipeline, load_history(instance, pipeline), selected, "run")
    before = Snapshot(pipeline.lake)
    before.version(RAW)
    found = ClusterIngest.of(compute, due, before, CHECKS, list(partitions.values()))  # type: ignore[arg-type]
    return found, partitions


def rows(pipeline: Pipeline, key: str) -> list[dict[str, Any]]:
    with Snapshot(pipeline.lake) as tables:
        batches = tables.partition(key).rows(CHUNK_TABLE, ["chunk_id", "text", "char_start"])
        return sorted((row for batch in batches for row in batch.to_pylist()), key=lambda row: row["chunk_id"])


def test_what_is_committed_and_sent_back_is_as_if_this_process_had_done_it(
    project: Project, pipeline: Pipeline, tmp_path: Path
) -> None:
    compute = Elsewhere()
    ingest, partitions = ingest_of(pipeline, compute)
    assert ingest is not None and ingest.depth == 3
    task = ingest.begin(partitions["c"])().task(partitions["c"], ingest.before, tmp_path)
    assert task.error is None
    assert (task.outcome.documents, task.outcome.rejected) == (5, 1)
    assert task.outcome.reasons.keys() == task.outcome.replaced.keys() == {"raw_documents", "chunks"}
    assert task.checks["chunks"]["coverage"].passed and task.checks["raw_documents"].keys() == {"rejected_share"}
    assert task.prepared is not None
    sent = [row for file in task.prepared.chunks for batch in file for row in batch.to_pylist()]
    assert len(sent) == task.outcome.chunks == len(rows(pipeline, "c")) > 100
    assert {row["chunk_id"] for row in sent} == {row["chunk_id"] for row in rows(pipeline, "c")}
    task.partition.require_current(RAW, CHUNK_TABLE)
    expected = rows(pipeline, "c")
    project.set(LAKE="other")
    project.sync()
    assert rows(project.pipeline(), "c") == expected


def test_only_what_changed_is_read_and_sent_back(project: Project, pipeline: Pipeline, tmp_path: Path) -> None:
    project.sync()
    for key in "abc":
        project.write(f"{key}/3.md", "Another text.")
    pipeline = project.pipeline()
    ingest, partitions = ingest_of(pipeline, Elsewhere())
    assert ingest is not None
    task = ingest.begin(partitions["a"])().task(partitions["a"], ingest.before, tmp_path)
    assert task.error is None and task.prepared is not None and task.prepared.changed is not None
    assert [batch.num_rows for file in task.prepared.chunks for batch in file] == [1]
    assert task.outcome.documents == 5


def test_an_error_of_a_partition_comes_back_with_what_was_done_before_it(
    project: Project, pipeline: Pipeline, tmp_path: Path
) -> None:
    ingest, partitions = ingest_of(pipeline, Elsewhere())
    assert ingest is not None
    project.landing.joinpath("a/2.md").unlink()
    task = ingest.begin(partitions["a"])().task(partitions["a"], ingest.before, tmp_path)
    assert task.error is not None and "a/2.md" in str(task.error)
    assert task.outcome.replaced == {} and task.prepared is None


def test_a_few_documents_or_machines_without_cpus_are_not_worth_it(project: Project, pipeline: Pipeline) -> None:
    assert ingest_of(pipeline, Elsewhere(cpus=0))[0] is None
    for file in project.landing.rglob("*.md"):
        file.write_text("short")
    compute = Elsewhere()
    assert ingest_of(project.pipeline(), compute)[0] is None
    assert compute.calls == []


class WithoutSource(Elsewhere):
    """Machines that don't have the folder of the source."""

    def run_task(self, call: Callable[[], Any]) -> Future[Any]:
        assert isinstance(call, IngestCall)
        files = replace(call.files, files=tuple(replace(file, path="gone.md") for file in call.files.files))
        return super().run_task(replace(call, files=files))


class Broken(Elsewhere):
    """Machines on which no task can be done."""

    def run_task(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(EmbeddingError("a task on the cluster failed: no module named dagster", is_retryable=True))
        return future


class Full(Elsewhere):
    """Machines that have lost the CPUs for tasks."""

    @property
    def has_room_for_tasks(self) -> bool:  # type: ignore[override]
        self.looks += 1
        return self.looks == 1

    looks = 0

    def run_task(self, call: Callable[[], Any]) -> Future[Any]:
        return Future()


@pytest.mark.parametrize(
    ("compute", "words"),
    [(WithoutSource(), "gone.md"), (Broken(), "no module named dagster"), (Full(), "no CPU left")],
)
def test_what_other_machines_can_not_read_is_read_here(
    pipeline: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture, compute: Elsewhere, words: str
) -> None:
    ingest, partitions = ingest_of(pipeline, compute)
    assert ingest is not None
    task = ingest.begin(partitions["a"])().task(partitions["a"], ingest.before, tmp_path)
    assert task.error is None and task.outcome.documents == 5
    assert "partition 'a' is read on this machine" in caplog.text and words in caplog.text


def test_machines_with_another_model_end_the_run(pipeline: Pipeline) -> None:
    ingest, partitions = ingest_of(pipeline, Elsewhere())
    assert ingest is not None
    other = replace(ingest, worker=replace(ingest.worker, fingerprint="0" * 32))
    error = other.begin(partitions["a"])().error
    assert isinstance(error, ModelError) and "have the model of the process that started them" in str(error)


def test_where_nothing_is_embedded_no_cluster_is_needed(pipeline: Pipeline) -> None:
    compute = Elsewhere()
    assert ingest_of(pipeline, compute, selected=("raw_documents", "chunks"))[0] is None


class Losing(Elsewhere):
    def run_task(self, call: Callable[[], Any]) -> Future[Any]:
        if not isinstance(call, CheckCall):
            return super().run_task(call)
        future: Future[Any] = Future()
        future.set_exception(EmbeddingError("a task on the cluster was lost", is_retryable=True))
        return future


def test_checks_are_evaluated_elsewhere_unless_the_machine_is_lost(
    project: Project, pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    for compute, is_found in ((Elsewhere(), True), (Losing(), False)):
        ingest, _ = ingest_of(project.pipeline(), compute)
        assert ingest is not None
        found = ingest.check("embeddings", "a")
        assert (found is not None) == is_found
    assert "its checks are evaluated here: a task on the cluster was lost" in caplog.text
