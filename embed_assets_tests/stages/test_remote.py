"""Windows for remote workers, without Ray: when a worker refuses, what is sent, and how much at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest

from embed_assets.cluster.nodes import Node, Replicas
from embed_assets.cluster.report import PoolReport, WorkerReport
from embed_assets.cluster.worker import Done
from embed_assets.defs.metadata import engine_metadata
from embed_assets.engine.backend import EmbeddedWindow, Window
from embed_assets.engine.engine import EngineInfo
from embed_assets.engine.metrics import EngineStats
from embed_assets.errors import EmbeddingError, LakeError, ModelError
from embed_assets.lake.staging import Staging
from embed_assets.records import hash_text
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.remote import LakeWorker, RayCompute, worker_recipe
from embed_assets_tests.conftest import Project, topic
from embed_assets_tests.engine.models import small_model

INFO = EngineInfo("cpu", "float32", 1024, "test", 0.0, 16)
REPLICAS = 2
ROOM = 3 * REPLICAS + 1


class Pool:
    """Workers that do nothing, or what the test specifies."""

    info = INFO
    most_replicas = REPLICAS
    report: PoolReport | None = None

    def __init__(self, work: Callable[[bytes], Done] | None = None) -> None:
        self.work, self.sent, self.messages = work, list[Future[Done]](), list[str]()

    def start(self) -> None: ...

    def check(self) -> None: ...

    def submit(self, content: bytes) -> Future[Done]:
        future: Future[Done] = Future()
        if self.work is not None:
            future.set_result(self.work(content))
        self.sent.append(future)
        return future

    def take_news(self) -> list[str]:
        taken, self.messages = self.messages, []
        return taken


def compute_over(pool: Pool, clock: Callable[[], float] = lambda: 0.0) -> RayCompute:
    return RayCompute(pool, INFO, clock)  # type: ignore[arg-type]


def windows(count: int = 10**6) -> Iterator[Window]:
    return (Window([f"text {n}"], [hash_text(f"text {n}")]) for n in range(count))


@pytest.fixture
def pipeline(project: Project) -> Pipeline:
    project.write("a/try.md", topic("try"))
    project.sync()
    return project.pipeline()


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"code": "0"}, ModelError, "have the code .*, it has 0; install the same version"),
        ({"fingerprint": "0" * 32}, ModelError, "'fake:16' has the fingerprint .*'00000000' here"),
        ({"lake_id": "another"}, LakeError, "is another one there, or none; set EMBED_LAKE to a bucket"),
    ],
)
def test_a_worker_with_other_code_model_or_lake_is_refused(
    pipeline: Pipeline, change: dict[str, str], kind: type[Exception], words: str
) -> None:
    recipe = worker_recipe(pipeline)
    assert isinstance(recipe.open(), LakeWorker)
    with pytest.raises(kind, match=words):
        replace(recipe, **change).open()


@pytest.mark.parametrize("where", ["hub", "symlink", "relative", "home"])
def test_a_worker_finds_the_model_wherever_it_is(
    where: str, project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path_factory.mktemp("models")
    model = small_model(models, "xlmr")
    if where == "hub":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models))
        repository = models / "models--org--mini"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("a" * 40)
        shutil.move(model, repository / "snapshots" / ("a" * 40))
        project.set(MODEL="org/mini")
    elif where == "symlink":
        (project.root / "current").symlink_to(model)
        project.set(MODEL="current")
    elif where == "relative":
        shutil.move(model, project.root / "mine")
        project.set(MODEL="./mine")
    else:
        monkeypatch.setenv("HOME", str(models))
        project.set(MODEL="~/model")
    pipeline = project.pipeline()
    recipe = worker_recipe(pipeline)
    os.chdir(models)  # a worker has its own current folder
    worker = recipe.open()
    assert worker.info.dimension == 32
    assert recipe.table.space == pipeline.model.space.name


def staging_of(pipeline: Pipeline, key: str = "another") -> Staging:
    return Staging(pipeline.lake, pipeline.embeddings_table, key)


def embed(compute: RayCompute, some: Iterator[Window], key: str = "another") -> list[EmbeddedWindow]:
    return list(compute.start(key, ["a text"], 3).embed_windows(some, lambda texts, tokens: None))


def rows_of(done: EmbeddedWindow, staging: Staging) -> pa.RecordBatch:
    assert done.staged_as is not None
    return staging.read_window(done.staged_as)


def test_a_worker_stages_what_one_process_computes(pipeline: Pipeline) -> None:
    worker, staging = worker_recipe(pipeline).open(), staging_of(pipeline)
    [done] = embed(compute_over(Pool(lambda content: worker.run(content, is_retry=False))), windows(1))
    batch = rows_of(done, staging)
    expected = pipeline.model.engine.embedder.embed(["text 0"])
    assert batch.column("input_hash").to_pylist() == [hash_text("text 0")]
    assert np.array_equal(np.array(batch.column("embedding")[0].as_py(), np.float32), expected.vectors[0])
    assert done.stats.tokens == expected.stats.tokens
    assert [batch.num_rows for batch in staging_of(pipeline).read()] == [1]
    staging.clear()
    assert list(staging_of(pipeline).read()) == []


def test_windows_staged_by_a_lost_worker_are_not_embedded_again(pipeline: Pipeline) -> None:
    worker = worker_recipe(pipeline).open()

    def lost_once(content: bytes) -> Done:
        assert worker.run(content, is_retry=False).stats.texts == 1
        return worker.run(content, is_retry=True)

    [done] = embed(compute_over(Pool(lost_once)), windows(1))
    assert rows_of(done, staging_of(pipeline)).num_rows == 1 and done.stats.texts == 0


def test_a_window_removed_by_another_run_is_a_retryable_error(pipeline: Pipeline) -> None:
    worker = worker_recipe(pipeline).open()

    def cleared(content: bytes) -> Done:
        done = worker.run(content, is_retry=False)
        other = staging_of(pipeline)
        list(other.read())
        other.clear()
        return done

    with pytest.raises(LakeError, match=r"the staged window .*_staging.* is gone: another run") as error:
        [done] = embed(compute_over(Pool(cleared)), windows(1))
        rows_of(done, staging_of(pipeline))
    assert error.value.is_retryable


def test_texts_that_the_model_cannot_embed_come_back_with_the_reason(pipeline: Pipeline) -> None:
    answer = json.dumps({"rows": 0, "rejected": {"0": "too odd"}})
    [done] = embed(compute_over(Pool(lambda _: Done(answer, EngineStats()))), windows(1))
    assert done.rejected == {0: "too odd"} and done.staged_as is None


def test_windows_in_flight_are_bounded(pipeline: Pipeline) -> None:
    class Stopped(Exception):
        pass

    def stop(texts: int, tokens: int) -> None:
        raise Stopped

    pool = Pool()
    compute = compute_over(pool)
    for round in (1, 2):  # abandoned windows make room
        with pytest.raises(Stopped):
            list(compute.start("a", ["a text"], 10**6).embed_windows(windows(), stop))
        assert len(pool.sent) == round * ROOM
        for future in pool.sent[-ROOM:]:
            future.set_exception(EmbeddingError("stopped"))


def test_a_window_has_a_worthwhile_share_or_the_target_duration() -> None:
    compute = compute_over(Pool())
    assert not compute.is_full(249, 10**9, 1000)
    assert compute.is_full(250, 1, 1000), "a share of a worker, before anything was measured"
    assert not compute.is_full(63, 1, 10) and compute.is_full(64, 1, 10), "never but a few texts"
    for _ in range(12):
        compute.adapt(EngineStats(tokens=100_000, seconds=1.0))
    assert not compute.is_full(250, 49_999, 1000) and compute.is_full(250, 50_001, 1000), "half a second's work"
    assert compute.is_full(250, 500_000, 10**6), "five seconds' work"


def report(*workers: WorkerReport, starting: int = 0, again: int = 0, info: EngineInfo | None = None) -> PoolReport:
    nodes = [Node("a", 4, 0, 4), Node("b", 4, 1, 4)]
    return PoolReport(
        "the Ray cluster at head:1", "http://head:2", nodes, Replicas(1, 8, 1, 0.0), list(workers), starting,
        sum(w.tokens_per_second for w in workers), again, info,
    )  # fmt: skip


def test_progress_names_the_cluster_once_and_the_workers_every_ten_seconds() -> None:
    now = [100.0]
    pool = Pool()
    compute = compute_over(pool, lambda: now[0])
    assert compute.news() == []
    pool.report = report()
    assert compute.news() == [
        "the Ray cluster at head:1, dashboard http://head:2: 2 nodes with 8 CPUs and 1 GPUs; "
        "up to 8 workers of 1 CPUs and 0 GPUs",
        "no worker has a place yet",
    ]
    pool.report, pool.messages = report(starting=2), ["a budget was halved"]
    now[0] += 9
    assert compute.news() == ["a budget was halved"]
    now[0] += 2
    assert compute.news() == ["2 workers load the model"]
    pool.report = report(info=INFO)
    now[0] += 11
    assert compute.news() == ["workers are at their first windows"]
    pool.report = report(*(WorkerReport(f"host{n}", 10, 1000.0 + n, 90.0) for n in range(6)), again=3)
    now[0] += 11
    [line] = compute.news()
    assert line.startswith("6 workers, 6,015 tokens/s; the slowest: host0: 1,000 tokens/s, 90 % busy; host1")
    assert line.endswith("; 3 windows were begun again") and "host4" not in line


def test_metadata_names_the_workers_and_the_dashboard() -> None:
    work = PartitionOutcome("a", embedded=1, engine=EngineStats(texts=1, tokens=100, seconds=1.0))
    found = engine_metadata(work, INFO, report(WorkerReport("host0", 100, 900.0, 50.0), WorkerReport("b", 9, 1e3, 40)))
    assert found["tokens_per_second"] == 1900.0, "of all workers, not of the average one"
    assert found["ray_dashboard"] == dg.MetadataValue.url("http://head:2")
    assert (found["ray_workers"], found["ray_nodes"], found["ray_utilization_percent"]) == (2, 2, 45.0)
    assert str(found["advice"]).startswith("workers were busy 45 % of the time")
    assert "advice" in engine_metadata(work, INFO, None) and "ray_workers" not in engine_metadata(work, INFO, None)
    assert engine_metadata(PartitionOutcome("a"), INFO, report())["tokens_per_second"] == 0.0
