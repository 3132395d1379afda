"""Scale-out: the same model on the workers of a Ray cluster.

    submit ─▶ feed ─▶ [Ray Data: map_batches over an actor pool] ─▶ futures

Ray schedules, retries, scales and holds back; here is only what it can't know: what a worker is, and when to give up.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from embed_assets.engine.engine import EngineFacts
from embed_assets.engine.faults import reason_of
from embed_assets.engine.metrics import EngineStats
from embed_assets.engine.ray_cluster import (
    Cluster,
    Node,
    RayOptions,
    Replicas,
    check_room,
    connect,
    disconnect,
    knock,
    list_nodes,
    lost,
    no_room,
    plan_replicas,
)
from embed_assets.engine.ray_feed import Feed, FeedStatus, WorkerState, feed_source
from embed_assets.engine.ray_worker import Done, RayWorker, Recipe
from embed_assets.errors import EmbeddingError, ModelError, SettingsError, hide_secrets

_log = logging.getLogger(__name__)

TASKS_PER_WORKER = 2
"""One is worked on, the next one lies ready."""
_POLL_SECONDS = 2.0
_SILENT_POLLS = 5
"""So many polls in a row without an answer, and the cluster is lost. Less than the minute after which Ray ends a
process that can't reach its head."""
PATIENCE_SECONDS = 10.0
"""After which a lost worker's windows, or those that others overtook, are given to others."""
_MOST_STARTS = 4
"""A worker that was started so often and never did anything won't do anything."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What one worker did."""

    place: str
    """Address and process."""
    tokens: int
    tokens_per_second: float
    """While it was busy."""
    busy_percent: float
    """Of the time since it had loaded the model."""


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What the cluster did so far."""

    cluster: str
    dashboard: str
    nodes: list[Node]
    replicas: Replicas
    workers: list[WorkerReport]
    """Those that ran."""

    def __str__(self) -> str:
        replicas, cpus, gpus = self.replicas, sum(n.cpus for n in self.nodes), sum(n.gpus for n in self.nodes)
        return (
            f"{self.cluster}, dashboard {self.dashboard or 'none'}: {len(self.nodes)} nodes with {cpus:g} CPUs and "
            f"{gpus:g} GPUs; up to {replicas.most} workers of {replicas.cpus} CPUs and {replicas.gpus:g} GPUs"
        )

    def describe_workers(self) -> str:
        """One line: how many ran, how fast and how busy each is."""
        each = [f"{w.place}: {w.tokens_per_second:,.0f} tokens/s, {w.busy_percent:.0f} % busy" for w in self.workers]
        return f"{len(each)} workers, {self.tokens_per_second:,.0f} tokens/s: {'; '.join(each)}"

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together, while they are busy."""
        return sum(worker.tokens_per_second for worker in self.workers)


