"""Reading an open Delta table: its rows as streams of Arrow batches, and what its log tells without them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from deltalake import DeltaTable

from embed_assets.lake.tables import TableSpec, columns_of, lake_errors, partition_predicate
from embed_assets.records import CONTENT_COLUMNS, ContentVersion, hash_parts


def files_hash(names: Iterable[str]) -> str:
    """Of a partition's files. No file is written twice, so the same names are the same rows."""
    return hash_parts(sorted(names))


def read_table(
    root: str, table: TableSpec, delta: DeltaTable, columns: Sequence[str], where: str | None = None
) -> Iterator[pa.RecordBatch]:
    """The columns of an open table's rows for which the SQL `where` is true, batch by batch, in no particular order.

    `root` is the lake's, for messages. Raises ``LakeError`` when a file can't be read.
    """
    schema = pa.schema([table.schema.field(name) for name in columns])
    # A table that was made before a column was there has null in it.
    absent = {f.name for f in table.extra}.difference(columns_of(delta).names) if table.extra else set()
    present = [name for name in columns if name not in absent]
    with lake_errors(f"the table {table.path!r} can't be read (see 'embed-assets verify --repair')", root):
        for batch in pa.RecordBatchReader.from_stream(delta.scan(present, where)):
            if batch.num_rows:
                # Delta's engine answers with string views and nullable fields.
                arrays = [
                    pa.nulls(batch.num_rows, f.type) if f.name in absent else batch.column(f.name).cast(f.type)
                    for f in schema
                ]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def content_of(root: str, table: TableSpec, delta: DeltaTable | None, key: str) -> str:
    """Hash of what an open table (None: there is no table) holds of a partition: its data version."""
    columns = CONTENT_COLUMNS[table.kind]
    content = ContentVersion(columns)
    if delta is not None:
        for batch in read_table(root, table, delta, columns, partition_predicate(key)):
            content.add(batch)
    return content.hexdigest()


@dataclass(frozen=True, slots=True)
class PartitionFiles:
    """What a table's log alone tells of a partition."""

    rows: int = 0
    files: str = files_hash(())
    """Hash of the names of its files: while it is the same, so are the rows."""
    written_at: float = 0.0
    """When the newest of them was written, by its writer's clock, seconds since 1970."""


@dataclass(frozen=True, slots=True)
class TableState:
    """What a table's log alone tells."""

    id: str
    """Delta's own id of the table: another lake's table has another one."""
    version: int
    partitions: Mapping[str, PartitionFiles]
    """Those that have rows, by their keys."""

    @property
    def rows(self) -> int:
        """Of all partitions."""
        return sum(partition.rows for partition in self.partitions.values())


def table_state(root: str, table: TableSpec, delta: DeltaTable) -> TableState:
    """What the log of an open table tells of its partitions."""
    partitions = {
        key: PartitionFiles(
            sum(file.rows for file in files),
            files_hash(_file_name(file.path) for file in files),
            max(file.written_at_ms for file in files) / 1000,
        )
        for key, files in files_by_partition(root, table, delta).items()
    }
    return TableState(str(delta.metadata().id), int(delta.version()), partitions)


class DataFile(NamedTuple):
    """A file of rows that a version of a table has."""

    partition_key: str
    path: str
    byte_size: int
    rows: int
    written_at_ms: int
    """By its writer's clock, milliseconds since 1970."""


def files_by_partition(root: str, table: TableSpec, delta: DeltaTable) -> Mapping[str, list[DataFile]]:
    """The files of an open table by partition, from its log alone. A partition without rows has no entry."""
    with lake_errors(f"the table {table.path!r} can't be read", root):
        actions = pa.table(delta.get_add_actions(flatten=True))
    found: defaultdict[str, list[DataFile]] = defaultdict(list)
    if actions.num_rows:
        names = ("partition.partition_key", "path", "size_bytes", "num_records", "modification_time")
        for row in zip(*(actions[name].to_pylist() for name in names), strict=True):
            found[row[0]].append(DataFile(*row))
    return dict(found)


@dataclass(frozen=True, slots=True)
class PartitionState:
    """Names of the files that hold a partition's rows. None is written twice: the same names are the same rows."""

    table: TableSpec
    version: int | None
    """Of the table; None when it does not exist."""
    files: frozenset[str] = frozenset()

    @property
    def files_hash(self) -> str:
        """As `PartitionFiles.files`."""
        return files_hash(self.files)


def state_of(delta: DeltaTable, table: TableSpec, key: str) -> PartitionState:
    """The files that hold a partition's rows in an open table."""
    files = frozenset(map(_file_name, delta.file_uris(file_pruning_predicate=partition_predicate(key))))
    return PartitionState(table, int(delta.version()), files)


def _file_name(path: str) -> str:
    """Unique by itself; how the folders before it are escaped differs."""
    return path.rpartition("/")[2]
