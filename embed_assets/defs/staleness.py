"""What is missing or stale, and why: the one place that decides it, for all partitions at once.

The facts come from Dagster's event log (the latest materialization of each partition of each asset) and from the
tables' logs (which partitions have rows at all). `plan`, `sync` and the step itself ask here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dagster import DagsterInstance

from embed_assets.corpus.source import detects_changes
from embed_assets.defs.dagster_internals import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    INPUT_VERSION_TAG,
    StoredEvent,
    latest_event_ids,
    read_events,
)
from embed_assets.defs.names import ASSETS, DEPENDENCIES, SOURCE, Names
from embed_assets.errors import LakeError
from embed_assets.lake.reader import PartitionFiles, TableState
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, TableSpec
from embed_assets.settings import same_place
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline

State = Literal["missing", "stale", "fresh"]

REPAIR_CODE_VERSION = "needs-repair"
"""Code version that `verify --repair` gives to what it found damaged: no code has it, so it is stale."""
READ_EACH_TIME = "its source tells neither checksums nor times, so it is read each time"
_KEYS_PER_QUERY = 500


@dataclass(frozen=True, slots=True)
class Record:
    """The latest materialization of one partition of one asset, or observation of the source."""

    storage_id: int
    data_version: str
    code_version: str
    input_versions: Mapping[str, str]
    """Data version of each dependency when it was made."""
    counts: Mapping[str, float]
    """The numbers among its metadata."""
    table_id: str = ""
    """Delta's id of the table that the rows were written to."""
    data_files: str = ""
    """Hash of the files that held its rows; none in records of before 0.2."""
    source: str = ""
    """Where documents were read; none for other assets, and in records of before 0.2."""
    run_id: str = ""
    """The run that made it; none for what was recorded outside of runs."""
    timestamp: float = 0.0
    """When it was recorded, seconds since 1970."""

    @property
    def rows(self) -> int:
        """Rows that the partition had in the asset's table."""
        return int(self.counts.get("dagster/partition_row_count", 0))


@dataclass(frozen=True, slots=True)
class Status:
    """The state of one partition of one asset."""

    state: State
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ContentReader:
    """Data versions of partitions as the tables have them; each is read once."""

    tables: Snapshot
    specs: Mapping[str, TableSpec]
    """By asset."""
    known: dict[tuple[str, str, str], str]
    """Data versions by asset, partition and hash of its files."""

    def version(self, asset: str, key: str) -> str:
        """The data version of what the asset's table holds of a partition; '' when that can't be read.

        Raises ``LakeError`` when the storage fails.
        """
        place = (asset, key, self.tables.partition(key).state(self.specs[asset]).files_hash)
        if place not in self.known:
            try:
                self.known[place] = self.tables.content(self.specs[asset], key)
            except LakeError as error:
                if error.is_retryable:
                    raise
                self.known[place] = ""
        return self.known[place]


@dataclass(frozen=True)
class History:
    """What is recorded of the partitions."""

    records: Mapping[str, Mapping[str, Record]]
    """By asset, then partition."""
    tables: Mapping[str, TableState | None] = field(default_factory=dict)
    """By asset (and "rejected_documents"), what its table holds now."""
    contents: ContentReader | None = None
    """What the tables hold of partitions, for when their files do not tell."""
    names: Names = field(default_factory=Names)
    source: str = ""
    """Where documents are read now."""

    def record(self, asset: str, key: str) -> Record | None:
        """The latest record of a partition."""
        return self.records[asset].get(key)

    def version(self, asset: str, key: str) -> str | None:
        """The data version of a partition, None when it was never made."""
        record = self.record(asset, key)
        return None if record is None else record.data_version

    def is_marked_for_repair(self, asset: str, key: str) -> bool:
        """`verify --repair` found the partition's rows damaged, and it was not made since."""
        record = self.record(asset, key)
        return record is not None and record.code_version == REPAIR_CODE_VERSION

    def outcome(self, key: str, source_version: str | None) -> PartitionOutcome:
        """What doing nothing with a partition comes to: the versions and numbers that are recorded."""
        raw, chunks = self.record("raw_documents", key), self.record("chunks", key)
        counts = raw.counts if raw else {}
        return PartitionOutcome(
            key,
            versions={SOURCE: source_version, **{asset: self.version(asset, key) for asset in ASSETS}},
            documents=int(counts.get("documents", 0)),
            rejected=int(counts.get("rejected", 0)),
            chunks=chunks.rows if chunks else 0,
        )

    def status(self, asset: str, key: str, code_version: str, inputs: Mapping[str, str | None]) -> Status:
        """State and reasons of a partition, given its dependencies' current data versions.

        Missing: never materialized, or its rows are gone. Stale: its code or a dependency's data changed.
        """
        record = self.record(asset, key)
        if record is None:
            return Status("missing", ("never materialized",))
        # Another space's rows are in another table: only for its own code is this one's word of use.
        if record.code_version == code_version and (loss := self._loss(asset, key, record)):
            return Status("missing", (loss,))
        if self.is_marked_for_repair(asset, key):
            return Status("stale", ("verify found its rows damaged",))
        if not record.code_version:
            return self._status_of_reported(record, key, inputs)
        reasons: list[str] = []
        if record.code_version == code_version and self._is_replaced(asset, key, record):
            reasons.append("its rows are not those that were recorded: somebody else replaced them")
        if record.source and same_place(record.source) != same_place(self.source):
            reasons.append(f"its documents were read from {record.source!r}")
        if record.code_version != code_version:
            reasons.append(f"code changed: {record.code_version} -> {code_version} ({_CODE_MEANS[asset]})")
        if not detects_changes(inputs.get(SOURCE) or ""):
            reasons.append(READ_EACH_TIME)
        reasons += [
            f"{'source files' if dependency == SOURCE else dependency} changed"
            for dependency, version in inputs.items()
            if version is not None and record.input_versions.get(dependency) != version
        ]
        return Status("stale", tuple(reasons)) if reasons else Status("fresh")

    def _status_of_reported(self, record: Record, key: str, inputs: Mapping[str, str | None]) -> Status:
        """Somebody reported that it is there (as the UI lets you): believed, as Dagster does, until inputs are made."""
        reasons: list[str] = []
        for dependency, version in inputs.items():
            made = self.record(dependency, key)
            if dependency != SOURCE and (
                made is None or made.timestamp > record.timestamp or made.data_version != version
            ):
                reasons.append(f"{dependency} was made after somebody reported that this is there")
        return Status("stale", tuple(reasons)) if reasons else Status("fresh")

    def _loss(self, asset: str, key: str, record: Record) -> str:
        """What the tables no longer hold of what was recorded, else ''."""
        table = self.tables[asset]
        if record.rows and (table is None or key not in table.partitions):
            return f"its {record.rows} rows are not in the table"
        if record.table_id and (table is None or table.id != record.table_id):
            return "it was materialized into another lake"
        if table is not None and table.version < record.counts.get("table_version", 0):
            return "the table is older than what was recorded"
        if asset == "raw_documents" and record.counts.get("rejected"):
            rejected = self.tables[REJECTED.kind]
            if rejected is None or key not in rejected.partitions:
                return "its rejected documents are not in the table"
        return ""

    def _is_replaced(self, asset: str, key: str, record: Record) -> bool:
        """The partition holds other rows than were recorded: of another corpus, another instance, another tool.

        Compaction makes other files of the same rows, so where the files differ, their content decides.
        """
        table = self.tables[asset]
        if table is None or not (record.data_files or record.table_id):
            return False
        now = table.partitions.get(key, PartitionFiles())
        is_same = now.files == record.data_files if record.data_files else now.written_at <= record.timestamp
        return not is_same and self.contents is not None and self.contents.version(asset, key) != record.data_version


