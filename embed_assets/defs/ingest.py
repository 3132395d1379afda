"""Ingests a partition in a run: reads and chunks what is due of it, and commits both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.due import Due
from embed_assets.errors import LakeError, UserError, hide_secrets
from embed_assets.lake.reader import PartitionState
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.lake.writer import Replaced
from embed_assets.stages.checks import Outcome
from embed_assets.stages.chunk_rows import ChunkRows, PreparedChunks, StoredChunks
from embed_assets.stages.chunks import materialize_chunks
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.preparing import Preparation, Prepared
from embed_assets.stages.raw_documents import materialize_raw_documents

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Task:
    """A partition on its way through the three stages."""

    files: SourcePartition
    partition: PartitionSnapshot
    outcome: PartitionOutcome
    prepared: Prepared | None = None
    """Its documents and chunks, if they were read or split in this run."""
    error: Exception | None = None
    """The error that ingesting it raised."""
    checks: Mapping[str, Mapping[str, Outcome]] = field(default_factory=dict)
    """Outcomes of the checks that were evaluated elsewhere, by asset and name."""

    def replace_prepared(self, prepared: Prepared) -> None:
        """Use `prepared` instead of what was prepared before."""
        if self.prepared is not None:
            self.prepared.remove()
        self.prepared = prepared

    def note(self, asset: str, made: Replaced) -> None:
        """Remember what was committed."""
        self.outcome.replaced[asset], self.outcome.versions[asset] = made, made.data_version

    def close(self) -> None:
        """Remove what was prepared, and return open tables."""
        if self.prepared is not None:
            self.prepared.remove()
        self.partition.close()


@dataclass(frozen=True, slots=True)
class Ingest:
    """Ingests the partitions of a run, one at a time."""

    due: Due
    baseline: Callable[[str], PartitionState]
    """The files that held a partition's documents when the source was listed."""

    def ingest(self, task: Task, preparation: Preparation) -> Task:
        """Read and chunk a partition where that is selected and due; an error is kept in the task."""
        try:
            self._read(task, preparation)
            self._chunk(task, preparation)
        except Exception as error:  # raised by whoever records what was materialized before it
            task.error = error
        finally:
            preparation.end(task.files)
        return task

    def chunk_rows(self, task: Task) -> ChunkRows:
        """The partition's chunks: as just prepared, where possible."""
        target = self.due.pipeline.target
        prepared = task.prepared if "chunks" in task.outcome.replaced else None
        stored = StoredChunks(task.partition, target.model_input)
        if prepared is None:
            return stored
        are_enough = prepared.changed is None or self.due.is_as_recorded(target.table, task.partition)
        return PreparedChunks(prepared.chunks, prepared.changed) if are_enough else stored

    def _read(self, task: Task, preparation: Preparation) -> None:
        if self.due.is_due("raw_documents", task.outcome):
            # Rows that another run wrote since the source was listed may be newer than these files.
            task.partition.set_baseline(self.baseline(task.outcome.key))
            task.prepared = preparation.take(task.files)
            self._make(task, "raw_documents", lambda: preparation.take_whole(task.files))

    def _chunk(self, task: Task, preparation: Preparation) -> None:
        partition, outcome = task.partition, task.outcome
        if not self.due.is_due("chunks", outcome):
            return

        def split_stored() -> Prepared:
            with partition.watched(RAW):
                return preparation.split(outcome.key, partition.rows(RAW, self.due.pipeline.corpus.text_columns))

        prepared = task.prepared
        if prepared is None or (prepared.changed is not None and not self.due.is_as_recorded(CHUNK_TABLE, partition)):
            task.replace_prepared(split_stored())
        self._make(task, "chunks", split_stored)

    def _make(self, task: Task, asset: str, prepare_all: Callable[[], Prepared]) -> None:
        """Commit what was prepared, or all of the partition if the rows that were to stay can't be read."""
        try:
            self._commit(task, asset)
        except LakeError as error:
            if error.is_retryable or task.prepared is None or task.prepared.changes is None:
                raise
            _log.warning("partition %r: %s is made anew as a whole: %s", task.outcome.key, asset, describe(error))
            task.replace_prepared(prepare_all())
            self._commit(task, asset)

    def _commit(self, task: Task, asset: str) -> None:
        partition, outcome, prepared = task.partition, task.outcome, task.prepared
        assert prepared is not None
        provenance, source = self.due.provenance(asset, outcome), self.due.pipeline.corpus.source
        if asset == "chunks":
            made = materialize_chunks(partition, prepared, provenance, outcome)
        else:
            made = materialize_raw_documents(partition, prepared, source, task.files, provenance, outcome)
        task.note(asset, made)


def describe(error: Exception) -> str:
    """The error as one line for logs and results, without secrets."""
    return str(error) if isinstance(error, UserError) else hide_secrets(f"{type(error).__name__}: {error}")
