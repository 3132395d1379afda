"""What runs on a Ray cluster: an actor that loads the model once and does one piece of work after the other."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import pyarrow as pa

from embed_assets.engine.engine import EngineInfo
from embed_assets.engine.faults import reason_of
from embed_assets.engine.hardware import limit_resources
from embed_assets.engine.metrics import EngineStats
from embed_assets.engine.ray_feed import Turn
from embed_assets.errors import UserError, hide_secrets, is_retryable

MOST_DEATHS = 4
"""Workers that may die of one piece of work before it is given up."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a piece of work."""

    answer: str
    """What the worker has to say of it. Small: what is large it has left where both can reach it."""
    stats: EngineStats
    """Empty when a worker that died had done it before."""


class RemoteWorker(Protocol):
    """The model on a worker."""

    @property
    def info(self) -> EngineInfo:
        """Where and how it runs."""
        ...

    def run(self, content: bytes, is_retry: bool) -> Done:
        """Do a piece of work; one that a worker may have done before it died, if `is_retry`."""
        ...


class Recipe(Protocol):
    """How to make a worker, on another machine."""

    def open(self) -> RemoteWorker:
        """Load the model. Raises ``UserError`` when it can't be loaded."""
        ...


RESULT = pa.schema(
    [
        pa.field("number", pa.int64(), False),
        pa.field("answer", pa.string(), False),
        pa.field("stats", pa.string(), False),
        pa.field("error", pa.string(), False),
        pa.field("is_retryable", pa.bool_(), False),
    ]
)
"""What became of a piece of work, one row; `error` is empty where it was done."""


def result_row(number: int, done: Done) -> pa.Table:
    """A row of `RESULT` for work that was done."""
    return _row(number=number, answer=done.answer, stats=json.dumps(asdict(done.stats)), error="", is_retryable=False)


def error_row(number: int, error: str, is_retryable: bool) -> pa.Table:
    """A row of `RESULT` for work that could not be done."""
    return _row(number=number, answer="", stats="", error=error, is_retryable=is_retryable)


def _row(**values: object) -> pa.Table:
    return pa.Table.from_pylist([values], schema=RESULT)


class _Teller(logging.Handler):
    """Has the run hear what the engine warns of on a worker."""

    def __init__(self, feed: Any, address: str) -> None:
        super().__init__(logging.WARNING)
        self._feed, self._address = feed, address

    def emit(self, record: logging.LogRecord) -> None:
        self._feed.tell.remote(hide_secrets(f"{self._address}: {record.getMessage()}"))


class RayWorker:
    """The actor's class, for `map_batches` in batches of one row."""

    def __init__(self, recipe: Recipe, feed: Any, cores: int, gpus: float) -> None:
        import ray

        context = ray.get_runtime_context()
        self._feed, self._id = feed, str(context.get_actor_id())
        address = f"{ray.util.get_node_ip_address()} pid {os.getpid()}"
        ray.get(feed.start.remote(self._id, context.get_node_id(), address))
        logging.getLogger("embed_assets").addHandler(_Teller(feed, address))
        limit_resources(cores, min(1.0, gpus or 1.0))
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides those of others only from who has one of its own
        try:
            self._worker = recipe.open()
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else hide_secrets(reason_of(error))
            ray.get(feed.fail.remote(f"{message} (on {address})", is_retryable(error)))
            raise
        ray.get(feed.ready.remote(self._id, self._worker.info))

    def __call__(self, batch: pa.Table) -> pa.Table:
        import ray

        [number], [content] = batch.column("number").to_pylist(), batch.column("content").to_pylist()
        turn: Turn = ray.get(self._feed.begin.remote(self._id, number)) if content else Turn(is_skipped=True)
        if turn.is_skipped:
            return RESULT.empty_table()
        started = time.perf_counter()
        row, tokens = self._answer(number, content, turn)
        seconds = time.perf_counter() - started
        # Also when it was given up or refused: should this process die before the answer has left, it was not of that.
        ray.get(self._feed.finish.remote(self._id, number, tokens, seconds, self._worker.info))
        return row

    def _answer(self, number: int, content: bytes, turn: Turn) -> tuple[pa.Table, int]:
        """A row of `RESULT`, and how many tokens were embedded for it."""
        import ray

        if turn.deaths >= MOST_DEATHS:
            what = turn.last_error or "they were killed, most often for want of memory"
            advice = "give them more memory (EMBED_RAY_CPUS_PER_REPLICA) or lower EMBED_MAX_BATCH_TOKENS"
            message = f"{turn.deaths} workers died of the same window of texts: {what}; {advice}"
            return error_row(number, message, False), 0
        try:
            done = self._worker.run(content, turn.is_retry)
        except UserError as error:
            return error_row(number, str(error), error.is_retryable), 0
        except Exception as error:
            # The process may be in a bad way, as after an error of the GPU: a new one tries again.
            reason = hide_secrets(reason_of(error))
            _log.exception("this worker ends itself: %s", reason)
            ray.get(self._feed.note_error.remote(number, reason))
            os._exit(1)
        return result_row(number, done), done.stats.tokens
