"""The supervisor: starts workers on a cluster, hands windows to them, and replaces those that are lost.

    submit ─▶ waiting ─▶ worker: one window under way, one lies ready ─▶ tell(Finished)
                 ▲                     │ lost, hung or slow
                 └─────────────────────┘

All state belongs to one loop, `run`, which performs one event after the other: a window arrives, a worker's call ends,
the cluster was looked at.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

from embed_assets.cluster.nodes import Cluster, Node, Replicas, no_room, nodes_lost
from embed_assets.cluster.report import PoolReport, WorkerReport
from embed_assets.cluster.worker import Done, Place, Reply
from embed_assets.engine.engine import EngineInfo
from embed_assets.errors import EmbeddingError, ModelError, SettingsError, UserError

WINDOWS_PER_WORKER = 2
"""One is under way, the next one lies ready."""
_MOST_DEATHS = 4
"""Workers that may die of one window before it is given up, or while they load the model in a row."""
_DEATHS_PER_HANG = 2
"""A worker that hangs counts double: each time costs minutes."""
_SLOW_FACTOR = 4
"""A window that takes so many times as long as the longest so far is given to another worker as well."""
_ADVICE = "give them more memory (EMBED_RAY_CPUS_PER_REPLICA) or lower EMBED_MAX_BATCH_TOKENS"


@dataclass(frozen=True, slots=True)
class Patience:
    """When to stop waiting, in seconds."""

    room: float = 120.0
    """Without a worker for so long, there is no room for one."""
    slow: float = 60.0
    """A window is not slow before, however fast others were."""
    hung: float = 120.0
    """A worker that embeds no text for so long hangs. A batch takes much less, even on a slow core."""
    idle: float = 30.0
    """A worker above the least number that has nothing to do for so long is removed."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Told when a window is done, or can't be."""

    number: int
    result: Done | UserError
    report: PoolReport


@dataclass(frozen=True, slots=True)
class Status:
    """Told whenever the cluster was looked at, and when a worker has loaded the model."""

    report: PoolReport
    is_ready: bool
    """Whether a worker has loaded the model."""


Told: TypeAlias = Finished | Status | str | UserError
"""A string is a line for the run's log; an error ends everything."""
Then: TypeAlias = Callable[[Any], None]
"""Called with a call's result or `Lost`, from any thread."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The result of a call whose worker was lost."""

    reason: str


class Actor(Protocol):
    """A worker's process."""

    def call(self, method: str, then: Then, *arguments: Any) -> None:
        """Call a method of its `ModelActor`."""
        ...

    def kill(self) -> None:
        """End it."""
        ...


@dataclass(eq=False, slots=True)
class _Window:
    number: int
    content: bytes
    workers: set[int] = field(default_factory=set)
    """Numbers of the workers that have it."""
    is_retry: bool = False
    """Whether some worker may have begun it before."""
    deaths: int = 0


@dataclass(eq=False, slots=True)
class _Worker:
    number: int
    actor: Actor
    starts_in_vain: int
    """Workers that had died one after the other while they loaded the model, when this one was started."""
    place: Place | None = None
    info: EngineInfo | None = None
    """None until the model is loaded."""
    windows: deque[_Window] = field(default_factory=deque)
    """The first one is under way."""
    since: float = 0.0
    """When the first window was begun or, without one, the last one ended."""
    progress: Any = None
    """When last asked."""
    moved: float = 0.0
    """When the progress last changed."""
    tokens: int = 0
    busy_seconds: float = 0.0
    ready_since: float = 0.0

    @property
    def address(self) -> str:
        return self.place.address if self.place else "a worker without a place"

    def report(self, now: float) -> WorkerReport:
        lived = max(now - self.ready_since, self.busy_seconds, 1e-3)
        speed = self.tokens / self.busy_seconds if self.busy_seconds else 0.0
        return WorkerReport(self.address, self.tokens, round(speed, 1), round(100 * self.busy_seconds / lived, 1))


