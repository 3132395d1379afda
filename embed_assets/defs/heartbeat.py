"""Signs of life of processes that run something, for others on whatever host, who wait for them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from dagster import DagsterInstance
from sqlalchemy.exc import SQLAlchemyError

from embed_assets.defs.dagster_internals import delete_value, read_values, write_value

_log = logging.getLogger(__name__)

_BEAT_SECONDS = 10.0
SILENT_SECONDS = 180.0
"""A process that was not heard of for so long is dead: 18 beats. While a model was loaded and ran beside three
busy processes on two cores, a thread like this one woke up at most 0.7 s late."""
_KEY = "embed_assets/heartbeat/"


@contextlib.contextmanager
def heartbeat(instance: DagsterInstance, process: str, seconds: float = _BEAT_SECONDS) -> Iterator[None]:
    """Let the others hear every few seconds that this process is alive, from a thread of its own."""
    is_over = threading.Event()

    def beat() -> None:
        try:
            write_value(instance, _KEY + process, str(time.time()))
        except SQLAlchemyError as error:  # the next one may get through
            _log.warning("a heartbeat could not be written: %s", str(error).splitlines()[0])

    def keep_beating() -> None:
        while not is_over.wait(seconds):
            beat()

    beat()
    thread = threading.Thread(target=keep_beating, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        forget(instance, process)


def forget(instance: DagsterInstance, process: str) -> None:
    """Remove what a process left, now that it is over."""
    with contextlib.suppress(SQLAlchemyError):  # a value too many does no harm
        delete_value(instance, _KEY + process)


class Silence:
    """For how long processes have not been heard of while this one listened, by its own clock: theirs may be wrong."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[str, float]] = {}
        """By process, its last beat and when that was first seen."""

    def listen(self, instance: DagsterInstance, processes: set[str]) -> dict[str, float]:
        """Seconds since each of the processes was heard of, or since this one began to listen for it."""
        beats = read_values(instance, {_KEY + process for process in processes})
        now = self._clock()
        for process in processes:
            beat = beats.get(_KEY + process, "")
            if process not in self._heard or self._heard[process][0] != beat:
                self._heard[process] = (beat, now)
        self._heard = {process: heard for process, heard in self._heard.items() if process in processes}
        return {process: now - since for process, (_, since) in self._heard.items()}
