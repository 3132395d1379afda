"""Decides which partitions are missing, stale or fresh, and why.

The inputs are Dagster's event log (the latest materialization of each partition of each asset) and the tables'
transaction logs (which partitions have rows). `plan`, `sync`, the sensors and the step all use this module and
so agree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
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
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.spaces import find_spaces, space_table
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, TableSpec
from embed_assets.locations import canonical_location
from embed_assets.records import ContentVersion
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline

State = Literal["missing", "stale", "fresh"]

SPACE_LOG = "embeddings/"
"""Before the name of a space: its embeddings while it is not the configured one."""
REPAIR_CODE_VERSION = "needs-repair"
"""Code version recorded for damaged partitions: no code has it, so they are stale."""
READ_EACH_TIME = "its source tells neither checksums nor times, so it is read each time"
_KEYS_PER_QUERY = 500
"""Old builds of SQLite take no more than 999 variables in a statement; for more keys, all partitions are queried."""


@dataclass(frozen=True, slots=True)
class Record:
    """The latest materialization of one partition of one asset, or observation of the source."""

    storage_id: int
    """Id of the event in Dagster's event log; later events have larger ids."""
    data_version: str
    code_version: str
    """'' for an event that a person reported."""
    input_versions: Mapping[str, str]
    """Data version of each dependency at the time of materialization."""
    counts: Mapping[str, float]
    """Numeric metadata, by name."""
    table_id: str = ""
    """Delta's id of the table that the rows were written to."""
    data_files: str = ""
    """Hash of the files that held the rows; '' in records from before version 0.2."""
    source: str = ""
    """Location that documents were read from; '' for other assets, and in records from before version 0.2."""
    fields: str | None = None
    """EMBED_METADATA when documents were read; None for other assets, and in older records."""
    run_id: str = ""
    """The run that recorded it; '' if it was recorded outside of runs."""
    timestamp: float = 0.0
    """When it was recorded, in seconds since 1970."""

    @property
    def rows(self) -> int:
        """Number of rows that the partition had in the asset's table."""
        return int(self.counts.get("dagster/partition_row_count", 0))


@dataclass(frozen=True, slots=True)
class Status:
    """The state of one partition of one asset."""

    state: State
    reasons: tuple[str, ...] = ()
    """Why it is not fresh; empty if it is."""


@dataclass(frozen=True, slots=True)
class ContentReader:
    """Computes data versions of partitions from the rows in the tables, reading each partition once."""

    tables: Snapshot
    specs: Mapping[str, TableSpec]
    """Tables by asset."""
    known: dict[tuple[str, str, str], str]
    """Cache of data versions by asset, partition and hash of the partition's files."""

    def has_rows_of(self, record: Record, asset: str, key: str) -> bool:
        """Whether the rows that the asset's table holds of a partition are the record's. Unreadable ones are not.

        Raises ``LakeError`` for retryable errors of the storage.
        """
        place = (asset, key, self.tables.partition(key).state(self.specs[asset]).files_hash)
        if place not in self.known:
            try:
                self.known[place] = self.tables.content(self.specs[asset], key, record.data_version)
            except LakeError as error:
                if error.is_retryable:
                    raise
                self.known[place] = ""
        return self.known[place] == record.data_version