class Supervisor:
    """Windows and workers of one run."""

    def __init__(
        self,
        cluster: Cluster,
        nodes: Sequence[Node],
        replicas: Replicas,
        start: Callable[[], Actor],
        tell: Callable[[Told], None],
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start` starts a worker wherever there is room, now or later; `tell` is called by the loop."""
        self._cluster, self._nodes, self._replicas = cluster, list(nodes), replicas
        self._start, self._tell, self._patience, self._clock = start, tell, patience, clock
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._windows: dict[int, _Window] = {}
        """Those that are not done."""
        self._waiting: deque[_Window] = deque()
        self._workers: dict[int, _Worker] = {}
        self._numbers = itertools.count(1)
        self._leaving: set[str] = set()
        self._info: EngineInfo | None = None
        self._is_over = False
        self._starts_in_vain = self._begun_again = self._tokens = 0
        self._longest = self._active_seconds = 0.0
        self._counted_until = self._room_since = clock()

    def submit(self, number: int, content: bytes) -> None:
        """Have a window embedded, under a number of its own; from any thread."""
        self._events.put(lambda: self._add(_Window(number, content)))

    def look(self, nodes: Sequence[Node]) -> None:
        """Tell what the nodes are now, every few seconds; from any thread."""
        now = self._clock()  # not when the loop comes to it: the replies before it are to be seen first
        self._events.put(lambda: self._look(list(nodes), now))

    def fail(self, error: UserError) -> None:
        """End everything with an error; from any thread."""
        self._events.put(lambda: self._end(error))

    def run(self) -> None:
        """Work until an error ends it, which `tell` has heard then."""
        self._start_workers()
        self._tell(Status(self._report(), is_ready=False))
        while not self._is_over:
            self._events.get()()

    def _end(self, error: UserError) -> None:
        self._is_over = True
        self._tell(error)

    # Workers

    def _start_workers(self) -> None:
        """As many as the windows are worth, within the range. Those on a node that is about to go don't count."""
        staying = sum(self._stays(worker) for worker in self._workers.values())
        for _ in range(self._wanted - staying):
            worker = _Worker(next(self._numbers), self._start(), self._starts_in_vain)
            self._workers[worker.number] = worker
            worker.actor.call("place", self._then(self._placed, worker))

    @property
    def _wanted(self) -> int:
        """How many workers the windows are worth, within the range."""
        return max(self._replicas.least, min(self._replicas.most, -(-len(self._windows) // WINDOWS_PER_WORKER)))

    def _stays(self, worker: _Worker) -> bool:
        return worker.place is None or worker.place.node_id not in self._leaving

    def _then(self, do: Callable[..., None], worker: _Worker, *arguments: object) -> Then:
        """A callback for a call's result, which has the loop `do` something with it."""
        return lambda result: self._events.put(partial(self._ended, do, worker, *arguments, result))

    def _ended(self, do: Callable[..., None], worker: _Worker, *arguments: Any) -> None:
        """A call ended: with a result, or because its worker was lost."""
        if worker.number not in self._workers:
            return  # it is known to be lost
        if isinstance(result := arguments[-1], Lost):
            self._lose(worker, result.reason)
        else:
            do(worker, *arguments)
        if not self._is_over:
            self._hand_out()

    def _placed(self, worker: _Worker, place: Place) -> None:
        worker.place = place
        worker.actor.call("load", self._then(self._loaded, worker))

    def _loaded(self, worker: _Worker, result: EngineInfo | UserError) -> None:
        if isinstance(result, UserError):  # where another worker could load it, it may be loaded later
            self._end(ModelError(str(result), is_retryable=result.is_retryable or self._info is not None))
            return
        self._info = worker.info = result
        self._starts_in_vain = 0
        for other in self._workers.values():
            other.starts_in_vain = 0
        worker.since = worker.ready_since = self._clock()
        self._tell(Status(self._report(), is_ready=True))

    def _lose(self, worker: _Worker, reason: str, deaths: int = 1) -> None:
        """Replace a worker; others get its windows, of which the one under way may have been its end."""
        self._count_time()
        self._remove(worker)
        if worker.info is None:  # of several that were started at a time, one counts
            self._starts_in_vain = max(self._starts_in_vain, worker.starts_in_vain + 1)
        if self._starts_in_vain > _MOST_DEATHS and not any(other.info for other in self._workers.values()):
            times = f"was started {self._starts_in_vain} times and died each time while it loaded the model ({reason})"
            self._end(EmbeddingError(f"a worker of {self._cluster} {times}; {_ADVICE}, or take a smaller model"))
            return
        for window in reversed(worker.windows):
            window.workers.discard(worker.number)
            window.is_retry = True
            window.deaths += deaths if window is worker.windows[0] else 0
            if window.deaths >= _MOST_DEATHS:
                message = f"{window.deaths} workers died of the same window of texts ({reason}); {_ADVICE}"
                self._finish(window, EmbeddingError(message))
            elif not window.workers and window.number in self._windows and window not in self._waiting:
                self._waiting.appendleft(window)
        self._tell(f"{worker.address} was lost ({reason}); its {len(worker.windows)} windows are given to others")

    def _remove(self, worker: _Worker) -> None:
        del self._workers[worker.number]
        worker.actor.kill()

    # Windows

    def _add(self, window: _Window) -> None:
        self._windows[window.number] = window
        self._waiting.append(window)
        self._hand_out()

    def _hand_out(self) -> None:
        """Give waiting windows to the workers that have the least to do."""
        self._start_workers()
        ready = [worker for worker in self._workers.values() if worker.info is not None and self._stays(worker)]
        for window in list(self._waiting):
            free = [worker for worker in ready if len(worker.windows) < WINDOWS_PER_WORKER]
            if not free:
                return
            if others := [worker for worker in free if worker.number not in window.workers]:
                self._waiting.remove(window)
                self._give(window, min(others, key=lambda worker: len(worker.windows)))

    def _give(self, window: _Window, worker: _Worker) -> None:
        self._count_time()
        self._begun_again += window.is_retry
        window.workers.add(worker.number)
        worker.windows.append(window)
        if len(worker.windows) == 1:
            self._begin(worker)
        worker.actor.call("run", self._then(self._replied, worker, window), window.content, window.is_retry)

    def _begin(self, worker: _Worker) -> None:
        """The first of a worker's windows is under way from now on."""
        worker.since = worker.moved = self._clock()
        worker.progress = None

    def _replied(self, worker: _Worker, window: _Window, reply: Reply) -> None:
        for line in reply.warnings:
            self._tell(line)
        if reply.result is None:
            self._lose(worker, reply.reason)
            return
        self._count_time()
        worker.windows.remove(window)
        window.workers.discard(worker.number)
        self._begin(worker)
        self._info = worker.info = reply.info
        worker.busy_seconds += reply.seconds
        self._longest = max(self._longest, reply.seconds)
        tokens = reply.result.stats.tokens if isinstance(reply.result, Done) else 0
        worker.tokens += tokens
        self._tokens += tokens
        self._finish(window, reply.result)

    def _finish(self, window: _Window, result: Done | UserError) -> None:
        """Tell a window's result; of several, the first one."""
        if self._windows.pop(window.number, None) is not None:
            if window in self._waiting:
                self._waiting.remove(window)
            self._tell(Finished(window.number, result, self._report()))

    # The cluster

    def _look(self, nodes: list[Node], now: float) -> None:
        """See which workers are lost, slow, hung or idle, and whether there are any."""
        self._nodes = nodes
        self._leaving = {node.node_id for node in nodes if node.is_draining}
        living = {node.node_id for node in nodes}
        for worker in list(self._workers.values()):
            if worker.place is not None and worker.place.node_id not in living:
                self._lose(worker, "its node is gone")
            elif worker.windows:
                self._judge(worker, now)
        if self._replicas.scales_down:
            self._scale_down(now)
        if self._is_over:
            return
        if any(worker.place is not None for worker in self._workers.values()):
            self._room_since = now
        elif now - self._room_since > self._patience.room and self._info is None:
            self._end(SettingsError(no_room(self._cluster, nodes, self._replicas)))
        elif now - self._room_since > self._patience.room:
            lost = nodes_lost(self._cluster, nodes, self._replicas, self._patience.room)
            self._end(EmbeddingError(lost, is_retryable=True))
        if not self._is_over:
            self._hand_out()
            self._tell(Status(self._report(), is_ready=self._info is not None))

    def _scale_down(self, now: float) -> None:
        """Remove workers that nothing is left for: first those that found no room yet."""
        surplus = len(self._workers) - self._wanted
        for worker in sorted(self._workers.values(), key=lambda worker: worker.place is not None):
            is_idle = worker.info is not None and not worker.windows and now - worker.since > self._patience.idle
            if surplus > 0 and (worker.place is None or is_idle):
                self._remove(worker)
                surplus -= 1

    def _judge(self, worker: _Worker, now: float) -> None:
        """Replace a worker that hangs; have another one try what takes long, too, and what waits behind it."""
        if now - worker.moved > self._patience.hung:
            self._lose(worker, f"it embedded nothing for {self._patience.hung:g} s", _DEATHS_PER_HANG)
            return
        if now - worker.since > self._patience.hung / 2:
            worker.actor.call("progress", self._then(self._progressed, worker))
        limit = max(self._patience.slow, _SLOW_FACTOR * self._longest) if self._longest else self._patience.hung
        if now - worker.since > limit and len(self._workers) > 1:
            for window in reversed(worker.windows):
                is_here_alone = window.number in self._windows and window.workers == {worker.number}
                if is_here_alone and window not in self._waiting:
                    window.is_retry = True
                    self._waiting.appendleft(window)
                    self._tell(f"a window is late on {worker.address}: given to another worker as well")

    def _progressed(self, worker: _Worker, progress: Any) -> None:
        if worker.progress not in (None, progress):
            worker.moved = self._clock()
        worker.progress = progress

    def _count_time(self) -> None:
        """Count the time since the last call, if a worker was at work in it."""
        now = self._clock()
        if any(worker.windows for worker in self._workers.values()):
            self._active_seconds += now - self._counted_until
        self._counted_until = now

    def _report(self) -> PoolReport:
        self._count_time()
        now, workers = self._clock(), self._workers.values()
        return PoolReport(
            str(self._cluster),
            self._cluster.dashboard,
            self._nodes,
            self._replicas,
            sorted((w.report(now) for w in workers if w.tokens), key=lambda worker: worker.tokens_per_second),
            sum(w.place is not None and w.info is None for w in workers),
            round(self._tokens / self._active_seconds, 1) if self._active_seconds else 0.0,
            self._begun_again,
            self._info,
        )
