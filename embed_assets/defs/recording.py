"""Records materializations in Dagster: one event per asset and partition, with versions, counts and provenance.

The events are logged one by one because Dagster gives all partitions of a range run the same data version:
https://github.com/dagster-io/dagster/issues/34013
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import dagster as dg
from dagster import DagsterInstance

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.dagster_internals import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    INPUT_POINTER_TAG,
    INPUT_VERSION_TAG,
    USER_PROVIDED_TAG,
    latest_event_ids,
)
from embed_assets.defs.metadata import Metadata
from embed_assets.defs.names import DEPENDENCIES, SOURCE, Names
from embed_assets.defs.staleness import REPAIR_CODE_VERSION, History, Record
from embed_assets.stages.outcome import PartitionOutcome

Event = dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation

_MAX_PENDING = 64
"""Events queued for the writer thread: more let a run get further ahead of its record, fewer make it wait sooner."""
_PLAIN_VALUES = (dg.IntMetadataValue, dg.FloatMetadataValue, dg.TextMetadataValue)
_CONFIRMED = "unchanged: recorded again for Dagster, because of the other partitions of this run"


@dataclass(slots=True)
class Recorder:
    """Logs the events of a run's partitions in order, from a thread of its own.

    On SQLite an event takes 10 to 15 ms, and a new partition has nine: as long as a small partition takes for all
    else. `drain` waits until all events are written.
    """

    instance: DagsterInstance
    log: Callable[[Event], None]
    """Callback that writes an event to the run's log."""
    history: History
    """What was recorded before this run."""
    recorded: set[tuple[str, str]] = field(default_factory=set)
    """The (asset, partition) pairs that this run recorded a materialization of."""
    _pointers: dict[tuple[str, str], int | None] = field(default_factory=dict)
    """Storage ids of events this run recorded, by (asset, partition); None until queried. Used by the thread only."""
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="record"))
    _pending: deque[Future[None]] = field(default_factory=deque)
    errors: dict[str, Exception] = field(default_factory=dict)
    """Errors of partitions whose events could not be written, by key; complete after `drain`."""

    @property
    def names(self) -> Names:
        """Dagster names of the corpus."""
        return self.history.names

    def observed(self, partition: SourcePartition) -> None:
        """Record an observation of the files that a partition of the source has now."""

        def record() -> None:
            self.log(observation(self.names, partition))
            self._pointers[SOURCE, partition.key] = None

        self._submit(partition.key, record)

    def checked(self, evaluation: dg.AssetCheckEvaluation) -> None:
        """Record the evaluation of a check."""
        self._submit(evaluation.partition or "", lambda: self.log(evaluation))

    def materialized(
        self,
        asset: str,
        outcome: PartitionOutcome,
        code_version: str,
        input_versions: Mapping[str, str],
        metadata: Metadata,
    ) -> None:
        """Record that a partition of an asset was materialized from inputs of these data versions."""
        key, data_version = outcome.key, outcome.replaced[asset].data_version
        tags = {DATA_VERSION_TAG: data_version, CODE_VERSION_TAG: code_version, USER_PROVIDED_TAG: "true"}
        before = self.history.record(asset, key)

        def record() -> None:
            if asset == "embeddings" and before is not None and before.code_version != code_version:
                self._keep_record(before, key)
            for dependency in DEPENDENCIES[asset]:
                name = self.names.user_string(dependency)
                tags[INPUT_VERSION_TAG + name] = input_versions.get(dependency, "")
                pointer = self._pointer(dependency, key)
                tags[INPUT_POINTER_TAG + name] = "NULL" if pointer is None else str(pointer)
            asset_key = self.names.key(asset)
            self.log(dg.AssetMaterialization(asset_key=asset_key, partition=key, tags=tags, metadata=metadata))
            self._pointers[asset, key] = None

        self.recorded.add((asset, key))
        self._submit(key, record)

    def materialized_in(self, space: str, outcome: PartitionOutcome, documents: str, metadata: Metadata) -> None:
        """Record that a partition was embedded in a space other than the configured one, from these documents."""
        made = dg.AssetMaterialization(
            asset_key=self.names.space_key(space),
            partition=outcome.key,
            tags={
                DATA_VERSION_TAG: outcome.replaced["embeddings"].data_version,
                CODE_VERSION_TAG: space,
                USER_PROVIDED_TAG: "true",
                INPUT_VERSION_TAG + self.names.user_string("raw_documents"): documents,
            },
            metadata=metadata,
        )
        self._submit(outcome.key, lambda: self.log(made))

    def _keep_record(self, record: Record, key: str) -> None:
        """Write what is recorded of a partition in another space to that space's own log.

        In the asset's log the record is about to be superseded, and the space's rows stay as they are.
        """
        space = record.code_version
        kept = self.history.spaces[space].record("embeddings", key) if space in self.history.spaces else record
        if space in ("", REPAIR_CODE_VERSION) or kept != record:
            return
        inputs = {INPUT_VERSION_TAG + self.names.user_string(d): v for d, v in record.input_versions.items()}
        versions = {DATA_VERSION_TAG: record.data_version, CODE_VERSION_TAG: space, USER_PROVIDED_TAG: "true"}
        texts = {"table_id": record.table_id, "data_files": record.data_files}
        self.log(
            dg.AssetMaterialization(
                asset_key=self.names.space_key(space),
                partition=key,
                description="as it was before the partition was embedded in another space",
                tags={**versions, **inputs},
                metadata={**record.counts, **{name: text for name, text in texts.items() if text}},
            )
        )

    def damaged(self, asset: str, key: str) -> None:
        """Record that a partition's rows are damaged, which makes it stale."""
        self._submit(key, lambda: self.log(damage(self.names, asset, key)))

    def drain(self) -> None:
        """Wait until every event is written or has failed."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Write the remaining events and end the thread."""
        self._thread.shutdown()

    def confirm(self, asset: str, key: str) -> None:
        """Record the latest materialization of a partition again, with its tags and plain metadata but no pictures.

        Does nothing if it was never materialized. Call `drain` first.
        """
        found = self.instance.get_latest_data_version_record(self.names.key(asset), partition_key=key)
        if found is not None and (made := found.asset_materialization) is not None:
            metadata = {name: value for name, value in made.metadata.items() if isinstance(value, _PLAIN_VALUES)}
            self.log(made._replace(metadata=metadata, description=_CONFIRMED))

    def _submit(self, key: str, record: Callable[[], None]) -> None:
        def attempt() -> None:
            try:
                record()
            except Exception as error:  # the failure of this partition, whichever one the run is at now
                self.errors.setdefault(key, error)

        while self._pending and (len(self._pending) >= _MAX_PENDING or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(attempt))

    def _pointer(self, asset: str, key: str) -> int | None:
        if (asset, key) not in self._pointers:
            record = self.history.record(asset, key)
            return None if record is None else record.storage_id
        if self._pointers[asset, key] is None:
            latest = latest_event_ids(self.instance, self.names.key(asset), [key], observations=asset == SOURCE)
            self._pointers[asset, key] = latest.get(key)
        return self._pointers[asset, key]


def observation(names: Names, partition: SourcePartition) -> dg.AssetObservation:
    """Build the event that observes the files of a partition."""
    metadata: Metadata = {
        "files": len(partition.files),
        "bytes": partition.byte_size,
    }
    if partition.files:
        newest = max(file.modified_at for file in partition.files)
        metadata["newest_file"] = dg.MetadataValue.timestamp(newest)
    return dg.AssetObservation(
        asset_key=names.key(SOURCE),
        partition=partition.key,
        tags={DATA_VERSION_TAG: partition.version},
        metadata=metadata,
    )


def damage(names: Names, asset: str, key: str) -> dg.AssetMaterialization:
    """Build the event that marks a partition's rows as damaged: no code has its version, so the partition is stale."""
    return dg.AssetMaterialization(
        asset_key=names.key(asset),
        partition=key,
        description="damaged rows were found; the next sync rebuilds them",
        tags={DATA_VERSION_TAG: "damaged", USER_PROVIDED_TAG: "true", CODE_VERSION_TAG: REPAIR_CODE_VERSION},
    )
