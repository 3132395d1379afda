"""Read an open Delta table: its rows as a stream of Arrow batches, or row counts and file names from its log alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa
from deltalake import DeltaTable

from embed_assets.lake.tables import TableSpec, columns_of, lake_errors, partition_predicate
from embed_assets.records import ContentVersion, SortedContentVersion, hash_parts


def files_hash(names: Iterable[str]) -> str:
    """Hash of a partition's file names, in any order. Files are never rewritten, so equal names mean equal rows."""
    return hash_parts(sorted(names))


def read_table(
    root: str, table: TableSpec, delta: DeltaTable, columns: Sequence[str], where: str | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches with `columns` of an open table's rows, in no particular order.

    `where` is an SQL predicate that filters rows; `root` is the lake's root, for error messages. Raises ``LakeError``
    if a file can't be read.
    """
    schema = pa.schema([table.schema.field(name) for name in columns])
    # Tables created before a column was introduced read as null in it.
    absent = {f.name for f in table.added}.difference(columns_of(delta).names)
    present = [name for name in columns if name not in absent]
    with lake_errors(f"the table {table.path!r} can't be read (see 'embed-assets verify --repair')", root):
        for batch in pa.RecordBatchReader.from_stream(delta.scan(present, where)):
            if batch.num_rows:
                # delta-rs returns string views and nullable fields: cast to our schema.
                arrays = [
                    pa.nulls(batch.num_rows, f.type) if f.name in absent else batch.column(f.name).cast(f.type)
                    for f in schema
                ]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def content_of(root: str, table: TableSpec, delta: DeltaTable | None, key: str, like: str | None = None) -> str:
    """Data version of a partition, computed from its rows, in the form of the version `like`.

    `delta` is the open table, or None if it does not exist.
    """
    columns = table.content_columns
    is_sum = like is None or ContentVersion.can_continue(like)
    content = ContentVersion(columns) if is_sum else SortedContentVersion(columns)
    if delta is not None:
        for batch in read_table(root, table, delta, columns, partition_predicate(key)):
            content.add(batch)
    return content.text()


@dataclass(frozen=True, slots=True)
class PartitionFiles:
    """Summary of a partition, from the table's log alone."""

    rows: int = 0
    files: str = files_hash(())
    """Hash of its file names: as long as it is unchanged, so are the rows."""
    written_at: float = 0.0
    """When its newest file was written, by the writer's clock, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class TableState:
    """Summary of a table, from its log alone."""

    id: str
    """Delta's unique table id; it differs between lakes."""
    version: int
    partitions: Mapping[str, PartitionFiles]
    """Partitions with rows, by key."""

    def only(self, key: str) -> TableState:
        """The summary without the other partitions."""
        return replace(self, partitions={key: self.partitions[key]} if key in self.partitions else {})

    @property
    def rows(self) -> int:
        """Rows of all partitions."""
        return sum(partition.rows for partition in self.partitions.values())


def table_state(root: str, table: TableSpec, delta: DeltaTable) -> TableState:
    """Summary of an open table and its partitions, from its log alone."""
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
    """A data file of a table version."""

    partition_key: str
    path: str
    byte_size: int
    rows: int
    written_at_ms: int
    """When it was written, by the writer's clock, in milliseconds since 1970."""


def files_by_partition(root: str, table: TableSpec, delta: DeltaTable) -> Mapping[str, list[DataFile]]:
    """Data files of an open table by partition key, from its log alone. Partitions without rows have no entry."""
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
    """The files that hold a partition's rows. Files are never rewritten, so equal names mean equal rows."""

    table: TableSpec
    version: int | None
    """Version of the table; None if it does not exist."""
    files: frozenset[str] = frozenset()
    """File names, without folders."""

    @property
    def files_hash(self) -> str:
        """Hash of the file names, comparable to `PartitionFiles.files`."""
        return files_hash(self.files)


def state_of(delta: DeltaTable, table: TableSpec, key: str) -> PartitionState:
    """The files that hold a partition's rows in an open table, at its version."""
    files = frozenset(map(_file_name, delta.file_uris(file_pruning_predicate=partition_predicate(key))))
    return PartitionState(table, int(delta.version()), files)


def _file_name(path: str) -> str:
    """The last part of a path. It is unique by itself, and escaping of the folders before it differs between APIs."""
    return path.rpartition("/")[2]
