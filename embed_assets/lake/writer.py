"""Replace a partition's rows in one commit, from a local spool file."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import pyarrow as pa
from deltalake import ColumnProperties, CommitProperties, DeltaTable, WriterProperties

from embed_assets.lake.reader import PartitionState
from embed_assets.lake.tables import TableSpec, columns_of
from embed_assets.records import ContentVersion
from embed_assets.scratch import ArrowFile, SpooledBatches

_HIGH_CARDINALITY = frozenset({"text", "chunk_id", "content_hash", "text_hash", "input_hash"})
"""Columns whose values hardly repeat, so that a Parquet dictionary only costs time and space."""
_MAX_ROW_GROUP_ROWS = 8_192
"""Upper limit for rows per row group. Fewer lower the memory of readers and writers, more make larger, faster scans."""
_MAX_ROW_GROUP_BYTES = 32 << 20
"""Readers hold a whole row group in memory, so groups of long texts have fewer rows."""
TARGET_FILE_BYTES = 32 << 20
"""The writer holds a file in memory until it is complete. A third of delta-rs's default saves about 100 MB."""
_FEED_BYTES_PER_SECOND = 400e6
"""Pace at which rows are passed to delta-rs. Faster feeding outruns its writer and fills memory, slower feeding
delays commits: https://github.com/delta-io/delta-rs/issues/3578"""
# delta-rs buffers several batches for each of several files. With one of each, peak memory for a million rows of 384
# dimensions fell from about 1.5 GB to 0.6 GB. The upload limit matters on slow object stores.
_WRITER_ENVIRONMENT = {
    "DELTARS_WRITER_BATCH_CHANNEL_SIZE": "1",
    "DELTARS_MAX_CONCURRENT_WRITERS": "1",
    "DELTARS_MAX_IN_FLIGHT_UPLOAD_BYTES": str(64 << 20),
}


@dataclass(frozen=True, slots=True)
class Replaced:
    """Result of replacing a partition's rows."""

    data_version: str
    """Hash of the partition's rows."""
    rows: int
    """Number of the partition's rows."""
    is_committed: bool
    """False if the table had exactly these rows already."""
    state: PartitionState
    """The files that hold the rows."""
    table_id: str = ""
    """Delta's unique table id; empty if the table does not exist."""

    @property
    def table_version(self) -> int | None:
        """The table's version (commit number), or None if the table does not exist because there were no rows."""
        return self.state.version


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where rows come from; recorded in the commit's metadata."""

    run_id: str
    input_versions: dict[str, str] = field(default_factory=dict)
    """Data version of each table or source that the rows were computed from."""
    rewrite: bool = False
    """Commit even if the table seems to have the same rows already, because it was found damaged."""
    previous: str = ""
    """Data version of the rows that are replaced, if it is known."""

    def rewriting(self) -> Provenance:
        """A copy with `rewrite` set."""
        return replace(self, rewrite=True)


@dataclass(frozen=True, slots=True)
class SpooledRows:
    """Rows of one partition, in temporary files before they are committed."""

    table: TableSpec
    key: str
    batches: Iterable[pa.RecordBatch]
    """Can be read any number of times. May have more columns than the table."""
    byte_size: int
    """Size of the files in bytes."""
    count: int
    """Number of rows."""
    data_version: str
    """Hash of the rows."""


@contextlib.contextmanager
def spool_rows(table: TableSpec, key: str, batches: Iterable[pa.RecordBatch]) -> Iterator[SpooledRows]:
    """Spool `batches` to a temporary file, which is deleted on exit. Raises ``LakeError`` if the disk is full."""
    content = ContentVersion(table.content_columns)
    with SpooledBatches(table.schema) as spool:
        for batch in batches:
            content.add(batch)
            spool.add(batch)
        yield SpooledRows(table, key, spool, spool.complete(), content.row_count, content.text())


@dataclass(frozen=True, slots=True)
class Chained:
    """The batches of several parts, one after the other. Can be read any number of times if they can."""

    parts: Sequence[Iterable[pa.RecordBatch]]

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return chain.from_iterable(self.parts)


def rows_in_files(table: TableSpec, key: str, files: Sequence[ArrowFile]) -> SpooledRows:
    """Rows that are in files already. They have at least the columns of the table."""
    content, batches = ContentVersion(table.content_columns), Chained(files)
    for batch in batches:
        content.add(batch)
    byte_size = sum(file.byte_size for file in files)
    return SpooledRows(table, key, batches, byte_size, content.row_count, content.text())


def _throttled(rows: SpooledRows, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows, no faster than they can be written: otherwise delta-rs queues hundreds of megabytes.

    `columns` are those of the table. Columns that others added are filled with null.
    """
    ours = rows.table.schema.names
    for batch in rows.batches:
        arrays = [batch.column(c.name) if c.name in ours else pa.nulls(batch.num_rows, c.type) for c in columns]
        yield pa.RecordBatch.from_arrays(arrays, schema=columns)
        time.sleep(sum(array.nbytes for array in arrays) / _FEED_BYTES_PER_SECOND)


def rows_to_write(rows: SpooledRows, delta: DeltaTable) -> pa.RecordBatchReader:
    """The spooled rows with the columns of the table: ours, followed by those that others added, which are null."""
    for name, value in _WRITER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ours = rows.table.schema
    columns = pa.schema([*ours, *(column for column in columns_of(delta) if column.name not in ours.names)])
    return pa.RecordBatchReader.from_batches(columns, _throttled(rows, columns))


def commit_properties(rows: SpooledRows, provenance: Provenance) -> CommitProperties:
    """What the commit says of itself."""
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
        # The default of 15 was too few for 16 processes that write different partitions; 100 were enough.
        max_commit_retries=100,
    )


def writer_properties(table: TableSpec, row_bytes: int) -> WriterProperties:
    """Parquet settings for rows of about `row_bytes` bytes.

    Dictionaries are off by default because on vectors they cost time and space, and nested columns follow the default;
    they are enabled for columns whose values repeat.
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
