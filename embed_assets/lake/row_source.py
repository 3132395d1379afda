"""Where a search reads a table's rows: in the lake, or in copies of its partitions that are mapped into memory."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from embed_assets.lake.filters import Filter
from embed_assets.lake.reader import PartitionFiles
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import TableSpec, partition_predicate
from embed_assets.scratch import ArrowFile


class RowSource(Protocol):
    """A table's rows."""

    def read(self, columns: Sequence[str], keep: Filter | None = None) -> Iterator[pa.RecordBatch]:
        """Batches, none of them empty, with `columns` of the rows that a filter keeps, in no particular order.

        Raises ``LakeError`` if they can't be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class StoredRows:
    """The rows of a table at the version of a snapshot. Files that a filter rules out are not read."""

    tables: Snapshot
    table: TableSpec

    def read(self, columns: Sequence[str], keep: Filter | None = None) -> Iterator[pa.RecordBatch]:
        """As `RowSource.read`."""
        if keep is None:
            yield from self.tables.rows(self.table, columns)
            return
        needed = list(dict.fromkeys([*columns, *sorted(keep.columns)]))
        for batch in self.tables.rows(self.table, needed, keep.where):
            yield from _kept(batch, columns, keep)


@dataclass(slots=True)
class MappedRows:
    """A table's rows in files of a local folder, in the form that is used in memory: reading them again costs nothing.

    A partition is copied when it is first needed, and again when its files have changed. Not thread-safe.
    """

    folder: Path
    """Where the files are written: as large as the rows are in memory."""
    _files: dict[str, tuple[str, ArrowFile]] = field(default_factory=dict)
    """By partition, the hash of the table's files that it was copied from, and the copy."""

    def of(self, tables: Snapshot, table: TableSpec) -> RowSource:
        """The rows of a table, always the same one, at the version of a snapshot."""
        state = tables.state(table)
        partitions = state.partitions if state is not None else {}
        self.keep_only(set(partitions))
        return _MappedVersion(self, tables, table, partitions)

    def copied(self, tables: Snapshot, table: TableSpec, key: str, version: str) -> ArrowFile:
        """The copy of a partition, whose files in the table have the hash `version`."""
        known = self._files.get(key)
        if known is not None and known[0] == version:
            return known[1]
        self._drop(key)
        schema = tables.lake.full(table).schema
        rows = tables.rows(table, schema.names, partition_predicate(key))
        made = ArrowFile.write(self.folder / f"{uuid.uuid4().hex}.arrow", schema, rows)
        self._files[key] = version, made
        return made

    def keep_only(self, keys: set[str]) -> None:
        """Delete the copies of other partitions."""
        for key in self._files.keys() - keys:
            self._drop(key)

    def _drop(self, key: str) -> None:
        known = self._files.pop(key, None)
        if known is not None:
            known[1].remove()


@dataclass(frozen=True, slots=True)
class _MappedVersion:
    """A version of a table's rows."""

    mapped: MappedRows
    tables: Snapshot
    table: TableSpec
    partitions: Mapping[str, PartitionFiles]

    def read(self, columns: Sequence[str], keep: Filter | None = None) -> Iterator[pa.RecordBatch]:
        """As `RowSource.read`."""
        wanted = dict(keep.only).get("partition_key") if keep is not None else None
        for key, files in self.partitions.items():
            if wanted is None or key in wanted:
                for batch in self.mapped.copied(self.tables, self.table, key, files.files):
                    yield from [batch.select(columns)] if keep is None else _kept(batch, columns, keep)


def _kept(batch: pa.RecordBatch, columns: Sequence[str], keep: Filter) -> Iterator[pa.RecordBatch]:
    """The rows of a batch that a filter keeps, unless there are none."""
    kept = keep.among(batch, columns)
    if kept.num_rows:
        yield kept
