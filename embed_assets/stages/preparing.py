"""Read, parse and split documents, in worker processes that leave the results in files.

    files of partitions ─▶ tasks of half a megabyte ─▶ workers: read, parse, split ─▶ Arrow files ─▶ commits, windows

Workers run ahead of the partition at hand by a bounded number of tasks. They pass on names of files, which readers map
into memory. The result is the same with any number of workers.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.corpus.parsing import has_rows, lost
from embed_assets.corpus.source import SourcePartition
from embed_assets.engine.hardware import available_cores
from embed_assets.errors import PartitionError
from embed_assets.lake.writer import Chained
from embed_assets.records import (
    REJECTED_ROWS,
    Document,
    Rejection,
    grouped_bytes,
    packed_hashes,
    rejection_batch,
    utc_now,
)
from embed_assets.scratch import ArrowFile, ScratchFolder
from embed_assets.stages.changes import Changes, is_known, row_keys
from embed_assets.stages.chunk_rows import INPUTS
from embed_assets.stages.corpus import Corpus
from embed_assets.workers import Stream, WorkerDied, Workers

_TASK_BYTES = 1 << 19
"""Bytes of files read by one task. Larger tasks have less overhead, smaller ones spread more evenly over workers."""
_TASK_FILES = 256
"""Files read by one task, so that many small ones are spread too."""
_LEAST_BYTES = 1 << 20
"""Bytes of files for which processes are started: that takes as long as reading and splitting about a megabyte."""
_BYTES_PER_CHUNK = 800
"""Of source text, about, for estimates."""
_TASKS_AHEAD = 4
"""Tasks per worker that are queued, under way, or done and not taken yet. More keep workers busy during long commits,
fewer take less space on disk."""


@dataclass(frozen=True, slots=True)
class ReadTask:
    """Read and parse files of one partition."""

    files: SourcePartition
    splits: bool
    """Whether the same worker also splits the documents."""
    known: ArrowFile | None = None
    """A column `row_hash`, sorted, of rows that need not be split, because they are as before."""

    @property
    def key(self) -> str:
        """Of the partition."""
        return self.files.key


@dataclass(frozen=True, slots=True)
class SplitTask:
    """Split documents that were read already."""

    key: str
    documents: ArrowFile
    known: ArrowFile | None = None
    """As that of a `ReadTask`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A few megabytes of a task's results."""

    documents: ArrowFile | None = None
    """Rows with the schema `PARSED_DOCUMENTS`."""
    chunks: ArrowFile | None = None
    """Rows with the schema `SPLIT_CHUNKS`; None if the documents were not split."""
    rejections: ArrowFile | None = None
    """Rows with the schema `REJECTED_ROWS`."""

    @property
    def files(self) -> list[ArrowFile]:
        """All files of the piece."""
        return [file for file in (self.documents, self.chunks, self.rejections) if file is not None]


FindChanges = Callable[[SourcePartition], Changes | None]
PreparingWorkers = Workers[ReadTask | SplitTask, Piece]


