"""Ingesting partitions as tasks that are sent elsewhere: the calls are pickled, and done in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from embed_assets.defs.cluster_calls import CommitCall, IngestCall
from embed_assets.defs.cluster_work import ClusterWork
from embed_assets.defs.due import Due
from embed_assets.defs.ingest import Ingest, Task
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import ASSETS
from embed_assets.defs.staleness import load_history
from embed_assets.errors import EmbeddingError, LakeError, ModelError, SupersededError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.stages.chunk_rows import ChunkRows
from embed_assets.stages.embeddings import materialize_embeddings, stage_embeddings
from embed_assets.stages.executors import failed
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.remote import open_compute
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
) -> tuple[ClusterWork | None, dict[str, Any]]:
    partitions = pipeline.corpus.source.partitions()
    with open_instance() as instance:
        due = Due(pipeline, load_history(instance, pipeline), selected, "run")
    before = Snapshot(pipeline.lake)
    before.version(RAW)
    found = ClusterWork.of(compute, due, before, CHECKS, list(partitions.values()))  # type: ignore[arg-type]
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
    """Machines that are lost while they commit embeddings: before it, or after it."""

    def __init__(self, is_committed: bool) -> None:
        super().__init__()
        self.is_committed = is_committed

    def run_task(self, call: Callable[[], Any]) -> Future[Any]:
        if not isinstance(call, CommitCall):
            return super().run_task(call)
        if self.is_committed:
            super().run_task(call)
        return failed(EmbeddingError("a task on the cluster was lost", is_retryable=True))


class LocalModel(Elsewhere):
    """The model of this process, beside machines for tasks."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self._local = open_compute(pipeline)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._local, name)


def chunk_rows(work: ClusterWork, task: Task) -> ChunkRows:
    return Ingest(work.due, lambda key: task.partition.state(RAW)).chunk_rows(task)


def staged_task(pipeline: Pipeline, compute: Elsewhere, folder: Path) -> tuple[ClusterWork, Task, dict[str, str]]:
    """The work, a partition that was ingested and whose vectors are staged, and its rejected inputs."""
    work, partitions = ingest_of(pipeline, compute)
    assert work is not None
    task = work.begin(partitions["a"])().task(partitions["a"], work.before, folder)
    assert task.prepared is not None and work.due.is_due("embeddings", task.outcome)
    chunks = chunk_rows(work, task)
    rejected = stage_embeddings(task.partition, chunks, pipeline.target, LocalModel(pipeline), task.outcome)
    return work, task, rejected


def stored(pipeline: Pipeline, key: str = "a") -> list[dict[str, Any]]:
    with Snapshot(pipeline.lake) as tables:
        batches = tables.partition(key).rows(pipeline.target.table, ["chunk_id", "input_hash", "uri", "title"])
        return sorted((row for batch in batches for row in batch.to_pylist()), key=lambda row: row["chunk_id"])


def windows(pipeline: Pipeline) -> list[str]:
    staging = Path(pipeline.lake.uri(pipeline.target.table)) / "_staging"
    return [file.name for file in staging.iterdir()] if staging.exists() else []


def test_staged_vectors_are_joined_committed_checked_and_drawn_elsewhere(
    project: Project, pipeline: Pipeline, tmp_path: Path
) -> None:
    work, task, rejected = staged_task(pipeline, Elsewhere(), tmp_path)
    assert windows(pipeline) and not stored(pipeline)
    assert work.commit(task, rejected, None)
    assert len(stored(pipeline)) == task.outcome.chunks == task.outcome.embedded > 100
    assert task.outcome.replaced["embeddings"].is_committed and not windows(pipeline)
    assert task.checks["embeddings"]["vectors"].passed
    assert task.outcome.pictures is not None and task.outcome.pictures.keys() == {"map", "token_lengths"}
    assert not len(task.outcome.sample.token_counts)
    found = stored(pipeline)
    project.set(LAKE="other")
    project.sync()
    assert stored(project.pipeline()) == found


def test_only_the_embeddings_of_changed_documents_are_replaced(
    project: Project, pipeline: Pipeline, tmp_path: Path
) -> None:
    project.sync()
    before = stored(pipeline)
    for key in "abc":
        project.write(f"{key}/3.md", "Another text.")
    project.landing.joinpath("a/4.md").unlink()
    pipeline = project.pipeline()
    work, task, rejected = staged_task(pipeline, Elsewhere(), tmp_path)
    assert task.prepared is not None and task.prepared.changed is not None and task.outcome.embedded == 1
    assert work.commit(task, rejected, task.prepared.changed)
    found = stored(pipeline)
    assert len(found) == task.outcome.chunks == task.outcome.replaced["embeddings"].rows < len(before)
    assert [row for row in found if "3.md" not in row["uri"]] == [
        row for row in before if not row["uri"].endswith(("3.md", "4.md"))
    ]
    assert task.outcome.dropped == sum(row["uri"].endswith(("3.md", "4.md")) for row in before)
    assert task.checks["embeddings"]["vectors"].passed
    project.set(LAKE="other")
    project.sync()
    assert stored(project.pipeline()) == found


