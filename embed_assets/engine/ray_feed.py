"""What feeds a Ray dataset while it runs: an actor that holds the work, and a source that reads from it.

A dataset's input is usually known before it starts. Ours comes partition by partition, as they are read and chunked,
and the workers, which took long to load the model, should stay for all of them.

Ray Data schedules, scales, holds back and starts actors again. One thing it can't do: what it had given to a lost actor
it tries again on that actor alone, for which there may be no room any more. So work that is late is given to others.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from embed_assets.engine.engine import EngineInfo

_MOST_MESSAGES = 100
WORK = pa.schema([pa.field("number", pa.int64(), False), pa.field("content", pa.large_binary(), False)])
"""A piece of work, one row: its number, and what a worker makes something of."""


@dataclass(slots=True)
class WorkerState:
    """What is known of one worker."""

    worker: str
    """Ray's id of the actor; it stays the same when the actor is started again."""
    node: str
    """Ray's id of its machine."""
    address: str
    """Of its machine, and its process there."""
    is_ready: bool = False
    starts_in_vain: int = 0
    """Times it was started since it had last loaded the model."""
    tokens: int = 0
    busy_seconds: float = 0.0
    ready_since: float = 0.0
    """Seconds of the feed's clock."""
    info: EngineInfo | None = None


@dataclass(slots=True)
class FeedStatus:
    """What happened so far."""

    now: float = 0.0
    """Seconds of the feed's clock."""
    workers: list[WorkerState] = field(default_factory=list)
    active_seconds: float = 0.0
    """Time in which some worker was at work."""
    begun_again: int = 0
    """Times that work was begun which a worker had begun before."""
    messages: list[str] = field(default_factory=list)
    """What workers had to say since this was asked for last."""
    failure: str | None = None
    """Why the model can't be loaded."""
    is_retryable: bool = False


