"""The process that is the driver of a Ray cluster, apart from the run's.

Ray takes over signals and the environment, prints to stdout, and ends its process when the cluster's head is lost. None
of that may happen to a run, which has partitions to finish, and to say what went wrong.

    run's process ◀─ pipe ─▶ this one: RayPool ◀─▶ cluster
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

from embed_assets.engine.engine import EngineInfo
from embed_assets.engine.faults import reason_of
from embed_assets.engine.ray import PATIENCE_SECONDS, Finished, News, Over, PoolReport, RayPool
from embed_assets.engine.ray_cluster import RayOptions
from embed_assets.engine.ray_worker import Done, Recipe
from embed_assets.errors import EmbeddingError, SettingsError, UserError, hide_secrets

_CLOSE_SECONDS = 30.0
_ANSWER_SECONDS = 10.0
_MAIN = "from embed_assets.engine.ray_process import main; main()"


@dataclass(frozen=True, slots=True)
class _Start:
    recipe: Recipe
    options: RayOptions
    patience_seconds: float


@dataclass(frozen=True, slots=True)
class _Submit:
    number: int
    content: bytes


@dataclass(frozen=True, slots=True)
class _AskReport:
    pass


@dataclass(frozen=True, slots=True)
class _Report:
    report: PoolReport | None


class _Ready:
    """A worker has loaded the model."""


class RayProcess:
    """Workers on a Ray cluster, as `RayPool` has them, driven by a process that starts when `start` is called first.

    Usable from many threads. After `close`, or when the cluster is lost, all pieces of work end with an error.
    """

    def __init__(
        self, make_recipe: Callable[[], Recipe], options: RayOptions, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._make_recipe, self._options, self._patience_seconds = make_recipe, options, patience_seconds
        self._lock = threading.RLock()
        # Apart from the other: whoever waits for the pipe must not keep what comes over it from being taken.
        self._sending = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._output: IO[bytes] | None = None
        self._count = 0
        self._futures: dict[int, Future[Done]] = {}
        self._error: Exception | None = None
        self._has_ended = threading.Event()
        self._is_ready = threading.Event()
        self._has_report = threading.Event()
        self._report: PoolReport | None = None
        self._news: deque[str] = deque(maxlen=100)

    @property
    def most_replicas(self) -> int:
        """Workers there will be at most; 1 before that is known."""
        return 1 if self._report is None else self._report.replicas.most

    @property
    def info(self) -> EngineInfo | None:
        """Where and how the model runs on a worker, when last asked; None before the first has loaded it."""
        return None if self._report is None else self._report.info

    def start(self) -> None:
        """Connect, and wait until a worker has loaded the model.

        Raises ``SettingsError`` when there is no cluster or no room on it, ``ModelError`` when the model can't be
        loaded, ``EmbeddingError`` when the cluster was lost.
        """
        with self._lock:
            self.check()
            if self._process is None:
                self._begin()
        self._is_ready.wait()
        self.check()

    def submit(self, content: bytes) -> Future[Done]:
        """Have a piece of work done by any worker. Call `start` before."""
        future: Future[Done] = Future()
        with self._lock:
            self.check()
            self._count += 1
            number = self._count
            self._futures[number] = future
        self._send(_Submit(number, content))
        return future

    def check(self) -> None:
        """Raise what ended it, if it is over."""
        if self._error is not None:
            raise self._error

    @property
    def report(self) -> PoolReport | None:
        """What the cluster did so far; None before the start."""
        if self._process is not None and self._error is None:
            self._has_report.clear()
            self._send(_AskReport())
            self._has_report.wait(_ANSWER_SECONDS)
        return self._report

    def take_news(self) -> list[str]:
        """Lines for the run's log that were not taken yet."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def close(self) -> None:
        """End all work, the workers, and a local Ray."""
        self._end(EmbeddingError("embedding was stopped before the window was finished; start it again"))
        with self._lock:  # whoever is about to start has done so, or will not
            process = self._process
        if process is None or self._pipe is None:
            return
        if self._sending.acquire(timeout=_ANSWER_SECONDS):  # else somebody waits for a process that hears nothing
            with contextlib.suppress(OSError):
                self._pipe.send(None)
            self._sending.release()
        try:
            process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # Ray ends what such a process leaves
            process.wait()
        self._has_ended.wait()
        self._pipe.close()
        if self._output is not None:
            self._output.close()

    def _begin(self) -> None:
        # First, for it may fail: then the next one tries again.
        start = _Start(self._make_recipe(), _with_present_cluster(self._options), self._patience_seconds)
        self._pipe, other = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, str(other.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            pass_fds=[other.fileno()],
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        other.close()
        threading.Thread(target=self._listen, name="ray", daemon=True).start()
        self._send(start)

    def _send(self, message: object) -> None:
        assert self._pipe is not None
        with self._sending, contextlib.suppress(OSError):  # whoever listens hears of the end
            self._pipe.send(message)

    def _listen(self) -> None:
        """In a thread: take what the process says, until its end."""
        assert self._pipe is not None and self._process is not None
        try:
            while True:
                self._take(self._pipe.recv())
        except Exception:  # the pipe's end, or what can't be read from it: nothing more will come
            self._process.kill()
            status = self._process.wait()
            self._end(
                EmbeddingError(
                    f"the process that drives Ray ended with status {status} ({self._last_words()}); "
                    "windows that were finished are kept, run again",
                    is_retryable=True,
                )
            )
        finally:
            self._has_ended.set()

    def _take(self, message: object) -> None:
        if isinstance(message, Finished):
            with self._lock:
                future = self._futures.pop(message.number, None)
            if future is None:
                return  # done before, or everything was ended meanwhile
            if isinstance(message.result, Exception):
                future.set_exception(message.result)
            else:
                future.set_result(message.result)
        elif isinstance(message, _Report):
            self._report = message.report or self._report
            self._has_report.set()
        elif isinstance(message, News):
            self._news.append(message.line)
        elif isinstance(message, Over):
            self._end(message.error)
        elif isinstance(message, _Ready):
            self._is_ready.set()

    def _end(self, error: Exception) -> None:
        """End everything that is under way with an error; the first one counts."""
        with self._lock:
            self._error = self._error or error
            futures, self._futures = list(self._futures.values()), {}
        for future in futures:
            future.set_exception(self._error)
        self._is_ready.set()
        self._has_report.set()

    def _last_words(self) -> str:
        """The last line that the process printed."""
        assert self._output is not None
        self._output.seek(0)
        lines = [line for line in self._output.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return hide_secrets(lines[-1].strip()[:300]) if lines else "it said nothing"


def _with_present_cluster(options: RayOptions) -> RayOptions:
    """The options, with the address of the cluster that this process is connected to, as a resource may have done.

    Raises ``SettingsError`` for a connection by Ray Client, over which Ray Data can't run.
    """
    ray = sys.modules.get("ray")
    if ray is None or options.address is not None or not ray.is_initialized():
        return options
    if ray.util.client.ray.is_connected():
        raise SettingsError(
            "EMBED_COMPUTE=ray can't work over Ray Client (ray://), by which this process is connected; "
            "submit the run as a Ray job, or set EMBED_RAY_ADDRESS on a machine of the cluster"
        )
    return replace(options, address=str(ray.get_runtime_context().gcs_address))


def serve(pipe: Connection[Any, Any]) -> None:
    """In the process: a pool over the pipe, until its end."""
    start: _Start = pipe.recv()
    lock = threading.Lock()

    def send(message: object) -> None:
        with lock, contextlib.suppress(OSError):
            pipe.send(message)

    pool = RayPool(start.recipe, start.options, send, start.patience_seconds)
    reader = threading.Thread(target=_obey, args=(pipe, pool, send), name="pipe", daemon=True)
    reader.start()
    # By the main thread: what Ray starts ends with the thread that starts it.
    try:
        pool.start()
    except Exception as error:
        send(Over(_portable(error)))
    else:
        send(_Report(pool.report))
        send(_Ready())
    reader.join()
    pool.close()


def _obey(pipe: Connection[Any, Any], pool: RayPool, send: Callable[[object], None]) -> None:
    """In a thread: do what comes over the pipe, until its end or None."""
    with contextlib.suppress(EOFError, OSError):
        while (message := pipe.recv()) is not None:
            if isinstance(message, _AskReport):
                send(_Report(pool.report))
            elif isinstance(message, _Submit):
                try:
                    pool.submit(message.number, message.content)
                except Exception as error:
                    send(Finished(message.number, _portable(error)))
    pool.stop()  # also when it still waits for its start


def _portable(error: Exception) -> UserError:
    """The error, as something that can be sent: Ray's own ones can't always."""
    if isinstance(error, UserError):
        return error
    return EmbeddingError(f"Ray failed: {hide_secrets(reason_of(error))[:300]}; run again", is_retryable=True)


def main() -> None:
    """The process; its argument is the pipe's file descriptor."""
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # whatever Ray's threads still wait for