_CODE_MEANS = {
    "raw_documents": "the parser or its settings",
    "chunks": "the chunker, its settings or the tokenizer",
    "embeddings": "the embedding space",
}


def load_history(
    instance: DagsterInstance,
    pipeline: Pipeline,
    keys: Collection[str] | None = None,
    earlier: History | None = None,
    tables: Snapshot | None = None,
) -> History:
    """Everything recorded of the partitions (all of them by default), in a handful of queries, and what the lake
    (as it is now, or as `tables` has it) holds of them.

    What `earlier` has already is not read again.
    """
    names = Names.of(pipeline)
    known = earlier.records if earlier else {}
    records = {a: load_records(instance, names, a, keys, known.get(a, {})) for a in (SOURCE, *ASSETS)}
    specs = {spec.kind: spec for spec in (RAW, REJECTED, CHUNK_TABLE, pipeline.embeddings_table)}
    tables = tables or Snapshot(pipeline.lake)
    states = {kind: tables.state(spec) for kind, spec in specs.items()}
    contents = ContentReader(tables, specs, earlier.contents.known if earlier and earlier.contents else {})
    return History(records, states, contents, names, pipeline.corpus.source.root)


def partition_statuses(
    history: History, key: str, source_version: str | None, code_versions: Mapping[str, str]
) -> dict[str, Status]:
    """State and reasons of the three assets of a partition, each judged by its direct dependencies, as Dagster does."""
    versions = {asset: history.version(asset, key) for asset in ASSETS} | {SOURCE: source_version}
    return {
        asset: history.status(asset, key, code_versions[asset], {d: versions[d] for d in DEPENDENCIES[asset]})
        for asset in ASSETS
    }


def load_records(
    instance: DagsterInstance,
    names: Names,
    asset: str,
    keys: Collection[str] | None,
    known: Mapping[str, Record],
) -> dict[str, Record]:
    """The latest record of each partition of an asset (of all of them if `keys` is None), by key.

    Those in `known` that are still the latest are not read again.
    """
    # A short list of keys narrows the query; a long one would exceed the database's number of variables.
    narrow = set(keys) if keys is not None and len(keys) <= _KEYS_PER_QUERY else None
    if narrow is not None and not narrow:
        return {}
    latest = latest_event_ids(instance, names.key(asset), narrow, observations=asset == SOURCE)
    records = {key: known[key] for key, id in latest.items() if key in known and known[key].storage_id == id}
    new = sorted(id for key, id in latest.items() if key not in records)
    return records | {event.partition: _record(event, names) for event in read_events(instance, new)}


def _record(event: StoredEvent, names: Names) -> Record:
    inputs = {asset: event.tags.get(INPUT_VERSION_TAG + names.user_string(asset)) for asset in (SOURCE, *ASSETS)}
    return Record(
        event.storage_id,
        event.tags.get(DATA_VERSION_TAG, ""),
        event.tags.get(CODE_VERSION_TAG, ""),
        {asset: version for asset, version in inputs.items() if version is not None},
        event.numbers,
        event.texts.get("table_id", ""),
        event.texts.get("data_files", ""),
        event.texts.get("source", ""),
        event.run_id,
        event.timestamp,
    )
