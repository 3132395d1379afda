"""Committing a partition: its rows wait in a spool file, and replace the table's in one commit."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa
from deltalake import ColumnProperties, CommitProperties, DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError

from embed_assets.lake.reader import PartitionState
from embed_assets.lake.tables import TableSpec, columns_of, lake_errors, partition_predicate
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
    rewrite: bool = False
    """Commit the rows even if the table seems to hold them already: it was found damaged."""

    def rewriting(self) -> Provenance:
        """This provenance, of rows that are committed in any case."""
        return replace(self, rewrite=True)


@dataclass(frozen=True, slots=True)
class SpooledRows:
    """Rows of one partition that wait in a temporary file to be committed."""

    table: TableSpec
    key: str
    batches: SpooledBatches
    byte_size: int
    count: int
    data_version: str
    """Hash of their content."""


@contextlib.contextmanager
def spool_rows(table: TableSpec, key: str, batches: Iterable[pa.RecordBatch]) -> Iterator[SpooledRows]:
    """The rows of `batches` in a temporary file, and the hash of their content."""
    content = ContentVersion(CONTENT_COLUMNS[table.kind])
    with SpooledBatches(table.schema) as spool:
        for batch in batches:
            content.add(batch)
            spool.add(batch)
        yield SpooledRows(table, key, spool, spool.complete(), content.row_count, content.hexdigest())


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


def commit_rows(
    root: str, delta: DeltaTable, rows: SpooledRows, provenance: Provenance, check: Callable[[], None]
) -> None:
    """Replace the partition's rows in one commit, again on top of what others committed meanwhile.

    `check` is called before every attempt, and stops it by raising. Afterwards `delta` is at the commit's version.
    """
    table, key = rows.table, rows.key
    for name, value in _FLAT_MEMORY.items():
        os.environ.setdefault(name, value)
    for attempt in range(_COMMIT_ATTEMPTS):
        check()
        columns = _columns_to_write(table, delta)
        with lake_errors(f"partition {key!r} of the table {table.path!r} can't be written", root):
            try:
                write_deltalake(
                    delta,
                    pa.RecordBatchReader.from_batches(columns, _paced(rows.batches, columns)),
                    mode="overwrite",
                    predicate=partition_predicate(key),
                    target_file_size=TARGET_FILE_BYTES,
                    writer_properties=writer_properties(table, max(1, rows.byte_size // max(1, rows.count))),
                    commit_properties=_commit_properties(rows, provenance),
                )
                return
            except CommitFailedError:  # another process replaced the same partition, or compacted it, meanwhile
                if attempt == _COMMIT_ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0.05, 0.3) * (attempt + 1))
                delta.update_incremental()


def _commit_properties(rows: SpooledRows, provenance: Provenance) -> CommitProperties:
    return CommitProperties(
        custom_metadata={
            "embed_assets": {
                "partition_key": rows.key,
                "run_id": provenance.run_id,
                "rows": rows.count,
                "data_version": rows.data_version,
                "input_versions": provenance.input_versions,
            }
        },
        max_commit_retries=100,
    )


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
