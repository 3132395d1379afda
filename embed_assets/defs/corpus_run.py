"""What the step does: bring a run's partitions up to date, one after the other, and record what was made."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Self

import dagster as dg

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.engine_report import engine_metadata
from embed_assets.defs.recording import MetadataValue, Recorder, observation, peak_memory_bytes
from embed_assets.defs.results import PartitionResult, RunObserver
from embed_assets.defs.specs import ASSETS, DEPENDENCIES, SOURCE
from embed_assets.defs.staleness import History, load_history
from embed_assets.errors import ModelError, PartitionError, SettingsError, UserError
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.stages.embeddings import Work
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.raw_documents import RawDocuments

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Prepared:
    """A partition that was read and chunked. A field is None where that stage was fresh."""

    versions: dict[str, str | None]
    """Data version of the source and each asset, after what ran so far."""
    raw: RawDocuments | None = None
    chunks: Replaced | None = None
    error: Exception | None = None
    """Why it went no further."""


@dataclass(frozen=True, slots=True)
class _Made:
    """One materialization: the arguments of `Recorder.materialized`."""

    asset: str
    key: str
    data_version: str
    code_version: str
    input_versions: dict[str, str]
    metadata: dict[str, MetadataValue]


@dataclass(slots=True)
class CorpusRun:
    """One run over some partitions and some of the three assets."""

    pipeline: Pipeline
    observer: RunObserver
    run_id: str
    recorder: Recorder
    history: History
    partitions: Mapping[str, SourcePartition]
    keys: Sequence[str]
    selected: Sequence[str]
    made: list[_Made] = field(default_factory=list)

    @classmethod
    def begin(cls, context: dg.AssetExecutionContext, pipeline: Pipeline, observer: RunObserver) -> Self:
        """List the source, read what is recorded, and note what the source has that was not observed yet."""
        pipeline.lake.check_writable()
        pipeline = pipeline.calibrated()
        _ = pipeline.version_at_start  # texts may move out of a partition before another one takes them in
        listed = pipeline.source.partitions()
        partitions = {key: listed.get(key, SourcePartition(key)) for key in context.partition_keys}
        # Emptied partitions come last, so that their vectors can still be found by those their texts moved to.
        keys = sorted(partitions, key=lambda key: (not partitions[key].files, key))
        history = load_history(context.instance, pipeline, keys)
        for key, partition in partitions.items():
            if history.version(SOURCE, key) != partition.version:
                context.log_event(observation(partition))
        selected = [asset for asset in ASSETS if dg.AssetKey(asset) in context.selected_asset_keys]
        observer.on_start({key: sum(file.size for file in partitions[key].files) for key in keys})
        recorder = Recorder(context.instance, context.log_event)
        return cls(pipeline, observer, context.run_id, recorder, history, partitions, keys, selected)

    def materialize(self) -> dict[str, str]:
        """Bring every partition up to date; returns the messages of those that failed, by key.

        While one partition embeds, the next one is read and chunked by another thread.
        """
        failures: dict[str, str] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as ahead:
            upcoming = ahead.submit(self._prepare, self.keys[0])
            for following, key in zip([*self.keys[1:], None], self.keys, strict=True):
                current = upcoming
                wait([current])
                if following is not None:
                    upcoming = ahead.submit(self._prepare, following)
                try:
                    result = self._finish(key, current.result())
                except (ModelError, SettingsError):
                    raise  # a model that can't be loaded is no partition's fault
                except Exception as error:
                    failures[key] = _message(error)
                    result = PartitionResult("failed", error=failures[key])
                    if not isinstance(error, UserError):
                        _log.error("partition %r failed unexpectedly", key, exc_info=error)
                self.observer.on_partition(key, result)
        if failures:
            self._confirm(key for key in self.keys if key not in failures)
        return failures

    def outputs_for_downstream(self, in_run: Collection[dg.AssetKey]) -> Iterator[dg.MaterializeResult[None]]:
        """Outputs, needed only when the same run also makes assets downstream of ours: else those are skipped.

        The events that they cause carry one version for all partitions, so ours are logged again after them.
        """
        if all(key.to_user_string() in (*ASSETS, SOURCE) for key in in_run):
            return
        for asset in self.selected:
            yield dg.MaterializeResult(asset_key=asset)
        self._confirm(self.keys)

    def _prepare(self, key: str) -> _Prepared:
        """Read and chunk a partition, as far as that is selected and due."""
        partition = self.partitions[key]
        prepared = _Prepared(
            {SOURCE: partition.version, **{asset: self.history.version(asset, key) for asset in ASSETS}}
        )
        try:
            self._read_and_chunk(partition, prepared)
        except Exception as error:  # raised again by _finish, once what was made before it is recorded
            prepared.error = error
        return prepared

    def _read_and_chunk(self, partition: SourcePartition, prepared: _Prepared) -> None:
        key = partition.key
        if self._is_due("raw_documents", key, prepared.versions):
            prepared.raw = self.pipeline.materialize_raw_documents(
                partition, self._provenance("raw_documents", prepared)
            )
            prepared.versions["raw_documents"] = prepared.raw.replaced.data_version
        if self._is_due("chunks", key, prepared.versions):
            prepared.chunks = self.pipeline.materialize_chunks(key, self._provenance("chunks", prepared))
            prepared.versions["chunks"] = prepared.chunks.data_version

    def _finish(self, key: str, prepared: _Prepared) -> PartitionResult:
        """Record what was prepared, embed if that is selected and due, and record that."""
        result = self.history.known_result(key)
        if prepared.raw is not None:
            result.documents, result.rejected = prepared.raw.documents, prepared.raw.rejected
            self._record("raw_documents", key, prepared, prepared.raw.replaced, result)
        if prepared.chunks is not None:
            result.chunks = result.reused = prepared.chunks.rows
            self._record("chunks", key, prepared, prepared.chunks, result)
        if prepared.error is not None:
            raise prepared.error
        if self._is_due("embeddings", key, prepared.versions):
            embedded = self.pipeline.materialize_embeddings(
                key,
                self._provenance("embeddings", prepared),
                lambda texts, tokens: self.observer.on_window(key, texts, tokens),
                lambda progress: self.observer.on_progress(key, progress),
                rewrite=self.history.is_marked_for_repair("embeddings", key),
            )
            prepared.versions["embeddings"] = embedded.replaced.data_version
            work = embedded.work
            result.chunks, result.embedded, result.reused = work.chunks, work.embedded, work.reused
            result.dropped, result.tokens = work.dropped, work.engine.tokens
            result.rejected_chunks = work.rejected_chunks
            self._record("embeddings", key, prepared, embedded.replaced, result, work)
            result.state = "materialized"
        elif prepared.raw is not None or prepared.chunks is not None:
            result.state = "materialized"
        return result

    def _is_due(self, asset: str, key: str, versions: Mapping[str, str | None]) -> bool:
        """The asset is selected, and missing or stale. Raises ``PartitionError`` when its inputs were never made."""
        inputs = {dependency: versions[dependency] for dependency in DEPENDENCIES[asset]}
        if asset not in self.selected:
            return False
        if self.history.status(asset, key, self.pipeline.code_versions[asset], inputs).state == "fresh":
            return False
        for dependency, version in inputs.items():
            if version is None:
                raise PartitionError(
                    f"{asset} of partition {key!r} needs {dependency}, which was never materialized; select it as well"
                )
        return True

    def _provenance(self, asset: str, prepared: _Prepared) -> Provenance:
        return Provenance(self.run_id, self._inputs(asset, prepared))

    def _inputs(self, asset: str, prepared: _Prepared) -> dict[str, str]:
        return {dependency: prepared.versions[dependency] or "" for dependency in DEPENDENCIES[asset]}

    def _record(
        self,
        asset: str,
        key: str,
        prepared: _Prepared,
        replaced: Replaced,
        result: PartitionResult,
        work: Work | None = None,
    ) -> None:
        """Log a materialization. All assets carry the same keys; what is not theirs (no `work`) is 0."""
        engine, work = self.pipeline.engine_facts, work or Work()
        metadata: dict[str, MetadataValue] = {
            "documents": result.documents,
            "rejected": result.rejected,
            "chunks": 0 if asset == "raw_documents" else result.chunks,
            "embedded": work.embedded,
            "reused": work.reused,
            "dropped": work.dropped,
            "truncated": work.truncated,
            "rejected_chunks": work.rejected_chunks,
            **engine_metadata(work, engine),
            "space": self.pipeline.space.name,
            "peak_memory_bytes": peak_memory_bytes(),
            "is_committed": int(replaced.is_committed),
            "dagster/partition_row_count": replaced.rows,
        }
        if replaced.table_version is not None:
            metadata |= {"table_version": replaced.table_version, "table_id": replaced.table_id}
        made = _Made(
            asset,
            key,
            replaced.data_version,
            self.pipeline.code_versions[asset],
            self._inputs(asset, prepared),
            metadata,
        )
        self.recorder.materialized(*_arguments(made))
        self.made.append(made)

    def _confirm(self, keys: Iterable[str]) -> None:
        """Log the present state of partitions again, whether they were made in this run or before.

        After a run that failed, Dagster counts every partition it had planned and not seen as failed.
        """
        made = {(m.asset, m.key): m for m in self.made}
        for key in keys:
            for asset in self.selected:
                record = self.history.record(asset, key)
                if (asset, key) in made:
                    self.recorder.materialized(*_arguments(made[asset, key]))
                elif record is not None:
                    counts: dict[str, MetadataValue] = {**record.counts}
                    if record.table_id:
                        counts["table_id"] = record.table_id
                    self.recorder.materialized(
                        asset, key, record.data_version, record.code_version, record.input_versions, counts
                    )


def _arguments(made: _Made) -> tuple[str, str, str, str, dict[str, str], dict[str, MetadataValue]]:
    return made.asset, made.key, made.data_version, made.code_version, made.input_versions, made.metadata


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
