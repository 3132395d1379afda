"""What a sync does for each partition and document does not grow with how many there are already."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
import psutil
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from embed_assets.defs.instance import open_instance
from embed_assets_tests.conftest import Project


class CountingFileSystem(MemoryFileSystem):
    """Files in memory, which counts how often they are listed and opened."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("counting://", "memory://"))  # type: ignore[no-any-return]

    def find(self, *arguments: Any, **named: Any) -> Any:
        self.calls["listings"] += 1
        return super().find(*arguments, **named)

    def _open(self, path: str, mode: str = "rb", *arguments: Any, **named: Any) -> Any:
        if mode == "rb":
            self.calls["opened"] += 1
        return super()._open(path, mode, *arguments, **named)


@pytest.fixture
def counted(project: Project) -> Iterator[Project]:
    """A project whose source counts what is done to it, in this process."""
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.store.clear()
    project.set(SOURCE="counting://docs", PREPARE_PROCESSES="0", PARTITION_BY="folder")
    yield project
    CountingFileSystem.store.clear()


def put(path: str, text: str) -> None:
    fsspec.filesystem("counting").pipe(f"counting://docs/{path}", text.encode())


def calls_of(project: Project) -> Counter[str]:
    """What a sync does to the source."""
    CountingFileSystem.calls.clear()
    project.sync()
    return Counter(CountingFileSystem.calls)


@pytest.mark.parametrize("documents", [5, 50])
def test_one_changed_document_is_opened_alone_however_many_there_are(counted: Project, documents: int) -> None:
    for i in range(documents):
        put(f"a/{i:03}.md", f"Document {i}.")
    assert calls_of(counted) == {"listings": 1, "opened": documents}
    assert calls_of(counted) == {"listings": 1}
    put("a/003.md", "Another text.")
    assert calls_of(counted) == {"listings": 1, "opened": 1}
    put("a/new.md", "A new document.")
    assert calls_of(counted) == {"listings": 1, "opened": 1}


def test_scattered_changes_are_one_run_with_one_listing(counted: Project) -> None:
    for i in range(12):
        put(f"p{i:02}/a.md", f"Document {i}.")
    assert calls_of(counted) == {"listings": 1, "opened": 12}
    for i in range(0, 12, 3):
        put(f"p{i:02}/a.md", f"Another document {i}.")
    assert calls_of(counted) == {"listings": 1, "opened": 4}
    with open_instance() as instance:
        assert instance.get_runs_count() == 2


def events(project: Project) -> int:
    """Events in the index of Dagster's event log."""
    [database] = (project.root / ".dagster").rglob("index.db")
    with sqlite3.connect(database) as connection:
        [(count,)] = connection.execute("SELECT count(*) FROM event_logs")
    return int(count)


def commits(project: Project) -> int:
    return len(list((project.root / "lake").rglob("_delta_log/*.json")))


def test_events_and_commits_per_partition_stay_as_they_are(project: Project) -> None:
    counts = []
    for first in (0, 4, 8):
        for i in range(first, first + 4):
            project.write(f"p{i:02}/a.md", f"Document {i}.")
        project.sync()
        counts.append((events(project), commits(project)))
    steps = [tuple(b - a for a, b in zip(before, after, strict=True)) for before, after in itertools.pairwise(counts)]
    assert steps[0] == steps[1]


def starts_workers(project: Project) -> bool:
    """Whether a sync reads or splits in processes of their own."""
    found, is_done = threading.Event(), threading.Event()

    def look() -> None:
        while not (found.is_set() or is_done.is_set()):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "embed_assets.workers" in child.cmdline():
                        found.set()
            time.sleep(0.01)

    looking = threading.Thread(target=look)
    looking.start()
    project.sync()
    is_done.set()
    looking.join()
    return found.is_set()


def test_much_to_read_or_only_to_split_is_shared_by_processes_and_little_is_not(project: Project) -> None:
    project.monkeypatch.delenv("EMBED_PREPARE_PROCESSES", raising=False)
    project.write("a/large.md", "".join(f"Sentence {i} of a large document.\n\n" for i in range(60_000)))
    assert starts_workers(project)
    project.set(CHUNK_TOKENS="100")
    assert starts_workers(project), "the document is split again"
    project.write("a/small.md", "A small document.")
    assert not starts_workers(project)