@dataclass(frozen=True)
class History:
    """The recorded state of the partitions, and what the tables hold of them."""

    records: Mapping[str, Mapping[str, Record]]
    """Latest records by asset, then partition."""
    tables: Mapping[str, TableState | None] = field(default_factory=dict)
    """Current state of the table of each asset, and of "rejected_documents"; None if it does not exist."""
    contents: ContentReader | None = None
    """Reads the tables' rows where their files alone do not decide whether they changed."""
    names: Names = field(default_factory=Names)
    source: str = ""
    """Location that documents are read from now."""
    fields: str = ""
    """EMBED_METADATA now."""
    spaces: Mapping[str, History] = field(default_factory=dict)
    """Of embeddings alone: the spaces that are kept up to date besides the configured one, by name."""

    def record(self, asset: str, key: str) -> Record | None:
        """The latest record of a partition of an asset; None if there is none."""
        return self.records[asset].get(key)

    def version(self, asset: str, key: str) -> str | None:
        """The recorded data version of a partition of an asset; None if there is none."""
        record = self.record(asset, key)
        return None if record is None else record.data_version

    def is_marked_for_repair(self, asset: str, key: str) -> bool:
        """Whether the partition's rows were recorded as damaged and not materialized since."""
        record = self.record(asset, key)
        return record is not None and record.code_version == REPAIR_CODE_VERSION

    def is_as_recorded(self, table: TableSpec, partition: PartitionSnapshot, code_version: str) -> bool:
        """Whether a partition's rows are those that were recorded, made by this code from the inputs as recorded.

        Then what changed in its inputs decides what changes in it.
        """
        asset, key = table.kind, partition.key
        record = self.record(asset, key)
        if (
            record is None
            or record.code_version != code_version
            or not ContentVersion.can_continue(record.data_version)
        ):
            return False
        if self._is_from_elsewhere(record):
            return False
        inputs = (dependency for dependency in DEPENDENCIES[asset] if dependency != SOURCE)
        if any(record.input_versions.get(dependency) != self.version(dependency, key) for dependency in inputs):
            return False
        return partition.holds(table, record.data_version, record.data_files)

    def only(self, key: str) -> History:
        """The part of it that is about one partition. Can be pickled; reads no rows."""
        records = {asset: {key: known[key]} if key in known else {} for asset, known in self.records.items()}
        tables = {kind: table and table.only(key) for kind, table in self.tables.items()}
        return replace(self, records=records, tables=tables, contents=None, spaces={})

    def outcome(self, key: str, source_version: str | None) -> PartitionOutcome:
        """The outcome of leaving a partition as it is: its recorded versions and counts."""
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
        """The status of a partition of an asset, given the current data versions of its dependencies.

        Missing: never materialized, or its rows are gone. Stale: its code or a dependency's data changed, or its rows
        are damaged or were replaced. Raises ``LakeError`` for retryable errors of the storage.
        """
        record = self.record(asset, key)
        if record is None:
            return Status("missing", ("never materialized",))
        # Each embedding space has its own table: this one says nothing about rows of another code version.
        if record.code_version == code_version and (loss := self._loss(asset, key, record)):
            return Status("missing", (loss,))
        if self.is_marked_for_repair(asset, key):
            return Status("stale", ("verify found its rows damaged",))
        if not record.code_version:
            return self._status_of_reported(record, key, inputs)
        reasons: list[str] = []
        if record.code_version == code_version and self._is_replaced(asset, key, record):
            reasons.append("its rows are not those that were recorded: somebody else replaced them")
        if self._is_from_elsewhere(record):
            reasons.append(f"its documents were read from {record.source!r}")
        if record.code_version != code_version:
            reasons.append(
                f"code changed: {record.code_version} -> {code_version} ({self._code_change(asset, record)})"
            )
        if not detects_changes(inputs.get(SOURCE) or ""):
            reasons.append(READ_EACH_TIME)
        reasons += [
            f"{'source files' if dependency == SOURCE else dependency} changed"
            for dependency, version in inputs.items()
            if version is not None and record.input_versions.get(dependency) != version
        ]
        return Status("stale", tuple(reasons)) if reasons else Status("fresh")

    def status_of_space(self, space: str, key: str, documents: str | None) -> Status:
        """The status of a partition in another space, of which this is the history: whether it has these `documents`.

        Its chunks are its own, made of the documents with the space's settings, so those of the table do not matter.
        """
        return self.status("embeddings", key, space, {"raw_documents": documents})

    def _code_change(self, asset: str, record: Record) -> str:
        """What may have changed where the code version did, with the fields that EMBED_METADATA drops or adds."""
        if record.fields is None or record.fields == self.fields:
            return _CODE_MEANS[asset]
        before, now = (list(filter(None, fields.split(","))) for fields in (record.fields, self.fields))
        changes = [f"drops {field}" for field in before if field not in now]
        changes += [f"adds {field}" for field in now if field not in before]
        return f"{_CODE_MEANS[asset]}: EMBED_METADATA {', '.join(changes) or 'has another order'}"

    def _is_from_elsewhere(self, record: Record) -> bool:
        """Whether documents were read from another location than they are now."""
        return bool(record.source) and canonical_location(record.source) != canonical_location(self.source)

    def _status_of_reported(self, record: Record, key: str, inputs: Mapping[str, str | None]) -> Status:
        """The status of a partition that a person reported as materialized, which the UI allows.

        As in Dagster, it counts as fresh until one of its inputs is materialized.
        """
        reasons: list[str] = []
        for dependency, version in inputs.items():
            made = self.record(dependency, key)
            if dependency != SOURCE and (
                made is None or made.timestamp > record.timestamp or made.data_version != version
            ):
                reasons.append(f"{dependency} was made after somebody reported that this is there")
        return Status("stale", tuple(reasons)) if reasons else Status("fresh")

    def _loss(self, asset: str, key: str, record: Record) -> str:
        """Reason why recorded rows are lost from the tables; '' if none are."""
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
        """Whether another writer (another corpus, Dagster instance or tool) replaced the recorded rows.

        Compaction rewrites the same rows into other files, so where the files differ, their content decides.
        """
        table = self.tables[asset]
        if table is None or not (record.data_files or record.table_id):
            return False
        now = table.partitions.get(key, PartitionFiles())
        is_same = now.files == record.data_files if record.data_files else now.written_at <= record.timestamp
        return not is_same and self.contents is not None and not self.contents.has_rows_of(record, asset, key)


