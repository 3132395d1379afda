"""The run's side of the cluster: a child process drives Ray.

    run's process ◀─ pipes ─▶ cluster/driver.py: Supervisor ◀─▶ cluster

Ray takes over signals and the environment, prints to stdout, and ends its process a minute after the cluster's head is
lost. None of that may happen to a run, which has partitions to finish, and to say what went wrong.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import IO, Any, TypeVar

from embed_assets.children import how_it_ended, receive, send, start_child
from embed_assets.cluster.connection import TOKEN_MODE
from embed_assets.cluster.nodes import RayOptions
from embed_assets.cluster.report import PoolReport
from embed_assets.cluster.supervisor import Finished, Patience, Status
from embed_assets.cluster.worker import Done, Recipe
from embed_assets.engine.engine import EngineInfo
from embed_assets.errors import EmbeddingError, SettingsError, UserError, hide_secrets

T = TypeVar("T")

_CLOSE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Order:
    """What the driver is to do; its first message."""

    recipe: Recipe
    options: RayOptions
    patience: Patience


@dataclass(frozen=True, slots=True)
class TaskCall:
    """A call to be done by any machine with a free CPU."""

    number: int
    call: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class TaskDone:
    """What became of a `TaskCall`."""

    number: int
    result: Any
    error: UserError | None = None
    """Why it has no result."""


class NeedsToken:
    """The driver's answer, and its end, if the cluster asks for the user's token."""


class ClusterProcess:
    """Workers on a Ray cluster, driven by a process that starts when `start` is called first.

    Usable from many threads. After `close`, or when the cluster is lost, all windows end with an error.
    """

    def __init__(
        self, make_recipe: Callable[[], Recipe], options: RayOptions, patience: Patience | None = None
    ) -> None:
        self._make_recipe, self._options = make_recipe, options
        self._patience = patience or Patience(room=options.wait_seconds)
        self._lock = threading.RLock()
        self._sending = threading.Lock()  # apart from the other: who waits for a full pipe must not stop the listener
        self._order: Order | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._count = 0
        self._futures: dict[int, Future[Any]] = {}
        self._error: UserError | None = None
        self._is_connected, self._is_ready = threading.Event(), threading.Event()
        self._report: PoolReport | None = None
        self._news: deque[str] = deque(maxlen=100)

    @property
    def most_replicas(self) -> int:
        """Workers there will be at most; 1 before that is known."""
        return 1 if self._report is None else self._report.replicas.most

    @property
    def info(self) -> EngineInfo | None:
        """Where and how the model runs on a worker; None before the first has loaded it."""
        return None if self._report is None else self._report.info

    @property
    def report(self) -> PoolReport | None:
        """What the cluster did so far; None before the start."""
        return self._report

    def connect(self) -> None:
        """Connect, and begin to start workers. Raises ``SettingsError`` when there is no cluster or no room on it."""
        with self._lock:
            self.check()
            if self._process is None:
                # First what may fail: then the next call tries again.
                self._order = Order(self._make_recipe(), _with_present_cluster(self._options), self._patience)
                self._output = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
                self._start_driver({})
                self._listener = threading.Thread(target=self._listen, name="ray", daemon=True)
                self._listener.start()
        self._is_connected.wait()
        self.check()

    def start(self) -> None:
        """Connect, and wait until a worker has loaded the model.

        Raises ``SettingsError`` when there is no cluster or no room on it, ``ModelError`` when the model can't be
        loaded, ``EmbeddingError`` when the cluster was lost.
        """
        self.connect()
        self._is_ready.wait()
        self.check()

    def submit(self, content: bytes) -> Future[Done]:
        """Have a window embedded by any worker. Call `start` before."""
        return self._submit(lambda number: (number, content))

    def run_task(self, call: Callable[[], T]) -> Future[T]:
        """Have a call done on any machine with a free CPU; `call` is pickled. Call `connect` before."""
        return self._submit(lambda number: TaskCall(number, call))

    def _submit(self, message: Callable[[int], object]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self.check()
            self._count += 1
            number = self._count
            self._futures[number] = future
        self._send(message(number))
        return future

    def check(self) -> None:
        """Raise what ended it, if it is over."""
        if self._error is not None:
            raise self._error

    def take_news(self) -> list[str]:
        """Lines for the run's log that were not taken yet."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def close(self) -> None:
        """End all work, the workers, and a local Ray."""
        self._end(EmbeddingError("embedding was stopped before the window was finished; start it again"))
        with self._lock:  # whoever is about to start has done so, or will not
            process = self._process
        if process is None or self._listener is None or self._output is None:
            return
        assert process.stdin is not None
        if self._sending.acquire(timeout=_CLOSE_SECONDS):  # else the pipe is full, and the driver reads no more
            with contextlib.suppress(OSError):
                process.stdin.close()
            self._sending.release()
        self._listener.join(_CLOSE_SECONDS)
        process.kill()  # Ray ends what such a process leaves
        self._listener.join()
        self._output.close()

    def _start_driver(self, environment: Mapping[str, str]) -> None:
        self._process = start_child("embed_assets.cluster.driver", environment, self._output)
        self._send(self._order)

    def _send(self, message: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        data = pickle.dumps(message)
        with self._sending, contextlib.suppress(OSError, ValueError):  # whoever listens hears of the end
            send(self._process.stdin, data)

    def _listen(self) -> None:
        """In a thread: take what the driver says, until its end."""
        while (process := self._process) is not None and process.stdout is not None:
            try:
                message = pickle.loads(receive(process.stdout))
            except Exception:  # the pipe's end, or what can't be read from it: nothing more will come
                process.kill()
                how = how_it_ended(process)
                self._end(
                    EmbeddingError(
                        f"the process that drives Ray ended with {how} ({self._last_words()}); "
                        "windows that were finished are kept, run again",
                        is_retryable=True,
                    )
                )
                process.stdout.close()
                return
            if isinstance(message, NeedsToken):
                process.wait()
                with self._lock:
                    if self._error is None:
                        self._start_driver(TOKEN_MODE)
            else:
                self._take(message)

    def _take(self, message: object) -> None:
        if isinstance(message, Finished):
            self._report = message.report
            error = None if isinstance(message.result, Done) else message.result
            self._settle(message.number, message.result, error)
        elif isinstance(message, TaskDone):
            self._settle(message.number, message.result, message.error)
        elif isinstance(message, Status):
            self._report = message.report
            self._is_connected.set()
            if message.is_ready:
                self._is_ready.set()
        elif isinstance(message, str):
            self._news.append(message)
        elif isinstance(message, UserError):
            self._end(message)

    def _settle(self, number: int, result: Any, error: UserError | None) -> None:
        with self._lock:
            future = self._futures.pop(number, None)
        if future is None:
            return  # everything was ended meanwhile
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _end(self, error: UserError) -> None:
        """End everything that is under way with an error; the first one counts."""
        with self._lock:
            self._error = self._error or error
            futures, self._futures = list(self._futures.values()), {}
        for future in futures:
            future.set_exception(self._error)
        self._is_connected.set()
        self._is_ready.set()

    def _last_words(self) -> str:
        """The last line that the driver printed."""
        assert self._output is not None
        self._output.seek(0)
        lines = [line for line in self._output.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return hide_secrets(lines[-1].strip()[:300]) if lines else "it said nothing"


def _with_present_cluster(options: RayOptions) -> RayOptions:
    """The options, with the address of the cluster that this process is connected to, as a resource may have done.

    Raises ``SettingsError`` for a connection by Ray Client: it is not told which cluster that is.
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
