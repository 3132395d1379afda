"""Preparing documents in processes: the same rows as in one, and a worker that dies costs one document."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embed_assets.corpus.source import SourcePartition
from embed_assets.errors import PartitionError, SourceError
from embed_assets.scratch import ArrowFile
from embed_assets.settings import load_settings
from embed_assets.stages.corpus import TEXT_COLUMNS, Corpus
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.preparing import Piece, Preparation, Prepared, Preparer, PreparingWorkers, ReadTask, SplitTask
from embed_assets.workers import Workers
from embed_assets_tests.conftest import topic

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def corpus_in(folder: Path) -> Corpus:
    source = folder / "landing"
    source.mkdir(exist_ok=True)
    return Pipeline.from_settings(load_settings(source=str(source), lake=str(folder / "lake"), model="fake:8")).corpus


def rows(files: Iterable[ArrowFile]) -> list[dict[str, object]]:
    return [
        {name: value for name, value in row.items() if name != "rejected_at"}
        for file in files
        for batch in file
        for row in batch.to_pylist()
    ]


def contents(prepared: Prepared) -> list[list[dict[str, object]]]:
    found = [rows(files) for files in (prepared.documents, prepared.chunks, prepared.rejections)]
    prepared.remove()
    return found


@dataclass(frozen=True)
class Deadly(Preparer):
    """Kills its process when it meets certain words."""

    def __call__(self, task: ReadTask | SplitTask) -> Iterator[Piece]:
        if isinstance(task, ReadTask) and any("deadly" in file.path for file in task.files.files):
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(task, SplitTask):
            texts = [text for batch in task.documents for text in batch.column("text").to_pylist()]
            if any("deadly" in text for text in texts):
                os.kill(os.getpid(), signal.SIGKILL)
        yield from super().__call__(task)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path


def prepare(preparer: Preparer, processes: int, keys: Iterable[str] | None = None) -> dict[str, list[object]]:
    partitions = preparer.corpus.source.partitions()
    chosen = [partitions[key] for key in (partitions if keys is None else keys)]
    with Workers(preparer, processes) as workers:
        preparation = Preparation(workers, preparer, chosen, splits=True)
        return {files.key: [*contents(preparation.take(files))] for files in chosen}


documents = st.dictionaries(
    st.sampled_from(
        [f"{folder}/{name}" for folder in "abc" for name in ("1.md", "2.txt", "3.jsonl", "4.csv", "5.xyz")]
    ),
    st.lists(
        st.sampled_from(["# Head", "One two.", "x" * 3000, "naïve 東京", "", '{"text": "row"}', "text,id", "\x00"])
    ),
    max_size=8,
)


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Preparer, list[PreparingWorkers]]]:
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "scratch").mkdir()
    preparer = Preparer(corpus_in(folder), folder / "scratch")
    with Workers(preparer, 0) as here, Workers(preparer, 2) as processes:
        yield preparer, [here, processes]


@given(found=documents, task_bytes=st.sampled_from([1, 500, 1 << 20]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_processes_give_the_same_rows(
    found: dict[str, list[str]],
    task_bytes: int,
    shared: tuple[Preparer, list[PreparingWorkers]],
) -> None:
    preparer, both = shared
    root = Path(preparer.corpus.source.root)
    for file in sorted(root.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    for name, lines in found.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("\n".join(lines))
    partitions = list(preparer.corpus.source.partitions().values())
    results = []
    for workers, size in ((both[0], 1 << 20), (both[1], task_bytes)):
        preparation = Preparation(workers, preparer, partitions, splits=True, task_bytes=size)
        results.append([contents(preparation.take(files)) for files in partitions])
    assert results[0] == results[1]
    assert list(preparer.folder.iterdir()) == []


def test_partitions_may_be_left_out_and_failures_cost_one(folder: Path) -> None:
    preparer = Preparer(corpus_in(folder), folder / "scratch")
    root = Path(preparer.corpus.source.root)
    for key in "abcd":
        (root / key).mkdir()
        for i in range(3):
            (root / key / f"{i}.txt").write_text(f"text {key}{i}")
    listed = preparer.corpus.source.partitions()
    (root / "b" / "1.txt").unlink()  # after it was listed
    with Workers(preparer, 2) as workers:
        preparation = Preparation(workers, preparer, list(listed.values()), splits=True, task_bytes=1)
        with pytest.raises(SourceError, match=r"1\.txt"):
            preparation.take(listed["b"])
        assert preparation.take(SourcePartition("empty")).pieces == []
        found, chunks, _ = contents(preparation.take(listed["d"]))
        assert [row["document_id"] for row in found] == ["0.txt", "1.txt", "2.txt"]
        assert [row["text"] for row in chunks] == ["text d0", "text d1", "text d2"]
        with pytest.raises(RuntimeError, match="0 of the 3 files"):
            preparation.take(listed["a"])  # its turn is over


def test_a_file_that_kills_its_worker_is_rejected(folder: Path) -> None:
    preparer = Deadly(corpus_in(folder), folder / "scratch")
    root = Path(preparer.corpus.source.root)
    for name in ("a/1.txt", "a/deadly.txt", "a/2.txt", "b/3.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"text of {name}")
    found = prepare(preparer, 2)
    texts, chunks, rejections = found["a"]
    assert [row["document_id"] for row in texts] == [row["document_id"] for row in chunks] == ["1.txt", "2.txt"]  # type: ignore[index,attr-defined]
    [rejected] = rejections  # type: ignore[misc]
    assert (rejected["document_id"], rejected["reason"]) == ("deadly.txt", "too_costly")
    assert "signal 9" in rejected["detail"]
    assert len(found["b"][0]) == 1  # type: ignore[arg-type]


def test_a_row_that_kills_its_worker_is_rejected(folder: Path) -> None:
    preparer = Deadly(corpus_in(folder), folder / "scratch")
    lines = [f'{{"id": "{i}", "text": "{"deadly" if i == 7 else "row"} {i}"}}' for i in range(20)]
    file = Path(preparer.corpus.source.root) / "rows.jsonl"
    file.write_text("\n".join(lines))
    partitions = preparer.corpus.source.partitions()
    with Workers(preparer, 2) as workers:
        preparation = Preparation(workers, preparer, list(partitions.values()), splits=True, task_bytes=100)
        texts, chunks, rejections = contents(preparation.take(partitions["_root"]))
    kept = [f"rows.jsonl#{i}" for i in range(20) if i != 7]
    assert [row["document_id"] for row in texts] == [row["document_id"] for row in chunks] == kept
    assert [row["document_id"] for row in rejections] == ["rows.jsonl#7"]


def test_stored_documents_are_split_like_read_ones(folder: Path) -> None:
    preparer = Preparer(corpus_in(folder), folder / "scratch")
    root = Path(preparer.corpus.source.root)
    for i in range(3):
        (root / f"{i}.rst").write_text(topic("types"))
    partitions = preparer.corpus.source.partitions()
    with Workers(preparer, 1) as workers:
        preparation = Preparation(workers, preparer, list(partitions.values()), splits=True)
        read = preparation.take(partitions["_root"])
        stored = [batch.select(TEXT_COLUMNS) for file in read.documents for batch in file]
        again = preparation.split("_root", stored)
        assert again.documents == []
        assert contents(again)[1] == contents(read)[1]
    assert list(preparer.folder.iterdir()) == []


def test_chunks_can_be_followed_while_they_are_prepared(folder: Path) -> None:
    preparer = Preparer(corpus_in(folder), folder / "scratch")
    root = Path(preparer.corpus.source.root)
    for i in range(5):
        (root / f"{i}.txt").write_text(f"text {i}")
    [files] = preparer.corpus.source.partitions().values()
    with Workers(preparer, 1) as workers:
        preparation = Preparation(workers, preparer, [files], splits=True, task_bytes=1)
        arriving, seen = preparation.arriving(files), list[str]()

        def follow() -> None:
            for batch in arriving.inputs():
                seen.extend(batch.column("text").to_pylist())

        thread = threading.Thread(target=follow)
        thread.start()
        prepared = preparation.take(files)
        preparation.end(files)
        thread.join(60)
        assert not thread.is_alive()
        assert seen == [row["text"] for row in rows(prepared.chunks)] == [f"text {i}" for i in range(5)]
        assert list(preparation.arriving(files).inputs()) == []  # its turn is over


def test_documents_that_can_not_be_split_again_are_no_silent_loss(folder: Path) -> None:
    preparer = Deadly(corpus_in(folder), folder / "scratch")
    (Path(preparer.corpus.source.root) / "rows.jsonl").write_text('{"id": "7", "text": "deadly"}')
    [files] = preparer.corpus.source.partitions().values()
    [read] = Preparer(preparer.corpus, preparer.folder)(ReadTask(files, False))
    assert read.documents is not None
    documents = list(read.documents)
    with Workers(preparer, 1) as workers, pytest.raises(PartitionError, match=r"rows\.jsonl#7.*signal 9"):
        Preparation(workers, preparer, [], splits=True).split("_root", documents)
