"""Rows of the tables as streams of Arrow batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
from deltalake import DeltaTable

from embed_assets.errors import LakeError
from embed_assets.lake.tables import Lake, TableSpec, columns_of, is_one_of, lake_errors, partition_predicate
from embed_assets.records import CONTENT_COLUMNS, ContentVersion, hash_parts


def files_hash(names: Iterable[str]) -> str:
    """Of a partition's files. No file is written twice, so the same names are the same rows."""
    return hash_parts(sorted(names))


def read_partition(lake: Lake, table: TableSpec, key: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns of one partition's rows, in no particular order; nothing when the table does not exist."""
    yield from scan(lake, table, columns, partition_predicate(key))


def scan(
    lake: Lake, table: TableSpec, columns: Sequence[str], predicate: str | None = None, version: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The columns of all rows that fulfil the predicate, of one version of the table (the newest), batch by batch."""
    delta = lake.open(table, version)
    if delta is not None:
        yield from scan_open(lake, table, delta, columns, predicate)


def scan_open(
    lake: Lake, table: TableSpec, delta: DeltaTable, columns: Sequence[str], predicate: str | None = None
) -> Iterator[pa.RecordBatch]:
    """The same of a table that is open, as it was opened: reading it twice reads one version."""
    schema = pa.schema([table.schema.field(name) for name in columns])
    # A table that was made before a column was there has null in it.
    absent = {f.name for f in table.extra}.difference(columns_of(delta).names) if table.extra else set()
    present = [name for name in columns if name not in absent]
    with lake_errors(f"the table {table.path!r} can't be read (see 'embed-assets verify --repair')", lake.root):
        for batch in pa.RecordBatchReader.from_stream(delta.scan(present, predicate)):
            if batch.num_rows:
                # Delta's engine answers with string views and nullable fields.
                arrays = [
                    pa.nulls(batch.num_rows, f.type) if f.name in absent else batch.column(f.name).cast(f.type)
                    for f in schema
                ]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def read_rows(
    lake: Lake, table: TableSpec, column: str, values: Sequence[str], columns: Sequence[str], version: int | None = None
) -> pa.Table:
    """The rows whose string column has one of the values, of one version of the table (the newest)."""
    schema = pa.schema([table.schema.field(name) for name in columns])
    if not values:
        return schema.empty_table()
    return pa.Table.from_batches(scan(lake, table, columns, is_one_of(column, values), version), schema=schema)


def row_count(lake: Lake, table: TableSpec, key: str) -> int:
    """Rows of a partition."""
    return sum(batch.num_rows for batch in read_partition(lake, table, key, [table.schema.names[0]]))


def content_version(lake: Lake, table: TableSpec, key: str, version: int | None = None) -> str:
    """Hash of what the table holds of a partition, at that version (now): its data version."""
    delta = lake.open(table, version)
    return ContentVersion(()).hexdigest() if delta is None else content_of(lake, table, delta, key)


def content_of(lake: Lake, table: TableSpec, delta: DeltaTable, key: str) -> str:
    """The same of a table that is open, as it was opened."""
    columns = CONTENT_COLUMNS[table.kind]
    content = ContentVersion(columns)
    for batch in scan_open(lake, table, delta, columns, partition_predicate(key)):
        content.add(batch)
    return content.hexdigest()


def partition_keys(lake: Lake, table: TableSpec) -> set[str]:
    """Keys of the partitions that have rows, from the table's log alone."""
    state = table_state(lake, table)
    return set() if state is None else set(state.partitions)


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


def table_state(lake: Lake, table: TableSpec) -> TableState | None:
    """The table as its log shows it, or None when it does not exist."""
    delta = lake.open(table)
    if delta is None:
        return None
    partitions = {
        key: PartitionFiles(
            sum(file.rows for file in files),
            files_hash(_file_name(file.path) for file in files),
            max(file.written_at_ms for file in files) / 1000,
        )
        for key, files in files_by_partition(lake, table, delta).items()
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


def data_files(lake: Lake, table: TableSpec, delta: DeltaTable) -> list[DataFile]:
    """All of an open table, from its log alone."""
    with lake_errors(f"the table {table.path!r} can't be read", lake.root):
        files = pa.table(delta.get_add_actions(flatten=True))
    if not files.num_rows:
        return []
    names = ("partition.partition_key", "path", "size_bytes", "num_records", "modification_time")
    return [DataFile(*row) for row in zip(*(files[name].to_pylist() for name in names), strict=True)]


def files_by_partition(lake: Lake, table: TableSpec, delta: DeltaTable) -> Mapping[str, list[DataFile]]:
    """The same by partition; none for one that has no rows."""
    found: defaultdict[str, list[DataFile]] = defaultdict(list)
    for file in data_files(lake, table, delta):
        found[file.partition_key].append(file)
    return dict(found)


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

    @property
    def files_hash(self) -> str:
        """As `PartitionFiles.files`."""
        return files_hash(self.files)


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
    found, version = files_by_partition(lake, table, delta), int(delta.version())
    return {
        key: PartitionState(table, version, frozenset(_file_name(file.path) for file in found.get(key, ())))
        for key in keys
    }


def _file_name(path: str) -> str:
    """Unique by itself; how the folders before it are escaped differs."""
    return path.rpartition("/")[2]


class ContentReader:
    """Data versions of partitions as a table's state has them, for when its files do not tell; each is read once."""

    def __init__(self, lake: Lake, table: TableSpec, version: int, known: dict[str, str] | None = None) -> None:
        """`known` has versions that were read before, by key and files, and gets those that are read."""
        self._lake, self._table, self._version = lake, table, version
        self.known: dict[str, str] = {} if known is None else known
        self._delta: DeltaTable | None = None

    def version(self, key: str, files: str) -> str:
        """The data version of a partition that has these files; '' when they can't be read.

        Raises ``LakeError`` when the storage fails.
        """
        place = f"{files}/{key}"
        if place not in self.known:
            self._delta = self._delta or self._lake.open(self._table, self._version)
            try:
                self.known[place] = content_of(self._lake, self._table, self._delta, key) if self._delta else ""
            except LakeError as error:
                if error.is_retryable:
                    raise
                self.known[place] = ""
        return self.known[place]
