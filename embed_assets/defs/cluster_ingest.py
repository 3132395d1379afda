"""Ingests partitions on the machines of a cluster, each as a task that needs one CPU.

    run's process: plan ─▶ task on any node: read, chunk, commit, check ─▶ run's process: record, embed what is new

A task commits to the lake by itself, and sends back what is to be recorded, and the chunks.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.due import Due
from embed_assets.defs.ingest import Ingest, Task, describe
from embed_assets.defs.staleness import ContentReader, History, tables_of
from embed_assets.errors import EmbeddingError, SourceError, UserError
from embed_assets.lake.reader import PartitionState
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import RAW
from embed_assets.scratch import ArrowFile
from embed_assets.stages.changes import ChangeFinder
from embed_assets.stages.checks import Outcome, Subject, evaluate
from embed_assets.stages.compute import Compute
from embed_assets.stages.executors import failed
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.preparing import Piece, Prepared, open_preparation
from embed_assets.stages.remote import WorkerRecipe, worker_recipe

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LEAST_BYTES = 1 << 20
"""Of all partitions that are due: reading a megabyte here takes as long as asking another machine for it."""
_LOOK_SECONDS = 5.0
"""How soon whoever waits for a task notices that no CPU is left for it."""
_MOST_PARTITIONS = 64
"""Under way at a time, each with its chunks on this machine's disk when it is done."""
_MOST_BYTES = 64 << 20
"""Chunks of a partition that are sent back; larger ones are read from the lake."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """What became of a partition."""

    outcome: PartitionOutcome
    error: Exception | None
    chunks: list[tuple[int, bytes]] | None
    """Rows and content of Arrow streams with the schema `SPLIT_CHUNKS`; None if there are none, or too many to send."""
    changed: frozenset[str] | None
    """As that of `Prepared`."""
    checks: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    """Outcomes of checks, by asset and name."""

    def task(self, files: SourcePartition, before: Snapshot, folder: Path) -> Task:
        """The partition as if this process had ingested it. Its chunks are left in `folder`."""
        task = Task(files, before.begin(files.key), self.outcome, error=self.error, checks=self.checks)
        for made in self.outcome.replaced.values():
            task.partition.set_baseline(made.state)
        if self.chunks is not None:
            task.prepared = Prepared([_piece(folder, *chunks) for chunks in self.chunks], changed=self.changed)
        return task


def _piece(folder: Path, rows: int, content: bytes) -> Piece:
    file = folder / f"{uuid.uuid4().hex}.arrow"
    file.write_bytes(content)
    return Piece(chunks=ArrowFile(file, rows, len(content)))


@dataclass(frozen=True, slots=True)
class IngestCall:
    """Ingests a partition. Can be pickled, and called on another machine."""

    worker: WorkerRecipe
    files: SourcePartition
    history: History
    """What was recorded of the partition before this run."""
    selected: Collection[str]
    run_id: str
    baseline: PartitionState
    """The files that held the partition's documents when the source was listed."""
    checks: Mapping[str, Collection[str]]
    """Names of the checks to evaluate, by asset."""

    def __call__(self) -> Ingested:
        """Ingest the partition; errors are in the result."""
        outcome = self.history.outcome(self.files.key, self.files.version)
        try:
            return self._ingest(_pipeline(pickle.dumps(self.worker)), outcome)
        except Exception as error:
            return Ingested(outcome, _portable(error), None, None)

    def _ingest(self, pipeline: Pipeline, outcome: PartitionOutcome) -> Ingested:
        before = Snapshot(pipeline.lake)
        history = replace(self.history, contents=ContentReader(before, tables_of(pipeline), {}))
        due = Due(pipeline, history, tuple(self.selected), self.run_id)
        is_read = "raw_documents" in self.selected and due.status("raw_documents", outcome).state != "fresh"
        finder = ChangeFinder(before, pipeline.corpus.source, partial(due.is_as_recorded, RAW))
        task = Task(self.files, before.begin(self.files.key), outcome)
        with (
            contextlib.closing(task),
            contextlib.closing(before),
            open_preparation(
                pipeline.corpus, [self.files] if is_read else [], "chunks" in self.selected, 0, finder.find
            ) as preparation,
        ):
            Ingest(due, lambda key: self.baseline).ingest(task, preparation)
            subject = _subject(pipeline, task.partition)
            checks = {asset: evaluate(asset, self.checks.get(asset, ()), subject) for asset in outcome.replaced}
            error = None if task.error is None else _portable(task.error)
            changed = task.prepared.changed if task.prepared is not None else None
            return Ingested(task.outcome, error, _chunks(task), changed, checks)


