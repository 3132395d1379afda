"""Rows of the tables as streams of Arrow batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from deltalake import DeltaTable

from embed_assets.lake.tables import Lake, TableSpec, lake_errors, partition_predicate, quoted
from embed_assets.records import CONTENT_COLUMNS, ContentVersion


def read_partition(lake: Lake, table: TableSpec, key: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns of one partition's rows, in no particular order; nothing when the table does not exist."""
    yield from scan(lake, table, columns, partition_predicate(key))


def scan(
    lake: Lake, table: TableSpec, columns: Sequence[str], predicate: str | None = None, version: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The columns of all rows that fulfil the predicate, of one version of the table (the newest), batch by batch."""
    delta = lake.open(table, version)
    if delta is None:
        return
    schema = pa.schema([table.schema.field(name) for name in columns])
    with lake_errors(f"the table {table.path!r} can't be read (see 'embed-assets verify --repair')", lake.root):
        for batch in pa.RecordBatchReader.from_stream(delta.scan(list(columns), predicate)):
            if batch.num_rows:
                # Delta's engine answers with string views and nullable fields.
                arrays = [batch.column(f.name).cast(f.type) for f in schema]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def read_rows(
    lake: Lake, table: TableSpec, column: str, values: Sequence[str], columns: Sequence[str], version: int | None = None
) -> pa.Table:
    """The rows whose string column has one of the values, of one version of the table (the newest)."""
    schema = pa.schema([table.schema.field(name) for name in columns])
    if not values:
        return schema.empty_table()
    predicate = f"{column} IN ({', '.join(quoted(v) for v in values)})"
    return pa.Table.from_batches(scan(lake, table, columns, predicate, version), schema=schema)


def row_count(lake: Lake, table: TableSpec, key: str) -> int:
    """Rows of a partition."""
    return sum(batch.num_rows for batch in read_partition(lake, table, key, [table.schema.names[0]]))


def content_version(lake: Lake, table: TableSpec, key: str, version: int | None = None) -> str:
    """Hash of what the table holds of a partition, at that version (now): its data version."""
    columns = CONTENT_COLUMNS[table.kind]
    content = ContentVersion(columns)
    for batch in scan(lake, table, columns, partition_predicate(key), version):
        content.add(batch)
    return content.hexdigest()


def partition_keys(lake: Lake, table: TableSpec) -> set[str]:
    """Keys of the partitions that have rows, from the table's log alone."""
    state = table_state(lake, table)
    return set() if state is None else set(state.keys)


@dataclass(frozen=True, slots=True)
class TableState:
    """What a table's log alone tells."""

    id: str
    """Delta's own id of the table: another lake's table has another one."""
    version: int
    keys: frozenset[str]
    """Partitions that have rows."""
    rows: int
    """Of all partitions."""


def table_state(lake: Lake, table: TableSpec) -> TableState | None:
    """The table as its log shows it, or None when it does not exist."""
    delta = lake.open(table)
    if delta is None:
        return None
    files = data_files(lake, table, delta)
    keys = frozenset(file.partition_key for file in files)
    return TableState(str(delta.metadata().id), int(delta.version()), keys, sum(file.rows for file in files))


class DataFile(NamedTuple):
    """A file of rows that a version of a table has."""

    partition_key: str
    path: str
    byte_size: int
    rows: int


def data_files(lake: Lake, table: TableSpec, delta: DeltaTable) -> list[DataFile]:
    """All of an open table, from its log alone."""
    with lake_errors(f"the table {table.path!r} can't be read", lake.root):
        files = pa.table(delta.get_add_actions(flatten=True))
    if not files.num_rows:
        return []
    names = ("partition.partition_key", "path", "size_bytes", "num_records")
    return [DataFile(*row) for row in zip(*(files[name].to_pylist() for name in names), strict=True)]


def table_version(lake: Lake, table: TableSpec) -> int | None:
    """The newest Delta commit number, or None when the table does not exist."""
    delta = lake.open(table)
    return None if delta is None else int(delta.version())


@dataclass(frozen=True, slots=True)
class PartitionState:
    """Names of the files that hold a partition's rows. None is written twice: the same names are the same rows."""

    table: TableSpec
    version: int | None
    """Of the table; None when it does not exist."""
    files: frozenset[str] = frozenset()


def partition_state(lake: Lake, table: TableSpec, key: str) -> PartitionState:
    """The partition as the table has it now."""
    delta = lake.open(table)
    if delta is None:
        return PartitionState(table, None)
    with lake_errors(f"the table {table.path!r} can't be read", lake.root):
        return state_of(delta, table, key)


def state_of(delta: DeltaTable, table: TableSpec, key: str) -> PartitionState:
    """The same for a table that is open, as it was opened."""
    files = frozenset(map(_file_name, delta.file_uris(file_pruning_predicate=partition_predicate(key))))
    return PartitionState(table, int(delta.version()), files)


def partition_states(lake: Lake, table: TableSpec, keys: Iterable[str]) -> dict[str, PartitionState]:
    """The partitions as the table has them now, those too that have no rows."""
    delta = lake.open(table)
    if delta is None:
        return {key: PartitionState(table, None) for key in keys}
    found: defaultdict[str, set[str]] = defaultdict(set)
    for file in data_files(lake, table, delta):
        found[file.partition_key].add(_file_name(file.path))
    version = int(delta.version())
    return {key: PartitionState(table, version, frozenset(found.get(key, ()))) for key in keys}


def _file_name(path: str) -> str:
    """Unique by itself; how the folders before it are escaped differs."""
    return path.rpartition("/")[2]
