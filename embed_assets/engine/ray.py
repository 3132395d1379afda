"""Scale-out: the same model on the workers of a Ray cluster.

    submit ─▶ feed ─▶ [Ray Data: map_batches over an actor pool] ─▶ results

Ray schedules, scales, holds back, and starts again; here is only what it can't know: what a worker is, and when to give
up.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from embed_assets.engine.engine import EngineInfo
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
    gave_up,
    list_nodes,
    lost,
    no_room,
    plan_replicas,
    probe,
    workers_lost,
)
from embed_assets.engine.ray_feed import Feed, FeedStatus, WorkerState, feed_source
from embed_assets.engine.ray_worker import Done, RayWorker, Recipe
from embed_assets.errors import EmbeddingError, ModelError, SettingsError

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
_SHOWN_WORKERS = 4


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What one worker did."""

    address: str
    """Of its machine, and its process there."""
    tokens: int
    tokens_per_second: float
    """While it was busy."""
    busy_percent: float
    """Of the time since it had loaded the model."""

    def __str__(self) -> str:
        return f"{self.address}: {self.tokens_per_second:,.0f} tokens/s, {self.busy_percent:.0f} % busy"


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What the cluster did so far."""

    cluster: str
    dashboard: str
    nodes: list[Node]
    replicas: Replicas
    workers: list[WorkerReport]
    """Those that ran, the slowest first."""
    starting: int
    """Workers that load the model."""
    tokens_per_second: float
    """Of all workers together, in the time in which any was at work."""
    windows_begun_again: int
    """Windows that were begun by another worker as well, for the first was lost or late: at most so many were embedded
    twice."""
    info: EngineInfo | None
    """Where and how the model runs on a worker that has loaded it."""

    def __str__(self) -> str:
        replicas, cpus, gpus = self.replicas, sum(n.cpus for n in self.nodes), sum(n.gpus for n in self.nodes)
        return (
            f"{self.cluster}, dashboard {self.dashboard or 'none'}: {len(self.nodes)} nodes with {cpus:g} CPUs and "
            f"{gpus:g} GPUs; up to {replicas.most} workers of {replicas.cpus} CPUs and {replicas.gpus:g} GPUs"
        )

    def describe_workers(self) -> str:
        """One line: how many ran, how fast they are together, and how fast and how busy the slowest are each."""
        if not self.workers:
            waiting = "no worker has a place yet" if self.info is None else "workers are at their first windows"
            return f"{self.starting} workers load the model" if self.starting else waiting
        shown = self.workers[:_SHOWN_WORKERS]
        each = "; ".join(map(str, shown))
        slowest = " the slowest:" if len(self.workers) > len(shown) else ""
        again = f"; {self.windows_begun_again} windows were begun again" if self.windows_begun_again else ""
        return f"{len(self.workers)} workers, {self.tokens_per_second:,.0f} tokens/s;{slowest} {each}{again}"

    @property
    def utilization_percent(self) -> float:
        """How busy the workers were on average."""
        return round(sum(w.busy_percent for w in self.workers) / len(self.workers), 1) if self.workers else 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A piece of work is done, or can't be."""

    number: int
    result: Done | Exception


@dataclass(frozen=True, slots=True)
class Over:
    """All is over: no more pieces will be done."""

    error: Exception


@dataclass(frozen=True, slots=True)
class News:
    """A line for the run's log."""

    line: str