def _subject(pipeline: Pipeline, partition: PartitionSnapshot) -> Subject:
    return Subject(partition, pipeline.embeddings_table, pipeline.model.space.prompt, pipeline.settings)


def _chunks(task: Task) -> list[tuple[int, bytes]] | None:
    if task.prepared is None or "chunks" not in task.outcome.replaced:
        return None
    files = task.prepared.chunks
    if sum(file.byte_size for file in files) > _MOST_BYTES:
        return None
    return [(file.rows, file.path.read_bytes()) for file in files]


@lru_cache(1)
def _pipeline(worker: bytes) -> Pipeline:
    """The pipeline of a pickled recipe, kept for the process's next partition."""
    recipe: WorkerRecipe = pickle.loads(worker)
    return recipe.pipeline()


def _portable(error: Exception) -> Exception:
    """The error as one that can be sent."""
    return error if isinstance(error, UserError) else RuntimeError(describe(error))


@dataclass(frozen=True, slots=True)
class CheckCall:
    """Evaluates checks of a partition."""

    worker: WorkerRecipe
    key: str
    asset: str
    names: Collection[str]

    def __call__(self) -> dict[str, Outcome]:
        """Outcomes by name."""
        pipeline = _pipeline(pickle.dumps(self.worker))
        with Snapshot(pipeline.lake) as tables:
            return evaluate(self.asset, self.names, _subject(pipeline, tables.partition(self.key)))


@dataclass(frozen=True, slots=True)
class ClusterIngest:
    """Ingests the partitions of a run on a cluster."""

    compute: Compute
    due: Due
    before: Snapshot
    """The lake as it was when the source was listed."""
    checks: Mapping[str, Collection[str]]
    """Names of the checks to evaluate, by asset."""
    worker: WorkerRecipe

    @classmethod
    def of(
        cls,
        compute: Compute,
        due: Due,
        before: Snapshot,
        checks: Mapping[str, Collection[str]],
        partitions: Sequence[SourcePartition],
    ) -> ClusterIngest | None:
        """For the `partitions` that are due; None if they are few, nothing is to be embedded, or no CPUs are to spare.

        Raises ``UserError`` if there is no cluster.
        """
        is_worth_it = len(partitions) > 1 and sum(files.byte_size for files in partitions) >= _LEAST_BYTES
        if "embeddings" not in due.selected or not is_worth_it or not compute.spare_cpus():
            return None
        return cls(compute, due, before, checks, worker_recipe(due.pipeline))

    @property
    def depth(self) -> int:
        """Partitions under way at a time."""
        return min(_MOST_PARTITIONS, max(1, self.compute.spare_cpus()))

    def begin(self, files: SourcePartition) -> Callable[[], Ingested]:
        """Begin to ingest a partition; returns how to wait for it. Not from several threads at once."""
        key = files.key
        call = IngestCall(
            self.worker,
            files,
            self.due.history.only(key),
            self.due.selected,
            self.due.run_id,
            self.before.partition(key).state(RAW),
            self.checks,
        )
        return partial(self._wait, call, self._begin(call))

    def _wait(self, call: IngestCall, future: Future[Ingested]) -> Ingested:
        """The partition as another machine ingested it or, if it could not be read there, this one."""
        try:
            found = self._result(future)
            if not isinstance(found.error, SourceError):
                return found
            reason: Exception = found.error
        except EmbeddingError as error:
            self.compute.require_alive()
            reason = error
        _log.warning("partition %r is read on this machine: %s", call.files.key, describe(reason))
        return call()

    def _begin(self, call: Callable[[], T]) -> Future[T]:
        """Begin a task, if there is room for one."""
        return self.compute.run_task(call) if self.compute.has_room_for_tasks else failed(_no_room())

    def _result(self, future: Future[T]) -> T:
        """Wait for a task. Raises ``EmbeddingError`` if it failed, or if nodes were lost and no CPU is left for it."""
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except TimeoutError:
                if not self.compute.has_room_for_tasks:
                    raise _no_room() from None

    def check(self, asset: str, key: str) -> dict[str, Outcome] | None:
        """Evaluate an asset's checks of a partition; None if the machine that did so was lost."""
        if not self.checks[asset]:
            return {}
        try:
            return self._result(self._begin(CheckCall(self.worker, key, asset, self.checks[asset])))
        except UserError as error:
            _log.warning("partition %r: its checks are evaluated here: %s", key, error)
            return None


def _no_room() -> EmbeddingError:
    return EmbeddingError("the cluster has no CPU left for it", is_retryable=True)