@dataclass(frozen=True)
class Preparer:
    """Runs the tasks, in a worker process or here."""

    corpus: Corpus
    folder: Path
    """Where results are left."""

    def __call__(self, task: ReadTask | SplitTask) -> Iterator[Piece]:
        """Yield the results of a task, in the order of its documents."""
        if isinstance(task, SplitTask):
            yield Piece(chunks=self._split(task.documents, task))
            return
        key = task.files.key
        for group in grouped_bytes(self.corpus.documents(task.files), _text_bytes):
            documents = [item for item in group if isinstance(item, Document)]
            parsed = [self.corpus.parsed_batch(documents, key)] if documents else []
            rejected = [item for item in group if isinstance(item, Rejection)]
            yield Piece(
                self._write(self.corpus.parsed_schema, parsed) if parsed else None,
                self._split(parsed, task) if parsed and task.splits else None,
                self._write(REJECTED_ROWS, [rejection_batch(rejected, key, utc_now())]) if rejected else None,
            )

    def rejected(self, rejection: Rejection, key: str) -> Piece:
        """A piece with a rejection and nothing else."""
        return Piece(rejections=self._write(REJECTED_ROWS, [rejection_batch([rejection], key, utc_now())]))

    def stored(self, batches: Iterable[pa.RecordBatch]) -> Iterator[ArrowFile]:
        """Files with the given batches of documents, one each, to be split."""
        return (self._write(batch.schema, [batch]) for batch in batches)

    def known(self, hashes: np.ndarray) -> ArrowFile:
        """A file of sorted row hashes, for tasks."""
        batch = pa.record_batch([packed_hashes(hashes.tobytes())], names=["row_hash"])
        return self._write(batch.schema, [batch])

    def _split(self, documents: Iterable[pa.RecordBatch], task: ReadTask | SplitTask) -> ArrowFile:
        for known in task.known or ():
            documents = _without(documents, row_keys(known))
        return self._write(self.corpus.split_schema, self.corpus.chunks(documents, task.key))

    def _write(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> ArrowFile:
        return ArrowFile.write(self.folder / f"{uuid.uuid4().hex}.arrow", schema, batches)


def _without(documents: Iterable[pa.RecordBatch], known: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The documents whose row hashes are not among the sorted `known` ones."""
    for batch in documents:
        yield batch.filter(pc.invert(is_known(batch, known)))


def _text_bytes(item: Document | Rejection) -> int:
    return item.byte_size + len(item.metadata) if isinstance(item, Document) else 0


@dataclass(slots=True)
class Prepared:
    """A partition's documents and chunks, in files."""

    pieces: list[Piece] = field(default_factory=list)
    changes: Changes | None = None
    """What was prepared, if the partition's other files are kept as they were read before; None: all of it."""
    read: frozenset[str] | None = None
    """Ids of the documents that were read, or whose file changed or is gone; None: all of them."""
    changed: frozenset[str] | None = None
    """Ids of the documents that are new, differ from what is stored, or are gone; None: all of them."""

    def complete(self) -> Prepared:
        """This, with the ids of the documents, once all pieces are there."""
        if self.changes is not None:
            read, as_before = set(self.changes.stale), set[str]()
            for batch in Chained(self.documents):
                read.update(batch.column("document_id").to_pylist())
                as_before.update(self.changes.as_before(batch))
            self.read, self.changed = frozenset(read), frozenset(read - as_before)
        return self

    @property
    def documents(self) -> list[ArrowFile]:
        """Rows with the schema `PARSED_DOCUMENTS`."""
        return [piece.documents for piece in self.pieces if piece.documents is not None]

    @property
    def chunks(self) -> list[ArrowFile]:
        """Rows with the schema `SPLIT_CHUNKS`."""
        return [piece.chunks for piece in self.pieces if piece.chunks is not None]

    @property
    def rejections(self) -> list[ArrowFile]:
        """Rows with the schema `REJECTED_ROWS`."""
        return [piece.rejections for piece in self.pieces if piece.rejections is not None]

    def remove(self) -> None:
        """Delete the files."""
        for piece in self.pieces:
            for file in piece.files:
                file.remove()
        self.pieces.clear()


class Arriving:
    """The chunks of a partition while it is being prepared in another thread."""

    changed: frozenset[str] | None = None
    """All documents' chunks will arrive."""

    def __init__(self, byte_size: int) -> None:
        self._byte_size = byte_size
        self._files: list[ArrowFile] = []
        self._is_complete = False
        self._changed = threading.Condition()

    def add(self, piece: Piece) -> None:
        """Add the next piece."""
        with self._changed:
            self._files += [piece.chunks] if piece.chunks is not None else []
            self._changed.notify_all()

    def end(self) -> None:
        """There will be no more, because all are there or because preparing failed."""
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()

    @property
    def count(self) -> int:
        """About how many chunks it will have."""
        return max(1, self._byte_size // _BYTES_PER_CHUNK)

    def inputs(self) -> Iterator[pa.RecordBatch]:
        """Batches with the columns `INPUTS`, as they arrive; ends with the partition."""
        place = 0
        while True:
            with self._changed:
                while len(self._files) <= place and not self._is_complete:
                    self._changed.wait()
                if len(self._files) <= place:
                    return
                file = self._files[place]
            place += 1
            for batch in file:
                yield batch.select(INPUTS)


@contextlib.contextmanager
def open_preparation(
    corpus: Corpus,
    partitions: Sequence[SourcePartition],
    splits: bool,
    configured: int | None,
    find: FindChanges = lambda files: None,
    split_bytes: int = 0,
) -> Iterator[Preparation]:
    """A `Preparation` in `configured` processes (0: in this one) or, by default, as many as are worth starting.

    `split_bytes` is the size of the files whose documents are to be split, whether or not they are read.
    """
    # A single partition with a few changes is not worth starting processes.
    known = {files.key: find(files) for files in partitions} if len(partitions) == 1 else {}
    byte_size = sum((c.files if (c := known.get(files.key)) else files).byte_size for files in partitions)
    with ScratchFolder() as folder:
        preparer = Preparer(corpus, folder)
        with Workers(preparer, processes_for(max(byte_size, split_bytes), configured)) as workers:
            yield Preparation(workers, preparer, partitions, splits, lambda f: known[f.key] if known else find(f))


def processes_for(byte_size: int, configured: int | None) -> int:
    """How many processes to read or split so many bytes with: unless configured, one per core if there is enough."""
    if configured is not None:
        return configured
    return available_cores() if byte_size >= _LEAST_BYTES else 0


class Preparation:
    """Prepares the partitions of a run, in order."""

    def __init__(
        self,
        workers: PreparingWorkers,
        preparer: Preparer,
        partitions: Iterable[SourcePartition],
        splits: bool,
        find: FindChanges = lambda files: None,
        task_bytes: int = _TASK_BYTES,
    ) -> None:
        """`partitions` are those whose files are to be read, or of which those are that `find` finds changed.

        `splits` says whether their documents are to be split.
        """
        self._workers, self._preparer, self._splits, self._find = workers, preparer, splits, find
        self._changes: dict[str, Changes | None] = {}
        self._known: dict[str, ArrowFile] = {}
        self._arriving: dict[str, Arriving] = {}
        self._over: set[str] = set()
        self._lock = threading.Lock()
        self._task_bytes = task_bytes
        self._upcoming = (task for files in partitions for task in self._tasks(files))
        self._begun: deque[tuple[ReadTask, Stream[Piece]]] = deque()

    def take(self, files: SourcePartition) -> Prepared:
        """The partition with these files, read and split. Ask for partitions in their order; some may be left out.

        Raises ``SourceError`` if a file can't be opened or read.
        """
        changes, arriving = self._changes_of(files), self.arriving(files)
        prepared = Prepared(changes=changes)
        files = changes.files if changes is not None else files
        if not files.files:
            return prepared.complete()
        self._skip_others(files.key)
        taken = 0
        while self._begun and self._begun[0][0].files.key == files.key:
            task, stream = self._begun.popleft()
            self._begin_more()
            taken += len(task.files.files)
            try:
                for piece in self._pieces(task, stream):
                    prepared.pieces.append(piece)
                    arriving.add(piece)
            except BaseException:
                prepared.remove()
                raise
        if taken != len(files.files):
            raise RuntimeError(f"{taken} of the {len(files.files)} files of the partition {files.key!r} were prepared")
        return prepared.complete()

    def take_whole(self, files: SourcePartition) -> Prepared:
        """All of a partition, of which `take` gave only what changed. Raises ``SourceError``."""
        tasks = list(_read_tasks(files, self._splits, self._task_bytes))
        begun = [(task, self._workers.submit(task)) for task in tasks]
        return Prepared([piece for task, stream in begun for piece in self._pieces(task, stream)])

    def _tasks(self, files: SourcePartition) -> Iterator[ReadTask]:
        """The tasks to read a partition, or what changed in it."""
        changes = self._changes_of(files)
        if changes is not None and changes.files.files and len(changes.known):
            self._known[files.key] = self._preparer.known(changes.known)
        for task in _read_tasks(changes.files if changes is not None else files, self._splits, self._task_bytes):
            yield replace(task, known=self._known.get(files.key))

    def _changes_of(self, files: SourcePartition) -> Changes | None:
        """What changed in a partition whose turn has not ended."""
        if files.key not in self._changes:
            self._changes[files.key] = self._find(files) if files.files else None
        return self._changes[files.key]

    def arriving(self, files: SourcePartition) -> Arriving:
        """The partition's chunks as `take` prepares them, for another thread; none once its turn is over."""
        with self._lock:
            found = self._arriving.setdefault(files.key, Arriving(files.byte_size))
            if files.key in self._over:
                found.end()
            return found

    def end(self, files: SourcePartition) -> None:
        """Nothing more will arrive of the partition. To be called in any case once its turn to be prepared is over."""
        self._changes.pop(files.key, None)
        if (known := self._known.pop(files.key, None)) is not None:
            known.remove()
        with self._lock:
            self._over.add(files.key)
            arriving = self._arriving.pop(files.key, None)
        if arriving is not None:
            arriving.end()

    def _skip_others(self, key: str) -> None:
        """Abandon the tasks before those of the partition `key`: their partitions failed."""
        self._begin_more()
        while self._begun and self._begun[0][0].files.key != key:
            self._begun.popleft()[1].abandon()
            self._begin_more()

    def split(self, key: str, documents: Iterable[pa.RecordBatch]) -> Prepared:
        """The chunks of documents that were read before; `documents` have at least `TEXT_COLUMNS`.

        Raises ``PartitionError`` if splitting one of them kills its worker.
        """
        files = list(self._preparer.stored(documents))
        tasks = [SplitTask(key, file) for file in files]
        begun = [(task, self._workers.submit(task)) for task in tasks]
        prepared = Prepared([piece for task, stream in begun for piece in self._split_pieces(task, stream)])
        for file in files:
            file.remove()
        for file in prepared.rejections:
            [row] = next(iter(file)).select(["document_id", "detail"]).to_pylist()
            raise PartitionError(f"partition {key!r}: {row['document_id']!r} can't be split: {row['detail']}")
        return Prepared([replace(piece, documents=None) for piece in prepared.pieces])

    def _begin_more(self) -> None:
        most = _TASKS_AHEAD * max(1, self._workers.processes)
        # Of large files of rows, one at a time is read ahead: their documents are as large on disk as they are.
        while len(self._begun) < most and sum(task.files.byte_size for task, _ in self._begun) < most * _TASK_BYTES:
            if (task := next(self._upcoming, None)) is None:
                return
            self._begun.append((task, self._workers.submit(task)))

    def _pieces(self, task: ReadTask, stream: Stream[Piece], is_retry: bool = False) -> Iterator[Piece]:
        """Yield the results of a task, once all of it is read.

        If it kills its worker, its files are read one by one, and a culprit is rejected.
        """
        key = task.files.key
        found: list[tuple[Piece, SplitTask | None, Stream[Piece] | None]] = []
        try:
            for piece in stream:
                split = None
                if self._splits and piece.documents is not None and piece.chunks is None:
                    split = SplitTask(key, piece.documents, task.known)
                found.append((piece, split, None if split is None else self._workers.submit(split)))
        except WorkerDied as died:
            if is_retry and len(task.files.files) == 1:
                yield self._preparer.rejected(lost(self._preparer.corpus.source, task.files, str(died)), key)
                return
            alone = [replace(task, files=replace(task.files, files=(file,))) for file in task.files.files]
            for one in alone:
                yield from self._pieces(one, self._workers.submit(one), is_retry=len(alone) == 1)
            return
        for piece, split, chunks in found:
            if split is None or chunks is None:
                yield piece
            else:
                yield Piece(rejections=piece.rejections)
                yield from self._split_pieces(split, chunks)

    def _split_pieces(self, task: SplitTask, stream: Stream[Piece], is_retry: bool = False) -> list[Piece]:
        """The documents with their chunks. If splitting kills its worker, they are split one by one."""
        documents = task.documents
        try:
            return [replace(piece, documents=documents) for piece in stream]
        except WorkerDied as died:
            if is_retry and documents.rows == 1:
                [row] = next(iter(documents)).select(["document_id", "uri"]).to_pylist()
                detail = f"splitting it ended the process twice, with {died}, perhaps for lack of memory; split it"
                rejection = Rejection(row["document_id"], row["uri"], "too_costly", detail)
                return [self._preparer.rejected(rejection, task.key)]
            rows = (batch.slice(i, 1) for batch in documents for i in range(batch.num_rows))
            alone = [replace(task, documents=one) for one in self._preparer.stored(rows)]
            is_last = documents.rows == 1
            return [p for one in alone for p in self._split_pieces(one, self._workers.submit(one), is_last)]


def _read_tasks(files: SourcePartition, splits: bool, task_bytes: int) -> Iterator[ReadTask]:
    """Tasks for consecutive files of a partition. A large file of rows has one of its own, and is split by others."""
    group: list[int] = []
    size = 0

    def task(indices: Sequence[int], with_splits: bool) -> ReadTask:
        return ReadTask(replace(files, files=tuple(files.files[i] for i in indices)), with_splits)

    for i, file in enumerate(files.files):
        is_large = file.size > task_bytes and has_rows(file)
        if group and (is_large or size + file.size > task_bytes or len(group) >= _TASK_FILES):
            yield task(group, splits)
            group, size = [], 0
        if is_large:
            yield task([i], False)
        else:
            group.append(i)
            size += file.size
    if group:
        yield task(group, splits)