class RayPool:
    """Workers on a Ray cluster that do pieces of work.

    What becomes of them is told from threads of its own, maybe twice. After `stop`, or when the cluster is lost, `Over`
    stands for all that is not finished.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: RayOptions,
        tell: Callable[[Finished | Over | News], None],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._recipe, self._options, self._tell = recipe, options, tell
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._cluster: Cluster | None = None
        self._replicas = Replicas(1, 1, 1, 0.0)
        self._feed: Any = None
        self._error: Exception | None = None
        self._is_ready = threading.Event()
        self._is_closed = threading.Event()
        self._status = FeedStatus()
        self._nodes: list[Node] = []

    @property
    def report(self) -> PoolReport | None:
        """What the cluster did so far; None before the start."""
        if self._cluster is None:
            return None
        if self._error is None:
            with contextlib.suppress(Exception):  # then it is as old as the last answer
                self._refresh()
        status, living = self._status, self._living
        workers = [_report(w, status.now) for w in status.workers if w.tokens and w.node in living]
        tokens = sum(worker.tokens for worker in status.workers)
        return PoolReport(
            str(self._cluster),
            self._cluster.dashboard,
            self._nodes,
            self._replicas,
            sorted(workers, key=lambda worker: worker.tokens_per_second),
            sum(w.node in living and not w.is_ready for w in status.workers),
            round(tokens / status.active_seconds, 1) if status.active_seconds else 0.0,
            status.begun_again,
            # Of those that did something: tuned, if that paid.
            next((w.info for w in sorted(status.workers, key=lambda w: -w.tokens) if w.info is not None), None),
        )

    def start(self) -> None:
        """Connect, and wait until a worker has loaded the model. To be called once.

        Raises ``SettingsError`` when there is no cluster or no room on it, ``ModelError`` when the model can't be
        loaded, ``EmbeddingError`` when the cluster was lost.
        """
        self._check()
        self._begin()
        self._is_ready.wait()
        self._check()

    def submit(self, number: int, content: bytes) -> None:
        """Have a piece of work done by any worker, under a number of its own. Call `start` before."""
        import ray

        self._check()
        ray.get(self._feed.put.remote(number, [ray.put(content)]))

    def stop(self) -> None:
        """Let everything that is under way end with an error."""
        self._fail(EmbeddingError("embedding was stopped before the window was finished; start it again"))
        self._is_closed.set()

    def close(self) -> None:
        """End all work, the workers, and a local Ray."""
        self.stop()
        if self._cluster is not None:
            disconnect()

    def _check(self) -> None:
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
            disconnect()
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

        replicas = self._replicas
        _prepare_streaming(ray, keeps_workers=self._options.replicas is None)
        work = ray.data.read_datasource(feed_source(self._feed), override_num_blocks=1, num_cpus=0, label_selector=here)
        return work.map_batches(
            RayWorker,
            fn_constructor_args=(self._recipe, self._feed, replicas.cpus, replicas.gpus),
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
            # Results are small, so that they come with the word that they are there: none is lost with its node.
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in batch.to_pylist():
                    self._settle(row)
            self._fail(EmbeddingError("the Ray dataset ended early; run again", is_retryable=True))
        except Exception as error:
            if not self._is_closed.is_set():
                self._fail(self._explained(error))

    def _settle(self, row: dict[str, Any]) -> None:
        self._feed.forget.remote(row["number"])
        if row["error"]:
            result: Done | Exception = EmbeddingError(row["error"], is_retryable=row["is_retryable"])
        else:
            result = Done(row["answer"], EngineStats(**json.loads(row["stats"])))
        self._tell(Finished(row["number"], result))

    def _explained(self, error: Exception) -> Exception:
        """One line for what stopped the dataset."""
        with contextlib.suppress(Exception):
            self._refresh()
        if self._status.failure is not None:
            return ModelError(self._status.failure, is_retryable=self._status.is_retryable)
        _log.debug("the dataset was stopped", exc_info=error)
        return gave_up(self._cluster, error)

    def _fail(self, error: Exception) -> None:
        """End it all with an error; the first one counts."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
        self._tell(Over(error))
        self._is_ready.set()

    def _watch(self) -> None:
        """In a thread: keep the status, and see to it that nobody waits for ever."""
        assert self._cluster is not None
        cluster, silent, seen = self._cluster, 0, time.monotonic()
        while not self._is_closed.wait(_POLL_SECONDS):
            try:
                probe(cluster.address)
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
            living = self._living
            if any(worker.node in living for worker in self._status.workers):
                seen = time.monotonic()
            self._judge(cluster, time.monotonic() - seen)

    @property
    def _living(self) -> set[str]:
        """Ids of the nodes that are there."""
        return {node.node_id for node in self._nodes}

    def _refresh(self) -> None:
        import ray

        self._status = ray.get(self._feed.status.remote(), timeout=10)
        for message in self._status.messages:
            self._tell(News(message))
        self._nodes = list_nodes()

    def _put_late_again(self) -> None:
        import ray

        again = ray.get(self._feed.put_late_again.remote(self._living, self._patience_seconds), timeout=10)
        if again:
            self._tell(News(f"{len(again)} windows are late, or their worker was lost: given to others as well"))

    def _judge(self, cluster: Cluster, seconds_without_workers: float) -> None:
        """See whether workers start, load the model, and are still there."""
        status = self._status
        if status.failure is not None:
            self._fail(ModelError(status.failure, is_retryable=status.is_retryable))
        elif any(worker.starts_in_vain > _MOST_STARTS for worker in status.workers):
            self._fail(
                EmbeddingError(
                    f"a worker of {cluster} was started {_MOST_STARTS + 1} times and died each time while it "
                    "loaded the model, most often for want of memory; give replicas more of it, or fewer per node "
                    "(EMBED_RAY_CPUS_PER_REPLICA), or take a smaller model"
                )
            )
        elif seconds_without_workers > self._options.wait_seconds and not status.workers:
            self._fail(SettingsError(no_room(cluster, self._nodes, self._replicas)))
        elif seconds_without_workers > self._options.wait_seconds:
            self._fail(workers_lost(cluster, self._nodes, self._replicas, self._options.wait_seconds))
        elif any(worker.is_ready for worker in status.workers):
            self._is_ready.set()


def _report(worker: WorkerState, now: float) -> WorkerReport:
    seconds = worker.busy_seconds
    lived = max(now - worker.ready_since, seconds, 1e-3)
    speed = worker.tokens / seconds if seconds else 0.0
    return WorkerReport(worker.address, worker.tokens, round(speed, 1), round(100 * seconds / lived, 1))


def _prepare_streaming(ray: Any, keeps_workers: bool) -> None:
    """Set how this process's dataset runs: every row is passed on at once, and nothing is printed.

    With `keeps_workers`, none is removed while it has nothing to do: it would load the model anew a moment later.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    if keeps_workers:
        context.autoscaling_config.actor_pool_util_downscaling_threshold = -1.0
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors arrive as such
    # That a map's actors may restart is set by a name which Ray deprecates without another one.
    warnings.simplefilter("ignore")
