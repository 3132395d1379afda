"""Writing a partition: stage the rows, compare them with the table's, and replace them in one commit or none."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
from deltalake import ColumnProperties, CommitProperties, DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError

from embed_assets.errors import LakeError
from embed_assets.lake.reader import content_version
from embed_assets.lake.tables import Lake, TableSpec, lake_errors, partition_predicate
from embed_assets.records import CONTENT_COLUMNS, ContentVersion

_COMMIT_ATTEMPTS = 20
_HIGH_CARDINALITY = frozenset({"text", "chunk_id", "content_hash", "text_hash", "input_hash"})
_MAX_ROW_GROUP_ROWS = 16_384
_MAX_ROW_GROUP_BYTES = 32 << 20
"""A row group is what a reader holds at a time, so long texts make it short."""
_TARGET_FILE_BYTES = 32 << 20
"""A file is held in memory until it is complete; a third of the default saves about 100 MB."""
# delta-rs buffers up to N batches for each of several files; with one of each, memory stays flat.
_FLAT_MEMORY = {"DELTARS_WRITER_BATCH_CHANNEL_SIZE": "1", "DELTARS_MAX_CONCURRENT_WRITERS": "1"}


@dataclass(frozen=True, slots=True)
class Replaced:
    """What became of a partition's rows."""

    data_version: str
    """Hash of the partition's content."""
    rows: int
    is_committed: bool
    """False when the table held exactly these rows already."""
    table_version: int | None
    """Delta commit number, or None when the table does not exist (and no row needed it)."""
    table_id: str = ""
    """Delta's id of the table."""


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
) -> Replaced:
    """Make `batches` the rows of the partition, atomically, and leave every other partition alone.

    The rows are first written to a local file, so that the commit is short and a failure while they are
    made changes nothing. No commit is made when the table holds the same content already, unless `rewrite`.
    Raises ``LakeError`` when the table can't be written.
    """
    with tempfile.TemporaryFile(prefix="embed_assets_") as staged:
        version = ContentVersion(CONTENT_COLUMNS[table.kind])
        with pa.ipc.new_stream(staged, table.schema) as stream:
            for batch in batches:
                version.add(batch)
                stream.write_batch(batch)
        data_version = version.hexdigest()
        delta = lake.open(table)
        if delta is None and version.row_count == 0:
            return Replaced(data_version, 0, False, None)
        if delta is not None and not rewrite and _holds(lake, table, key, data_version):
            return Replaced(data_version, version.row_count, False, int(delta.version()), str(delta.metadata().id))
        if delta is None:
            delta = lake.create(table, dimension)

        def rows() -> pa.RecordBatchReader:
            staged.seek(0)
            return pa.RecordBatchReader.from_batches(table.schema, _read_staged(staged))

        properties = CommitProperties(
            custom_metadata={
                "embed_assets": {
                    "partition_key": key,
                    "run_id": provenance.run_id,
                    "rows": version.row_count,
                    "data_version": data_version,
                    "input_versions": provenance.input_versions,
                }
            },
            max_commit_retries=100,
        )
        mean_row_bytes = max(1, staged.tell() // max(1, version.row_count))
        rows_per_group = max(1, min(_MAX_ROW_GROUP_ROWS, _MAX_ROW_GROUP_BYTES // mean_row_bytes))
        _commit(lake, table, delta, key, rows, properties, _writer_properties(table, rows_per_group))
        return Replaced(data_version, version.row_count, True, int(delta.version()), str(delta.metadata().id))


def _holds(lake: Lake, table: TableSpec, key: str, data_version: str) -> bool:
    """The table has this content already. Files that can't be read hold nothing, and are replaced."""
    try:
        return content_version(lake, table, key).hexdigest() == data_version
    except LakeError:
        return False


def _read_staged(staged: object) -> Iterator[pa.RecordBatch]:
    with pa.ipc.open_stream(staged) as reader:
        yield from reader


def _commit(
    lake: Lake,
    table: TableSpec,
    delta: DeltaTable,
    key: str,
    rows: Callable[[], pa.RecordBatchReader],
    properties: CommitProperties,
    writer_properties: WriterProperties,
) -> None:
    """Replace the rows, again on top of what others committed meanwhile; `delta` then is at the commit's version."""
    for name, value in _FLAT_MEMORY.items():
        os.environ.setdefault(name, value)
    with lake_errors(f"partition {key!r} of the table {table.path!r} can't be written", lake.root):
        for attempt in range(_COMMIT_ATTEMPTS):
            try:
                write_deltalake(
                    delta,
                    rows(),
                    mode="overwrite",
                    predicate=partition_predicate(key),
                    target_file_size=_TARGET_FILE_BYTES,
                    writer_properties=writer_properties,
                    commit_properties=properties,
                )
                break
            except CommitFailedError:  # another process replaced the same partition meanwhile
                if attempt == _COMMIT_ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0.05, 0.3) * (attempt + 1))
                delta.update_incremental()


def _writer_properties(table: TableSpec, rows_per_group: int) -> WriterProperties:
    """Dictionaries only where values repeat: on vectors they cost time and space. Nested columns follow the default."""
    scalars = [f.name for f in table.schema if f.name not in ("partition_key", "embedding")]
    return WriterProperties(
        compression="ZSTD",
        compression_level=1,
        max_row_group_size=rows_per_group,
        default_column_properties=ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE"),
        column_properties={
            name: ColumnProperties(dictionary_enabled=name not in _HIGH_CARDINALITY, statistics_enabled="CHUNK")
            for name in scalars
        },
    )