def test_rejected_texts_are_handed_over(project: Project, pipeline: Pipeline, tmp_path: Path) -> None:
    work, task, _ = staged_task(pipeline, Elsewhere(), tmp_path)
    assert task.prepared is not None
    lost = next(iter(task.prepared.chunks[0])).column("input_hash")[0].as_py()
    staging = Staging(pipeline.lake, pipeline.target.table, "a")
    for i, batch in enumerate(list(staging.read())):
        staging.write(batch.filter(pc.not_equal(batch.column("input_hash"), lost)), f"kept{i}")
    for name in windows(pipeline):
        if "kept" not in name:
            (Path(pipeline.lake.uri(pipeline.target.table)) / "_staging" / name).unlink()
    with pytest.raises(LakeError, match="is no longer staged") as raised:
        work.commit(task, {}, None)
    assert raised.value.is_retryable
    assert work.commit(task, {lost: "the model gives no finite vector"}, None)
    assert task.outcome.rejected_chunks == 1
    assert lost not in [row["input_hash"] for row in stored(pipeline)]


def changed_pipeline(project: Project) -> Pipeline:
    """The pipeline after a sync and the change of a document of each partition."""
    project.sync()
    for key in "abc":
        project.write(f"{key}/3.md", "Another text.")
    return project.pipeline()


@pytest.mark.parametrize("only_changed", [False, True])
@pytest.mark.parametrize("is_committed", [False, True])
def test_what_a_lost_machine_was_to_commit_is_committed_here(
    project: Project,
    pipeline: Pipeline,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    is_committed: bool,
    only_changed: bool,
) -> None:
    pipeline = changed_pipeline(project) if only_changed else pipeline
    work, task, rejected = staged_task(pipeline, Losing(is_committed), tmp_path)
    chunks = chunk_rows(work, task)
    assert (chunks.changed is not None) is only_changed
    assert not work.commit(task, rejected, chunks.changed)
    assert "embeddings are committed by this machine: a task on the cluster was lost" in caplog.text
    embedded, provenance = task.outcome.embedded, work.due.provenance("embeddings", task.outcome)
    chunks, target = chunk_rows(work, task), pipeline.target
    materialize_embeddings(task.partition, chunks, target, LocalModel(pipeline), provenance, task.outcome)
    assert task.outcome.embedded == embedded
    assert_as_in_one_process(project, stored(pipeline))


def assert_as_in_one_process(project: Project, found: list[dict[str, Any]]) -> None:
    project.set(LAKE="other")
    project.sync()
    assert found == stored(project.pipeline())


class Repeating(Elsewhere):
    """Machines of which each task is lost when it is done, and repeated, as Ray does."""

    def run_task(self, call: Callable[[], Any]) -> Future[Any]:
        super().run_task(call)
        return super().run_task(call)


@pytest.mark.parametrize("only_changed", [False, True])
def test_a_task_that_ray_repeats_finds_its_own_rows(
    project: Project, pipeline: Pipeline, tmp_path: Path, only_changed: bool
) -> None:
    pipeline = changed_pipeline(project) if only_changed else pipeline
    work, task, rejected = staged_task(pipeline, Elsewhere(), tmp_path)
    repeating = replace(work, compute=Repeating())  # type: ignore[arg-type]
    assert repeating.commit(task, rejected, chunk_rows(work, task).changed)
    assert task.outcome.replaced["embeddings"].rows == task.outcome.chunks
    assert_as_in_one_process(project, stored(pipeline))


class Undrawable(Elsewhere):
    """Machines on which nothing can be drawn or checked."""

    def run_task(self, call: Callable[[], Any]) -> Future[Any]:
        return super().run_task(replace(call, history=None) if isinstance(call, CommitCall) else call)  # type: ignore[arg-type]


@pytest.mark.parametrize("only_changed", [False, True])
def test_what_follows_a_commit_elsewhere_can_not_undo_it(
    project: Project, pipeline: Pipeline, tmp_path: Path, only_changed: bool
) -> None:
    pipeline = changed_pipeline(project) if only_changed else pipeline
    work, task, rejected = staged_task(pipeline, Undrawable(), tmp_path)
    assert work.commit(task, rejected, chunk_rows(work, task).changed)
    assert "embeddings" not in task.checks and task.outcome.pictures is None
    assert task.outcome.sampled().token_counts.sum() == len(stored(pipeline)) == task.outcome.chunks
    assert_as_in_one_process(project, stored(pipeline))


def test_a_new_model_over_known_documents_commits_on_the_cluster_too(project: Project, pipeline: Pipeline) -> None:
    project.sync()
    project.set(MODEL="fake:24")
    work, partitions = ingest_of(project.pipeline(), Elsewhere())
    assert work is not None
    due = work.due.partitions(partitions.values())
    assert due == {"raw_documents": [], "chunks": [], "embeddings": list(partitions.values())}


def test_documents_that_another_run_replaced_are_not_committed_over(
    project: Project, pipeline: Pipeline, tmp_path: Path
) -> None:
    work, task, rejected = staged_task(pipeline, Elsewhere(), tmp_path)
    project.write("a/0.md", "Newer.")
    project.sync()
    newer = stored(project.pipeline())
    with pytest.raises(SupersededError, match="another run replaced"):
        work.commit(task, rejected, None)
    assert stored(project.pipeline()) == newer
