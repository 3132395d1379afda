"""What is done on the machines of a cluster, each call as a task with one CPU: it commits to the lake by itself, and
sends back what is to be recorded. Calls can be pickled."""

from __future__ import annotations

import contextlib
import logging
import pickle
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.due import Due
from embed_assets.defs.ingest import Ingest, Task, describe
from embed_assets.defs.metadata import MetadataWriter
from embed_assets.defs.staleness import ContentReader, History, tables_of
from embed_assets.errors import UserError
from embed_assets.lake.reader import PartitionState
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import RAW, TableSpec
from embed_assets.lake.writer import Provenance
from embed_assets.scratch import ArrowFile
from embed_assets.stages.changes import ChangeFinder
from embed_assets.stages.checks import Outcome, Subject, evaluate
from embed_assets.stages.chunk_rows import StoredChunks
from embed_assets.stages.embeddings import commit_embeddings
from embed_assets.stages.outcome import PartitionOutcome, Sample
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.preparing import Piece, Prepared, open_preparation
from embed_assets.stages.remote import WorkerRecipe

_log = logging.getLogger(__name__)

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
    return Subject(partition, pipeline.embeddings_table, pipeline.model.space.model_input, pipeline.settings)


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
class Committed:
    """What became of a partition's embeddings."""

    outcome: PartitionOutcome
    error: Exception | None
    checks: dict[str, Outcome] | None = None
    """Outcomes of checks, by name; None if they could not be evaluated there, or the pictures not be drawn."""


@dataclass(frozen=True, slots=True)
class CommitCall:
    """Commits a partition's embeddings, whose vectors are staged, and draws its pictures."""

    worker: WorkerRecipe
    history: History
    """What was recorded of the partition before this run."""
    outcome: PartitionOutcome
    """What became of it so far."""
    baselines: Sequence[PartitionState]
    """The files that hold its documents, its chunks and, if only some are replaced, its embeddings."""
    changed: frozenset[str] | None
    """Documents whose embeddings are replaced; None: all."""
    rejected: Mapping[str, str]
    """Why the model has no vector of an input, by input hash."""
    provenance: Provenance
    checks: Collection[str]
    """Names of the checks to evaluate."""

    def __call__(self) -> Committed:
        """Commit the embeddings; an error is in the result."""
        try:
            return self._commit(_pipeline(pickle.dumps(self.worker)))
        except Exception as error:
            return Committed(self.outcome, _portable(error))

    def _commit(self, pipeline: Pipeline) -> Committed:
        outcome, target = self.outcome, pipeline.target
        with Snapshot(pipeline.lake) as tables:
            partition = tables.partition(outcome.key)
            for state in self.baselines:
                partition.set_baseline(state)
            chunks = StoredChunks(partition, target.model_input, self._changed(partition, target.table))
            outcome.replaced["embeddings"] = commit_embeddings(
                partition, chunks, target, self.rejected, self.provenance, outcome
            )
            checks = self._look(pipeline, partition)
            outcome.sample, outcome.stored = Sample(), None  # large; drawn, or to be read where they will be
            return Committed(outcome, None, checks)

    def _changed(self, partition: PartitionSnapshot, table: TableSpec) -> frozenset[str] | None:
        """The documents whose embeddings are to be replaced; None, all, if others than the expected ones are there.

        Ray repeats a task whose machine was lost, which may have committed them before.
        """
        expected = [state for state in self.baselines if state.table == table]
        partition.reset_baseline(table)
        is_as_expected = all(partition.state(table).files == state.files for state in expected)
        return self.changed if is_as_expected else None

    def _look(self, pipeline: Pipeline, partition: PartitionSnapshot) -> dict[str, Outcome] | None:
        """Draw the pictures of what was committed, and evaluate its checks.

        An error is no error of the partition, whose rows are in: the run's process will meet it, or not.
        """
        try:
            self.outcome.pictures = MetadataWriter(pipeline, self.history).pictures(self.outcome)
            return evaluate("embeddings", self.checks, _subject(pipeline, partition))
        except Exception as error:
            _log.warning("partition %r: its embeddings are checked by the run: %s", partition.key, describe(error))
            self.outcome.pictures = None
            return None
