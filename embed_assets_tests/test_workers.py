"""Worker processes: results in order, errors as they were raised, and deaths that cost one task."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from embed_assets.errors import SourceError
from embed_assets.scratch import ScratchFolder
from embed_assets.workers import Stream, WorkerDied, Workers, WorkersClosed


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("no arguments")
        self.lock = threading.Lock()


def serve(task: str) -> Iterator[object]:
    """The work of the tests' workers, by the task's name."""
    name, _, argument = task.partition(" ")
    if name == "count":
        yield from range(int(argument))
    elif name == "pid":
        yield os.getpid()
    elif name == "print":
        print("a library's chatter", flush=True)
        yield "printed"
    elif name == "big":
        yield "x" * int(argument)
    elif name == "fail":
        yield 1
        raise SourceError("the file is gone", is_retryable=True)
    elif name == "strange":
        raise Unpicklable
    elif name == "end-of-file":
        raise EOFError("the task's own")
    elif name == "die":
        yield 1
        os.kill(os.getpid(), int(argument))
    elif name == "exit":
        os._exit(int(argument))


@pytest.fixture(params=[0, 2])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers[str, object]]:
    with Workers[str, object](serve, request.param) as found:
        yield found


def test_results_come_in_order(workers: Workers[str, object]) -> None:
    streams = [workers.submit(f"count {n}") for n in (3, 0, 100, 1)]
    assert [list(stream) for stream in streams] == [[0, 1, 2], [], list(range(100)), [0]]


def test_large_results_and_prints_do_no_harm(workers: Workers[str, object]) -> None:
    assert list(workers.submit("print")) == ["printed"]
    assert list(workers.submit(f"big {3 << 20}")) == ["x" * (3 << 20)]


def test_errors_are_raised_as_they_were(workers: Workers[str, object]) -> None:
    stream = iter(workers.submit("fail"))
    assert next(stream) == 1
    with pytest.raises(SourceError, match="the file is gone") as caught:
        next(stream)
    assert caught.value.is_retryable
    with pytest.raises(EOFError, match="the task's own"):
        list(workers.submit("end-of-file"))
    with pytest.raises((RuntimeError, Unpicklable), match="no arguments"):
        list(workers.submit("strange"))
    assert list(workers.submit("count 2")) == [0, 1]


def test_a_death_costs_one_task() -> None:
    with Workers[str, object](serve, 1) as workers:
        first, *others = [workers.submit(task) for task in (f"die {signal.SIGKILL:d}", "count 2", "exit 3", "count 1")]
        results = iter(first)
        assert next(results) == 1
        with pytest.raises(WorkerDied, match="signal 9"):
            next(results)
        assert list(others[0]) == [0, 1]
        with pytest.raises(WorkerDied, match="status 3"):
            list(others[1])
        assert list(others[2]) == [0]


def test_an_abandoned_task_makes_way(workers: Workers[str, object]) -> None:
    streams = [workers.submit("count 1000000") for _ in range(2)]  # more than may wait: both threads are held up
    for stream in streams:
        next(iter(stream))
        stream.abandon()
    assert list(workers.submit("count 2")) == [0, 1]


def test_results_that_nobody_takes_hold_nobody_up(workers: Workers[str, object]) -> None:
    waiting = [workers.submit("count 1000") for _ in range(3)]  # more than there are threads
    assert list(workers.submit("count 2")) == [0, 1]
    assert [len(list(stream)) for stream in waiting] == [1000] * 3


def test_processes_start_with_work_and_end_with_the_pool() -> None:
    with Workers[str, object](serve, 2) as workers:
        before = {child.pid for child in psutil.Process().children()}
        [pid] = workers.submit("pid")
        assert isinstance(pid, int) and pid not in before
        assert {child.pid for child in psutil.Process().children()} == before | {pid}
    assert not psutil.pid_exists(pid)


def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "from embed_assets_tests.test_workers import serve; from embed_assets.workers import Workers; import time\n"
        "workers = Workers(serve, 1); print(*workers.submit('pid'), flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        assert worker.wait(timeout=60) is None


def test_closing_the_workers_ends_whoever_waits_for_them() -> None:
    workers = Workers[str, object](serve, 1)
    streams = [workers.submit("count 1000000"), workers.submit("count 1")]  # one under way, one queued
    next(iter(streams[0]))
    ends: list[BaseException] = []

    def wait_for(stream: Stream[object]) -> None:
        try:
            list(stream)
        except (WorkersClosed, WorkerDied) as error:
            ends.append(error)

    threads = [threading.Thread(target=wait_for, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    workers.close()
    for thread in threads:
        thread.join(60)
    assert len(ends) == 2
    with pytest.raises(WorkersClosed):
        workers.submit("count 1")


def test_folders_of_killed_processes_are_removed_by_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os; from embed_assets.scratch import ScratchFolder; f = ScratchFolder(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"TMPDIR": str(tmp_path)})
    [orphan] = tmp_path.iterdir()
    os.utime(orphan / "lock", (1, 1))
    with ScratchFolder() as mine:
        os.utime(mine / "lock", (1, 1))  # old, but somebody holds it
        assert list(tmp_path.iterdir()) == [mine]
        with ScratchFolder() as other:
            assert set(tmp_path.iterdir()) == {mine, other}
    assert list(tmp_path.iterdir()) == []