_CODE_MEANS = {
    "raw_documents": "the parser or its settings",
    "chunks": "the chunker, its settings or the tokenizer",
    "embeddings": "the embedding space",
}


def tables_of(pipeline: Pipeline) -> dict[str, TableSpec]:
    """The lake's tables by kind: of each asset, and "rejected_documents"."""
    specs = (RAW, REJECTED, CHUNK_TABLE, pipeline.embeddings_table)
    return {spec.kind: pipeline.lake.full(spec) for spec in specs}


def load_history(
    instance: DagsterInstance,
    pipeline: Pipeline,
    keys: Collection[str] | None = None,
    earlier: History | None = None,
    tables: Snapshot | None = None,
) -> History:
    """Load the records of the partitions in a handful of queries, and what the lake holds of them.

    `keys` None loads all partitions, and `tables` None reads the lake as it is now. Records that `earlier` has already
    are not read again. Raises ``LakeError`` if the tables can't be read.
    """
    names = Names.of(pipeline)
    known = earlier.records if earlier else {}
    records = {a: load_records(instance, names, a, keys, known.get(a, {})) for a in (SOURCE, *ASSETS)}
    specs = tables_of(pipeline)
    tables = tables or Snapshot(pipeline.lake)
    states = {kind: tables.state(spec) for kind, spec in specs.items()}
    contents = ContentReader(tables, specs, _known_contents(earlier))
    history = History(records, states, contents, names, pipeline.corpus.source.root, pipeline.corpus.parsing.fields)
    before = earlier.spaces if earlier else {}
    live = find_spaces(pipeline.lake, pipeline.model.space.name).live
    return replace(history, spaces={s: space_history(instance, history, s, tables, keys, before.get(s)) for s in live})


def space_history(
    instance: DagsterInstance,
    history: History,
    space: str,
    tables: Snapshot,
    keys: Collection[str] | None = None,
    earlier: History | None = None,
) -> History:
    """The history of the embeddings of a space other than the configured one, as `load_history`.

    What was recorded of it while it was the configured one is in the log of the asset, the rest in one of its own.
    """
    known = earlier.records["embeddings"] if earlier else {}
    records = load_records(instance, history.names, SPACE_LOG + space, keys, known)
    for key, record in history.records["embeddings"].items():
        is_newer = key not in records or record.storage_id > records[key].storage_id
        if record.code_version == space and is_newer:
            records[key] = record
    spec = space_table(space)
    contents = ContentReader(tables, {"embeddings": spec}, _known_contents(earlier))
    return History({"embeddings": records}, {"embeddings": tables.state(spec)}, contents, history.names)


def _known_contents(earlier: History | None) -> dict[tuple[str, str, str], str]:
    return earlier.contents.known if earlier and earlier.contents else {}


def partition_statuses(
    history: History, key: str, source_version: str | None, code_versions: Mapping[str, str]
) -> dict[str, Status]:
    """Statuses of the three assets of a partition, each judged by its direct dependencies, as in Dagster.

    Also those of its embeddings in other spaces that are kept up to date, as `embeddings/<space>`.
    """
    versions = {asset: history.version(asset, key) for asset in ASSETS} | {SOURCE: source_version}
    statuses = {
        asset: history.status(asset, key, code_versions[asset], {d: versions[d] for d in DEPENDENCIES[asset]})
        for asset in ASSETS
    }
    documents = versions["raw_documents"]
    return statuses | {
        SPACE_LOG + space: kept.status_of_space(space, key, documents) for space, kept in history.spaces.items()
    }


def load_records(
    instance: DagsterInstance,
    names: Names,
    asset: str,
    keys: Collection[str] | None,
    known: Mapping[str, Record],
) -> dict[str, Record]:
    """The latest record of each partition of an asset (of all partitions if `keys` is None), by key.

    May include more partitions than `keys`. Records in `known` that are still the latest are not read again.
    """
    # A short list of keys narrows the query; a long one would exceed the database's limit of variables.
    narrow = set(keys) if keys is not None and len(keys) <= _KEYS_PER_QUERY else None
    if narrow is not None and not narrow:
        return {}
    key = names.space_key(asset.removeprefix(SPACE_LOG)) if asset.startswith(SPACE_LOG) else names.key(asset)
    latest = latest_event_ids(instance, key, narrow, observations=asset == SOURCE)
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
        event.texts.get("metadata_fields"),
        event.run_id,
        event.timestamp,
    )
