"""Worker processes that stream their results. One that dies costs the task at hand and is replaced.

Each process is driven by a thread of its own, which mostly waits. Without processes, tasks run in one thread here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from embed_assets.arrow_startup import skip_pandas
from embed_assets.children import how_it_ended, own_pipes, receive, send, start_child

Task = TypeVar("Task")
Result = TypeVar("Result")

_POLL_SECONDS = 0.2
"""How soon whoever waits for a stream notices that it was closed."""
_ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""One thread per worker: there are as many workers as cores."""
_NICENESS = 10
"""Lower priority than the process that runs the model: on 2 busy cores its passes then take 1.2 times as long as alone,
instead of 1.7 times."""


class WorkerDied(Exception):
    """A worker process ended in the middle of a task. The message says how."""


class WorkersClosed(Exception):
    """The workers were closed while a task was queued or under way."""


class Stream(Generic[Result]):
    """Results of one task, as they come. They never make the worker wait, so they should be small."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._is_abandoned = threading.Event()
        self._is_closed = threading.Event()

    def __iter__(self) -> Iterator[Result]:
        """Yield the results. Raises what the task raised, ``WorkerDied``, or ``WorkersClosed``."""
        while True:
            try:
                kind, value = self._waiting.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._is_closed.is_set() or self._is_abandoned.is_set():
                    raise WorkersClosed("the workers were closed before the task was done") from None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def abandon(self) -> None:
        """Stop the task at its next result; nobody takes it."""
        self._is_abandoned.set()

    def close(self) -> None:
        """End the stream where it is: nothing more will come."""
        self._is_closed.set()

    def put(self, kind: str, value: Any = None) -> bool:
        """Pass on one message. False if the stream was abandoned or closed."""
        if self._is_abandoned.is_set() or self._is_closed.is_set():
            return False
        self._waiting.put((kind, value))
        return True


class Workers(Generic[Task, Result]):
    """Runs tasks in up to `processes` worker processes, started when there is work; 0 runs them in a thread here."""

    def __init__(self, serve: Callable[[Task], Iterator[Result]], processes: int) -> None:
        """`serve` runs one task. It is pickled to each worker, so it must be picklable unless `processes` is 0."""
        self._serve, self.processes = serve, processes
        self._threads = ThreadPoolExecutor(max(1, processes), thread_name_prefix="worker")
        self._mine = threading.local()
        self._children: list[_Child] = []
        self._streams: weakref.WeakSet[Stream[Result]] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> Workers[Task, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: Task) -> Stream[Result]:
        """Queue a task; tasks begin in the order of their submission."""
        stream: Stream[Result] = Stream()
        with self._lock:
            if self._is_closed:
                raise WorkersClosed("the workers were closed")
            self._streams.add(stream)
            self._threads.submit(self._run, task, stream)
        return stream

    def close(self) -> None:
        """Kill the processes and wait for the threads. Tasks that were not finished never are."""
        with self._lock:
            self._is_closed = True
            streams, children = list(self._streams), list(self._children)
        for stream in streams:
            stream.close()
        for child in children:
            child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()

    def _run(self, task: Task, stream: Stream[Result]) -> None:
        """Run a task and pass its results on; in a thread of the pool."""
        try:
            results = self._child().run(task) if self.processes else self._serve(task)
            with contextlib.closing(results):  # type: ignore[type-var]
                for result in results:
                    if self._is_closed or not stream.put("result", result):
                        return
            stream.put("end")
        except BaseException as error:
            stream.put("error", error)

    def _child(self) -> _Child:
        """This thread's worker process."""
        if not hasattr(self._mine, "child"):
            self._mine.child = _Child(self._serve)
            with self._lock:
                self._children.append(self._mine.child)
        child: _Child = self._mine.child
        return child


class _Child:
    """A worker process. It starts with its first task, and again after it died."""

    def __init__(self, serve: Callable[[Any], Iterator[Any]]) -> None:
        self._serve = serve
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, task: Any) -> Iterator[Any]:
        """Yield the task's results. Raises what it raised, or ``WorkerDied``. Closing it early kills the process."""
        is_idle = False
        try:
            self._send(task)
            while True:
                kind, value = self._receive()
                is_idle = kind != "result"
                if kind == "error":
                    raise value
                if kind == "end":
                    return
                yield value
        finally:
            if not is_idle:
                self.close()

    def _send(self, task: Any) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            self.close()
            process = self._process = _start(self._serve)
        assert process.stdin is not None
        try:
            send(process.stdin, pickle.dumps(task))
        except BrokenPipeError:
            raise WorkerDied(how_it_ended(process)) from None

    def _receive(self) -> tuple[str, Any]:
        process = self._process
        assert process is not None and process.stdout is not None
        try:
            kind, value = pickle.loads(receive(process.stdout))
        except EOFError:
            raise WorkerDied(how_it_ended(process)) from None
        return str(kind), value

    def kill(self) -> None:
        """Kill the process, if it is running; from any thread."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Kill the process and close its pipes."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start(serve: Callable[[Any], Iterator[Any]]) -> subprocess.Popen[bytes]:
    """A new worker process. Raises ``WorkerDied`` when it does not start."""
    process = start_child("embed_assets.workers", _ENVIRONMENT)
    assert process.stdin is not None
    try:
        send(process.stdin, pickle.dumps(serve))
    except BrokenPipeError:
        raise WorkerDied(how_it_ended(process)) from None
    return process


def _main() -> None:
    """The worker's main loop: serve tasks until standard input closes, which it does when the parent ends."""
    requests, answers = own_pipes()
    skip_pandas()
    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICENESS)
    with contextlib.suppress(EOFError, BrokenPipeError):
        serve = pickle.loads(receive(requests))
        while True:
            task = pickle.loads(receive(requests))
            try:
                for result in serve(task):
                    send(answers, pickle.dumps(("result", result)))
                send(answers, pickle.dumps(("end", None)))
            except BrokenPipeError:
                raise
            except Exception as error:
                send(answers, _pickled_error(error))


def _pickled_error(error: Exception) -> bytes:
    """The error as a message; one that can't be pickled, as a ``RuntimeError`` of the same text."""
    try:
        data = pickle.dumps(("error", error))
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(("error", RuntimeError(f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    _main()
