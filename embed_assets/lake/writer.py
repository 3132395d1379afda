"""Writing a partition: stage the rows, compare them with the table's, and replace them in one commit or none."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
from deltalake import ColumnProperties, CommitProperties, DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError

from embed_assets.errors import LakeError
from embed_assets.lake.reader import PartitionState, content_of, state_of
from embed_assets.lake.tables import Lake, TableSpec, columns_of, lake_errors, partition_predicate
from embed_assets.records import CONTENT_COLUMNS, ContentVersion
from embed_assets.scratch import SpooledBatches

_COMMIT_ATTEMPTS = 20
_HIGH_CARDINALITY = frozenset({"text", "chunk_id", "content_hash", "text_hash", "input_hash"})
_MAX_ROW_GROUP_ROWS = 8_192
_MAX_ROW_GROUP_BYTES = 32 << 20
"""A row group is what a reader holds at a time, so long texts make it short."""
TARGET_FILE_BYTES = 32 << 20
"""A file is held in memory until it is complete; a third of the default saves about 100 MB."""
_FEED_BYTES_PER_SECOND = 400e6
# delta-rs buffers up to N batches for each of several files; with one of each, memory stays flat.
_FLAT_MEMORY = {
    "DELTARS_WRITER_BATCH_CHANNEL_SIZE": "1",
    "DELTARS_MAX_CONCURRENT_WRITERS": "1",
    "DELTARS_MAX_IN_FLIGHT_UPLOAD_BYTES": str(64 << 20),
}


@dataclass(frozen=True, slots=True)
class Replaced:
    """What became of a partition's rows."""

    data_version: str
    """Hash of the partition's content."""
    rows: int
    is_committed: bool
    """False when the table held exactly these rows already."""
    state: PartitionState
    """The files that hold the rows."""
    table_id: str = ""
    """Delta's id of the table."""

    @property
    def table_version(self) -> int | None:
        """Delta commit number, or None when the table does not exist (and no row needed it)."""
        return self.state.version


@dataclass(frozen=True, slots=True)
class Provenance:
    """What every commit says of itself."""

    run_id: str
    input_versions: dict[str, str] = field(default_factory=dict)
    """Data version of each table or source the rows were made from."""


def replace_partition(
    lake: Lake,
    table: TableSpec,
    key: str,
    batches: Iterable[pa.RecordBatch],
    provenance: Provenance,
    dimension: int | None = None,
    rewrite: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Replaced:
    """Make `batches` the rows of the partition, atomically, and leave every other partition alone.

    The rows are first written to a local file, so that the commit is short and a failure while they are
    made changes nothing. No commit is made when the table holds the same content already, unless `rewrite`.
    `check` raises when the rows must not be written any more; it is asked right before every attempt to commit, once
    the table was brought up to date: what is committed to the partition after that makes the attempt fail.
    Raises ``LakeError`` when the table can't be written.
    """
    with SpooledBatches(table.schema) as staged:
        content = ContentVersion(CONTENT_COLUMNS[table.kind])
        for batch in batches:
            content.add(batch)
            staged.add(batch)
        byte_size = staged.complete()
        data_version, rows = content.hexdigest(), content.row_count
        delta = lake.open(table)
        if delta is None and not rows:
            return Replaced(data_version, 0, False, PartitionState(table, None))
        if delta is not None and not rewrite and _holds(lake, table, delta, key, data_version):
            return Replaced(data_version, rows, False, state_of(delta, table, key), str(delta.metadata().id))
        if delta is None:
            delta = lake.create(table, dimension)
        properties = CommitProperties(
            custom_metadata={
                "embed_assets": {
                    "partition_key": key,
                    "run_id": provenance.run_id,
                    "rows": rows,
                    "data_version": data_version,
                    "input_versions": provenance.input_versions,
                }
            },
            max_commit_retries=100,
        )
        row_bytes = max(1, byte_size // max(1, rows))
        _commit(lake, table, delta, key, staged, properties, writer_properties(table, row_bytes), check)
        return Replaced(data_version, rows, True, state_of(delta, table, key), str(delta.metadata().id))


def _holds(lake: Lake, table: TableSpec, delta: DeltaTable, key: str, data_version: str) -> bool:
    """The table, as it was opened, has this content. Files that can't be read hold nothing, and are replaced."""
    try:
        return content_of(lake, table, delta, key) == data_version
    except LakeError:
        return False


def _paced(staged: SpooledBatches, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows, no faster than they can be written: delta-rs queues what comes faster, hundreds of megabytes of it.

    `columns` are the table's, which may have some of other people's: they are null.
    """
    ours = staged.schema.names
    for batch in staged:
        arrays = [batch.column(c.name) if c.name in ours else pa.nulls(batch.num_rows, c.type) for c in columns]
        yield pa.RecordBatch.from_arrays(arrays, schema=columns)
        time.sleep(batch.nbytes / _FEED_BYTES_PER_SECOND)


def _columns_to_write(table: TableSpec, delta: DeltaTable) -> pa.Schema:
    """Ours, as they are to be, and those that others gave the table."""
    ours = table.schema
    return pa.schema([*ours, *(column for column in columns_of(delta) if column.name not in ours.names)])


def _commit(
    lake: Lake,
    table: TableSpec,
    delta: DeltaTable,
    key: str,
    staged: SpooledBatches,
    properties: CommitProperties,
    written_as: WriterProperties,
    check: Callable[[], None],
) -> None:
    """Replace the rows, again on top of what others committed meanwhile; `delta` then is at the commit's version."""
    for name, value in _FLAT_MEMORY.items():
        os.environ.setdefault(name, value)
    for attempt in range(_COMMIT_ATTEMPTS):
        check()
        columns = _columns_to_write(table, delta)
        with lake_errors(f"partition {key!r} of the table {table.path!r} can't be written", lake.root):
            try:
                write_deltalake(
                    delta,
                    pa.RecordBatchReader.from_batches(columns, _paced(staged, columns)),
                    mode="overwrite",
                    predicate=partition_predicate(key),
                    target_file_size=TARGET_FILE_BYTES,
                    writer_properties=written_as,
                    commit_properties=properties,
                )
                return
            except CommitFailedError:  # another process replaced the same partition, or compacted it, meanwhile
                if attempt == _COMMIT_ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0.05, 0.3) * (attempt + 1))
                delta.update_incremental()


def writer_properties(table: TableSpec, row_bytes: int) -> WriterProperties:
    """How rows of about so many bytes are written.

    Dictionaries only where values repeat: on vectors they cost time and space. Nested columns follow the default.
    """
    scalars = [f.name for f in table.schema if f.name not in ("partition_key", "embedding")]
    return WriterProperties(
        compression="ZSTD",
        compression_level=1,
        max_row_group_size=max(1, min(_MAX_ROW_GROUP_ROWS, _MAX_ROW_GROUP_BYTES // row_bytes)),
        default_column_properties=ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE"),
        column_properties={
            name: ColumnProperties(dictionary_enabled=name not in _HIGH_CARDINALITY, statistics_enabled="CHUNK")
            for name in scalars
        },
    )