@dataclass(slots=True)
class _Work:
    reference: list[Any]
    """To the bytes, in a list so that Ray hands it on as it is."""
    position: int
    """Its last one in the order."""
    worker: str = ""
    """Who is at it."""
    since: float | None = None
    """When somebody began or ended with it; None before."""
    put_again: float = 0.0
    begun_by: set[str] = field(default_factory=set)
    """Workers that began it and are not through with it: they are at it, or died of it."""
    deaths: int = 0
    """Times that a worker was lost while it was at it."""
    last_error: str = ""

    def count_death(self, worker: str) -> None:
        """A worker was lost; once for each time that it began this."""
        self.deaths += worker in self.begun_by
        self.begun_by.discard(worker)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a worker is to do with a piece of work."""

    is_skipped: bool = False
    """Another worker is at it, or it is done."""
    is_retry: bool = False
    """It was begun before."""
    deaths: int = 0
    last_error: str = ""
    """What the last worker reported before it ended itself."""


@dataclass(slots=True)
class Feed:
    """The actor. Readers find work by its position in an order that only grows, so that one that is started again gets
    the same once more. Work that is late is put into the order again; whoever comes to it first does it.
    """

    clock: Callable[[], float] = time.monotonic
    _work: dict[int, _Work] = field(default_factory=dict)
    _order: list[int] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _workers: dict[str, WorkerState] = field(default_factory=dict)
    _last_begun: tuple[int, float] = (-1, 0.0)
    """The furthest position at which work was begun, and when."""
    _slowest: float = 0.0
    """Seconds of the work that took longest."""
    _active_seconds: float = 0.0
    _counted_until: float = 0.0
    """Up to which time `_active_seconds` was counted."""
    _begun_again: int = 0
    _messages: list[str] = field(default_factory=list)
    _failure: str | None = None
    _is_retryable: bool = False

    async def put(self, number: int, reference: list[Any]) -> None:
        """Add a piece of work under a number of its own."""
        async with self._changed:
            self._work[number] = _Work(reference, len(self._order))
            self._order.append(number)
            self._changed.notify_all()

    async def get(self, position: int) -> tuple[int, list[Any]]:
        """Number of and reference to the work at a position, as soon as there is some; no reference when it is done."""
        async with self._changed:
            await self._changed.wait_for(lambda: position < len(self._order))
        number = self._order[position]
        work = self._work.get(number)
        return number, [] if work is None else work.reference

    async def forget(self, number: int) -> None:
        """The result of a piece of work has arrived."""
        self._count_time()
        self._work.pop(number, None)

    async def start(self, worker: str, node: str, address: str) -> None:
        """A worker begins to load the model."""
        state = self._workers.setdefault(worker, WorkerState(worker, node, address))
        state.node, state.address, state.is_ready = node, address, False
        state.starts_in_vain += 1
        for work in self._work.values():
            work.count_death(worker)

    async def ready(self, worker: str, info: EngineInfo) -> None:
        """A worker has loaded the model."""
        state = self._workers[worker]
        state.info, state.is_ready, state.starts_in_vain = info, True, 0
        state.ready_since = state.ready_since or self.clock()

    async def fail(self, message: str, is_retryable: bool) -> None:
        """A worker can't load the model. Where another one could, this may pass."""
        self._failure, self._is_retryable = message, is_retryable or any(w.info for w in self._workers.values())

    async def tell(self, message: str) -> None:
        """A worker has something to say to whoever watches."""
        self._messages = [*self._messages, message][-_MOST_MESSAGES:]

    async def begin(self, worker: str, number: int) -> Turn:
        """A worker comes to a piece of work."""
        work = self._work.get(number)
        if work is None or work.worker not in ("", worker):
            return Turn(is_skipped=True)
        self._count_time()
        turn = Turn(False, work.since is not None, work.deaths, work.last_error)
        self._begun_again += turn.is_retry
        work.worker, work.since = worker, self.clock()
        work.begun_by.add(worker)
        self._last_begun = max(self._last_begun, (work.position, work.since))
        return turn

    async def note_error(self, number: int, error: str) -> None:
        """A worker is about to give up on a piece of work, and to be started again."""
        if number in self._work:
            self._work[number].last_error = error

    async def finish(self, worker: str, number: int, tokens: int, seconds: float, info: EngineInfo) -> None:
        """A worker is through with a piece of work of so many tokens; its result or an error is on the way."""
        self._count_time()
        state = self._workers[worker]
        state.tokens += tokens
        state.busy_seconds += seconds
        state.info = info
        self._slowest = max(self._slowest, seconds)
        if number in self._work:
            self._work[number].worker, self._work[number].since = "", self.clock()
            self._work[number].begun_by.discard(worker)

    async def status(self) -> FeedStatus:
        """What happened so far."""
        self._count_time()
        messages, self._messages = self._messages, []
        workers = list(self._workers.values())
        return FeedStatus(
            self.clock(), workers, self._active_seconds, self._begun_again, messages, self._failure, self._is_retryable
        )

    async def put_late_again(self, living: Collection[str], patience: float) -> list[int]:
        """Put work into the order again whose worker's node is not among the `living`, or that is late; returns it.

        Late is what takes four times as long as anything did, what others overtook for twice as long, and a result that
        does not arrive; none of it before `patience` seconds.
        """
        self._count_time()
        now = self.clock()
        again: list[int] = []
        for number, work in self._work.items():
            owner = self._workers.get(work.worker)
            is_orphan = owner is not None and owner.node not in living
            if now - work.put_again < patience or not (is_orphan or self._is_late(work, now, patience)):
                continue
            if is_orphan:
                work.count_death(work.worker)
            work.worker, work.put_again, work.position = "", now, len(self._order)
            self._order.append(number)
            again.append(number)
        if again:
            async with self._changed:
                self._changed.notify_all()
        return again

    def _is_late(self, work: _Work, now: float, patience: float) -> bool:
        if work.worker:
            longest = max(6 * patience, 4 * self._slowest) if self._slowest else 60 * patience
            return work.since is not None and now - work.since > longest
        if work.since is not None:
            return now - work.since > patience
        furthest, when = self._last_begun
        # What lies ready behind a long window is overtaken too, and no reason to worry.
        return furthest > work.position and now - when > max(patience, 2 * self._slowest)

    def _count_time(self) -> None:
        now = self.clock()
        if any(work.worker for work in self._work.values()):
            self._active_seconds += now - self._counted_until
        self._counted_until = now


def read_feed(feed: Any) -> Iterator[pa.Table]:
    """Tables of one row from the feed actor, in its order, without end.

    One for every position: a reader that is started again must give as many as before. Work that is done has no
    content.
    """
    import ray

    for position in itertools.count():
        number, reference = ray.get(feed.get.remote(position))
        content = ray.get(reference[0]) if reference else b""
        yield pa.Table.from_pylist([{"number": number, "content": content}], schema=WORK)


def feed_source(feed: Any) -> Any:
    """A Ray Data source that reads the feed in one task."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class FeedSource(Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[Any]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            return [ReadTask(lambda: read_feed(feed), unknown)]

    return FeedSource()
