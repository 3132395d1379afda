"""What runs on a Ray cluster: an actor that loads the model once and embeds one window after the other."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Protocol

from embed_assets.engine.backend import OnTick
from embed_assets.engine.engine import EngineInfo
from embed_assets.engine.faults import reason_of
from embed_assets.engine.hardware import limit_resources
from embed_assets.engine.metrics import EngineStats
from embed_assets.errors import ModelError, UserError, hide_secrets, is_retryable

_MOST_WARNINGS = 100
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a window."""

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

    def run(self, content: bytes, is_retry: bool, on_tick: OnTick) -> Done:
        """Embed a window; one that another worker may have done before it died, if `is_retry`."""
        ...


class Recipe(Protocol):
    """How to make a worker, on another machine."""

    def open(self) -> RemoteWorker:
        """Load the model. Raises ``UserError`` when it can't be loaded."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs."""

    node_id: str
    address: str
    """Of its machine, and its process there."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker sends after a window."""

    result: Done | UserError | None
    """None from the first unexpected error on: it may have left the process in a bad way, as one of the GPU does."""
    reason: str
    """That error; empty without one."""
    seconds: float
    """Time it took."""
    info: EngineInfo
    warnings: list[str]
    """What the engine warned of since the last reply."""


class _Warnings(logging.Handler):
    """Keeps what the engine warns of, for the next reply."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's message."""
        self._messages = [*self._messages, hide_secrets(record.getMessage())][-_MOST_WARNINGS:]

    def take(self, address: str) -> list[str]:
        """The messages since the last call, with the worker's address."""
        taken, self._messages = self._messages, []
        return [f"{address}: {message}" for message in taken]


class ModelActor:
    """The actor's class. One call at a time, but for `progress`, which is in a concurrency group of its own."""

    def __init__(self, recipe: Recipe, cores: int, gpus: float) -> None:
        import ray

        self._recipe = recipe
        self._place = Place(
            ray.get_runtime_context().get_node_id(), f"{ray.util.get_node_ip_address()} pid {os.getpid()}"
        )
        self._progress = (0, 0, 0)
        self._broken = ""
        self._warnings = _Warnings()
        logging.getLogger("embed_assets").addHandler(self._warnings)
        limit_resources(cores, min(1.0, gpus or 1.0))
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides those of others only from who has one of its own

    def place(self) -> Place:
        """Where it runs; answers before the model is loaded."""
        return self._place

    def load(self) -> EngineInfo | UserError:
        """Load the model: where and how it runs, or why it can't be loaded."""
        try:
            self._worker = self._recipe.open()
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else hide_secrets(reason_of(error))
            return ModelError(f"{message} (on {self._place.address})", is_retryable=is_retryable(error))
        return self._worker.info

    def run(self, content: bytes, is_retry: bool) -> Reply:
        """Embed a window."""
        started, number = time.perf_counter(), self._progress[0] + 1
        result: Done | UserError | None = None

        def on_tick(texts: int, tokens: int) -> None:
            self._progress = (number, texts, tokens)

        on_tick(0, 0)
        try:
            if not self._broken:
                result = self._worker.run(content, is_retry, on_tick)
        except UserError as error:
            result = error
        except Exception as error:
            self._broken = hide_secrets(reason_of(error))
            _log.exception("this worker is to be replaced: %s", self._broken)
        seconds = time.perf_counter() - started
        return Reply(result, self._broken, seconds, self._worker.info, self._warnings.take(self._place.address))

    def progress(self) -> tuple[int, int, int]:
        """Number of windows begun, and texts and tokens of the last one that are embedded."""
        return self._progress
