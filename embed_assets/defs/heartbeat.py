"""Signs of life of processes that run something, for others on whatever host, who wait for them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from dagster import DagsterInstance

from embed_assets.defs.dagster_internals import delete_value, read_values, write_value

_log = logging.getLogger(__name__)

_BEAT_SECONDS = 10.0
SILENT_SECONDS = 180.0
"""A process that was not heard of for so long is dead: 18 beats. While a model was loaded and ran beside three
busy processes on two cores, a thread like this one woke up at most 0.7 s late."""
_MOST_BEATS_MISSED = 3
_KEY = "embed_assets/heartbeat/"


@contextlib.contextmanager
def heartbeat(instance: DagsterInstance, process: str, seconds: float = _BEAT_SECONDS) -> Iterator[None]:
    """Let the others hear every few seconds that this process is alive, from a thread of its own."""
    is_over = threading.Event()

    def beat() -> None:
        try:
            write_value(instance, _KEY + process, str(time.time()))
        except Exception as error:  # each storage has its own kinds; the next beat may get through
            _log.warning("a heartbeat could not be written: %s: %s", type(error).__name__, error)

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
    with contextlib.suppress(Exception):  # a value too many does no harm, and an error would hide the run's own
        delete_value(instance, _KEY + process)


class Silence:
    """For how long processes have not been heard of while this one listened, by its own clock: theirs may be wrong.

    Time in which nobody listened, or the database was down, is not silence: between two calls no more than some beats
    count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[str, float]] = {}
        """By process, its last beat and the seconds of silence since."""
        self._listened: float | None = None

    def listen(self, instance: DagsterInstance, processes: set[str]) -> dict[str, float]:
        """Seconds since each of the processes was heard of, or since this one began to listen for it."""
        beats = read_values(instance, {_KEY + process for process in processes})
        now = self._clock()
        gap = 0.0 if self._listened is None else min(now - self._listened, _MOST_BEATS_MISSED * _BEAT_SECONDS)
        self._listened = now
        heard: dict[str, tuple[str, float]] = {}
        for process in processes:
            beat = beats.get(_KEY + process, "")
            last, silent = self._heard.get(process, (None, 0.0))
            heard[process] = (beat, silent + gap if last == beat else 0.0)
        self._heard = heard
        return {process: silent for process, (_, silent) in heard.items()}
