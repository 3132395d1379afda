"""Keeps spaces other than the configured one up to date, while readers or a rollback still need them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from embed_assets.defs.corpus_run import CorpusRun
from embed_assets.defs.ingest import describe
from embed_assets.defs.metadata import MetadataWriter
from embed_assets.defs.staleness import History
from embed_assets.errors import ModelError, PartitionError, SettingsError, UserError, is_retryable
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import RAW
from embed_assets.lake.writer import Provenance
from embed_assets.stages.chunk_rows import PreparedChunks
from embed_assets.stages.compute import Compute
from embed_assets.stages.embeddings import materialize_embeddings
from embed_assets.stages.generations import pipeline_of
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.preparing import Preparation, open_preparation
from embed_assets.stages.remote import open_compute


def keep_spaces(run: CorpusRun) -> None:
    """Bring the run's partitions up to date in each space that is kept, after the run itself, one space at a time.

    Only one model is loaded at a time. A partition that fails is a failure of the run.
    """
    for space, history in run.history.spaces.items():
        due = {key: reasons for key in run.keys if (reasons := _reasons(run, space, history, key))}
        if not due:
            continue
        try:
            _keep(run, space, history, due)
        except UserError as error:  # of the model: it concerns every partition
            for key in due:
                _fail(run, space, key, error)
    run.drain()


def _reasons(run: CorpusRun, space: str, history: History, key: str) -> Sequence[str]:
    """Why a partition is not up to date in a space; empty if it is, or has no documents to be made of."""
    documents = run.documents.get(key)
    if documents is None:
        return ()
    return history.status_of_space(space, key, documents).reasons


def _keep(run: CorpusRun, space: str, history: History, due: dict[str, Sequence[str]]) -> None:
    """Embed the partitions that are due in a space. Raises ``UserError`` if its model can't be used."""
    pipeline = pipeline_of(run.pipeline, space)
    pipeline.lake.check_usable(pipeline.embeddings_table)
    run.observer.news(f"{len(due):,} partitions are brought up to date in the space {space}, which is still in use")
    configured, byte_size = pipeline.settings.prepare_processes, sum(run.partitions[key].byte_size for key in due)
    before, metadata = Snapshot(pipeline.lake.session()), MetadataWriter(pipeline, history)
    with (
        contextlib.closing(open_compute(pipeline)) as compute,
        open_preparation(pipeline.corpus, [], True, configured, split_bytes=byte_size) as preparation,
    ):
        upkeep = _Upkeep(run, pipeline, compute, preparation)
        for key, reasons in due.items():
            try:
                with contextlib.closing(before.begin(key)) as partition:
                    outcome = upkeep.embed(partition, reasons, history.version("embeddings", key) or "")
            except (ModelError, SettingsError):
                raise
            except Exception as error:
                _fail(run, space, key, error)
            else:
                written = metadata.of("embeddings", outcome, compute)
                run.recorder.materialized_in(space, outcome, run.documents[key], written)
                run.observer.finished_in(space, outcome)


@dataclass(frozen=True, slots=True)
class _Upkeep:
    """Embeds partitions in one space."""

    run: CorpusRun
    pipeline: Pipeline
    """That of the space."""
    compute: Compute
    preparation: Preparation

    def embed(self, partition: PartitionSnapshot, reasons: Sequence[str], previous: str) -> PartitionOutcome:
        """Replace the space's rows of a partition by those of its current documents."""
        outcome = PartitionOutcome(partition.key, reasons={"embeddings": reasons})
        inputs = {"raw_documents": self.run.documents[partition.key]}
        provenance = Provenance(self.run.run_id, inputs, previous=previous)
        report = partial(self.run.observer.progress, partition.key)
        with self._chunks(partition) as chunks:
            made = materialize_embeddings(
                partition, chunks, self.pipeline.target, self.compute, provenance, outcome, report
            )
        outcome.replaced["embeddings"] = made
        return outcome

    @contextlib.contextmanager
    def _chunks(self, partition: PartitionSnapshot) -> Iterator[PreparedChunks]:
        """The chunks of the partition's documents as the space has them: with its model's tokenizer and its limits."""
        with partition.watched(RAW):
            documents = partition.rows(RAW, self.pipeline.corpus.text_columns)
            prepared = self.preparation.split(partition.key, documents)
        try:
            yield PreparedChunks(prepared.chunks)
        finally:
            prepared.remove()


def _fail(run: CorpusRun, space: str, key: str, error: Exception) -> None:
    """Make a partition a failure of the run, unless it is one already."""
    if key not in run.failures:
        message = f"the space {space!r}, which is still in use, could not take it in: {describe(error)}"
        run.fail(key, PartitionError(message, is_retryable(error)))