class RayPool:
    """Workers on a Ray cluster that do pieces of work. It is started when the first piece comes.

    Usable from many threads. After `close`, or when the cluster is lost, all pieces end with an error.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: RayOptions,
        patience_seconds: float = PATIENCE_SECONDS,
        on_end: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """`on_end` hears what ended the pool, from any thread."""
        self._recipe, self._options, self._patience_seconds = recipe, options, patience_seconds
        self._on_end = on_end
        self._lock = threading.RLock()
        self._cluster: Cluster | None = None
        self._replicas = Replicas(1, 1, 1, 0.0)
        self._feed: Any = None
        self._futures: dict[int, Future[Done]] = {}
        self._error: Exception | None = None
        self._is_ready = threading.Event()
        self._is_closed = threading.Event()
        self._status = FeedStatus(0.0, [])
        self._nodes: list[Node] = []

    @property
    def most_replicas(self) -> int:
        """Workers there will be at most; 1 before the start."""
        return self._replicas.most

    @property
    def facts(self) -> EngineFacts | None:
        """Where and how the model runs on a worker that has loaded it."""
        return next((w.facts for w in self._status.workers if w.facts is not None), None)

    @property
    def report(self) -> PoolReport | None:
        """What the cluster did so far; None before the start."""
        if self._cluster is None:
            return None
        if self._error is None:
            with contextlib.suppress(Exception):  # then it is as old as the last answer
                self._refresh()
        now = self._status.now
        workers = [_report(worker, now) for worker in self._status.workers if worker.texts]
        return PoolReport(str(self._cluster), self._cluster.dashboard, self._nodes, self._replicas, workers)

    def start(self) -> None:
        """Connect, and wait until a worker has loaded the model.

        Raises ``SettingsError`` when there is no cluster or no room on it, ``ModelError`` when the model can't be
        loaded, ``EmbeddingError`` when the cluster was lost.
        """
        with self._lock:
            self.check()
            if self._cluster is None:
                self._begin()
        while not self._is_ready.wait(0.2):
            self.check()
        self.check()

    def submit(self, content: bytes) -> Future[Done]:
        """Have a piece of work done by any worker. Call `start` before."""
        import ray

        future: Future[Done] = Future()
        with self._lock:
            self.check()
            number = ray.get(self._feed.put.remote([ray.put(content)]))
            self._futures[number] = future
        return future

    def stop(self) -> None:
        """Let everything that is under way end with an error."""
        self._fail(EmbeddingError("embedding was stopped before the window was finished; start it again"))
        self._is_closed.set()

    def close(self) -> None:
        """End all work, the workers, and a local Ray."""
        self.stop()
        if self._cluster is not None:
            disconnect(self._cluster)

    def check(self) -> None:
        """Raise what ended the pool, if it is over."""
        if self._error is not None:
            raise self._error

    def _begin(self) -> None:
        import ray

        cluster = connect(self._options)
        try:
            self._nodes = list_nodes()
            self._replicas = plan_replicas(self._nodes, self._options)
            check_room(cluster, self._nodes, self._replicas)
        except Exception:
            disconnect(cluster)
            raise
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        actor = ray.remote(Feed).options(num_cpus=0, max_concurrency=10_000, label_selector=here)
        self._feed = actor.remote()
        self._cluster = cluster
        dataset = self._dataset(here)
        for name, target in (("ray-results", lambda: self._collect(dataset)), ("ray-watch", self._watch)):
            threading.Thread(target=target, name=name, daemon=True).start()

    def _dataset(self, here: dict[str, str]) -> Any:
        """Feed and workers as a dataset whose rows are results."""
        import ray

        replicas, share = self._replicas, min(1.0, self._replicas.gpus or 1.0)
        with _streaming_context(ray):
            work = ray.data.read_datasource(
                feed_source(self._feed), override_num_blocks=1, num_cpus=0, label_selector=here
            )
            return work.map_batches(
                RayWorker,
                fn_constructor_args=(self._recipe, self._feed, replicas.cpus, share),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=replicas.least, max_size=replicas.most, max_tasks_in_flight_per_actor=TASKS_PER_WORKER
                ),
                num_cpus=replicas.cpus,
                num_gpus=replicas.gpus or None,
                # While a node's loss is being noticed, Ray tries again within milliseconds: any number would be used
                # up. What dies again and again is counted by the feed.
                max_restarts=-1,
                max_task_retries=-1,
            )

    def _collect(self, dataset: Any) -> None:
        """In a thread: hand out the results as they come."""
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in batch.to_pylist():
                    self._settle(row)
            self._fail(EmbeddingError("the Ray dataset ended early; run again", may_pass=True))
        except Exception as error:
            if not self._is_closed.is_set():
                self._fail(self._explained(error))

    def _settle(self, row: dict[str, Any]) -> None:
        with self._lock:
            future = self._futures.pop(row["number"], None)
        if future is None:
            return  # done before: a worker was lost after its result had come
        self._feed.forget.remote(row["number"])
        if row["error"]:
            future.set_exception(EmbeddingError(row["error"], may_pass=row["may_pass"]))
        else:
            future.set_result(Done(row["content"], row["detail"], EngineStats(**json.loads(row["stats"]))))

    def _explained(self, error: Exception) -> Exception:
        """One line for what stopped the dataset."""
        with contextlib.suppress(Exception):
            self._refresh()
        if self._status.failure is not None:
            return ModelError(self._status.failure, may_pass=self._status.may_pass)
        _log.debug("the dataset was stopped", exc_info=error)
        lines = [line for line in hide_secrets(str(error)).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {' '.join(lines[-1:])[:300]}"
        return EmbeddingError(f"{self._cluster} gave up ({reason}); run again", may_pass=True)

    def _fail(self, error: Exception) -> None:
        """End everything that is under way with an error; the first one counts."""
        with self._lock:
            is_first, self._error = self._error is None, self._error or error
            futures, self._futures = list(self._futures.values()), {}
        if is_first:
            self._on_end(error)
        for future in futures:
            future.set_exception(self._error)
        self._is_ready.set()

    def _watch(self) -> None:
        """In a thread: keep the status, and see to it that nobody waits for ever."""
        assert self._cluster is not None
        cluster, started, silent = self._cluster, time.monotonic(), 0
        while not self._is_closed.wait(_POLL_SECONDS):
            try:
                knock(cluster.address)
                self._refresh()
                self._put_late_again()
                silent = 0
            except Exception as error:
                silent += 1
                _log.debug("%s does not answer", cluster, exc_info=error)
                if silent >= _SILENT_POLLS:
                    self._fail(lost(cluster, reason_of(error)))
                    return
                continue
            self._judge(cluster, time.monotonic() - started)

    def _refresh(self) -> None:
        import ray

        self._status = ray.get(self._feed.status.remote(), timeout=10)
        self._nodes = list_nodes()

    def _put_late_again(self) -> None:
        import ray

        living = [node.node_id for node in self._nodes]
        again = ray.get(self._feed.put_late_again.remote(living, self._patience_seconds), timeout=10)
        if again:
            _log.warning("%d windows are late, or their worker was lost: given to others as well", len(again))

    def _judge(self, cluster: Cluster, seconds: float) -> None:
        """See whether workers start, load the model, and do something."""
        status = self._status
        if status.failure is not None:
            self._fail(ModelError(status.failure, may_pass=status.may_pass))
        elif any(worker.starts_in_vain > _MOST_STARTS for worker in status.workers):
            self._fail(
                EmbeddingError(
                    f"a worker of {cluster} was started {_MOST_STARTS + 1} times and died each time while it "
                    "loaded the model, most often for want of memory; give replicas more of it, or fewer per node "
                    "(EMBED_RAY_CPUS_PER_REPLICA), or take a smaller model"
                )
            )
        elif any(worker.is_ready for worker in status.workers):
            self._is_ready.set()
        elif not status.workers and seconds > self._options.wait_seconds:
            self._fail(SettingsError(no_room(cluster, self._nodes, self._replicas)))


def _report(worker: WorkerState, now: float) -> WorkerReport:
    seconds = worker.busy_seconds
    lived = max(now - worker.ready_since, seconds, 1e-3)
    speed = worker.tokens / seconds if seconds else 0.0
    return WorkerReport(worker.place, worker.tokens, round(speed, 1), round(100 * seconds / lived, 1))


@contextlib.contextmanager
def _streaming_context(ray: Any) -> Iterator[None]:
    """The settings of a dataset that is made meanwhile: every row is passed on at once, and nothing is printed."""
    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors arrive as such
    ours = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "target_max_block_size": 1,
        "target_min_block_size": 1,
    }
    before = {name: getattr(context, name) for name in ours}
    for name, value in ours.items():
        setattr(context, name, value)
    try:
        with warnings.catch_warnings():
            # That a map's actors may restart is set by a name which Ray deprecates without another one.
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
