"""Heartbeats of processes that execute runs, stored in the Dagster instance for processes on any host to watch."""

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
"""Interval of the heartbeat: shorter detects a death sooner, longer writes to the instance's database less often."""
SILENT_SECONDS = 180.0
"""A process without a heartbeat for this long, 18 beats, counts as dead. Measured while a model was loaded and ran
beside three busy processes on two cores: a heartbeat thread woke up at most 0.7 s late."""
_MAX_COUNTED_BEATS = 3
"""Longest gap between two readings that counts as silence, in beats: a longer one means that nobody was watching."""
_KEY = "embed_assets/heartbeat/"


@contextlib.contextmanager
def heartbeat(instance: DagsterInstance, process: str, seconds: float = _BEAT_SECONDS) -> Iterator[None]:
    """Write a heartbeat of `process` every `seconds` from a background thread; clears it on exit."""
    is_over = threading.Event()

    def beat() -> None:
        try:
            write_value(instance, _KEY + process, str(time.time()))
        except Exception as error:  # each storage raises its own kinds; the next beat may succeed
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
        clear_heartbeat(instance, process)


def clear_heartbeat(instance: DagsterInstance, process: str) -> None:
    """Delete the heartbeat of a process that has ended; errors are ignored."""
    with contextlib.suppress(Exception):  # a leftover value is harmless, and an error would hide the run's own
        delete_value(instance, _KEY + process)


class HeartbeatMonitor:
    """Measures how long watched processes have been silent, by this process's clock, because theirs may be wrong.

    Time in which nobody was watching, or the database was down, does not count as silence: a gap between two calls
    counts for at most three beats.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[str, float]] = {}
        """By process: its last heartbeat, and the seconds of silence since."""
        self._read_at: float | None = None

    def seconds_silent(self, instance: DagsterInstance, processes: set[str]) -> dict[str, float]:
        """Seconds without a heartbeat by process, counted from its last one or from when it was first watched."""
        beats = read_values(instance, {_KEY + process for process in processes})
        now = self._clock()
        gap = 0.0 if self._read_at is None else min(now - self._read_at, _MAX_COUNTED_BEATS * _BEAT_SECONDS)
        self._read_at = now
        heard: dict[str, tuple[str, float]] = {}
        for process in processes:
            beat = beats.get(_KEY + process, "")
            last, silent = self._heard.get(process, (None, 0.0))
            heard[process] = (beat, silent + gap if last == beat else 0.0)
        self._heard = heard
        return {process: silent for process, (_, silent) in heard.items()}
