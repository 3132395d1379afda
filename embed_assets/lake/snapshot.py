"""A consistent view of the lake: every table stays at the version it had when it was first read.

A reader opens a `Snapshot` and closes it. A run opens a `PartitionSnapshot` per partition to read rows and to replace
them, unless another run replaced them first. Concurrency control is optimistic, without locks and clocks. The snapshot
remembers which files held the rows it read (the baseline) and compares them again right before each commit, with the
output table already open at its newest version. A run that replaced the inputs before that check is detected. A run
that replaces them after it has yet to commit its own output to the same partition, so the newer rows win.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError

from embed_assets.errors import LakeError, SupersededError
from embed_assets.lake.reader import PartitionState, TableState, content_of, read_table, state_of, table_state
from embed_assets.lake.tables import (
    MOST_VALUES,
    Handle,
    Lake,
    TableSpec,
    documents_predicate,
    lake_errors,
    partition_predicate,
)
from embed_assets.lake.writer import (
    TARGET_FILE_BYTES,
    Chained,
    Provenance,
    Replaced,
    SpooledRows,
    commit_properties,
    rows_to_write,
    spool_rows,
    writer_properties,
)
from embed_assets.records import ContentVersion
from embed_assets.scratch import SpooledBatches

_LEAST_ROWS = 5000
"""Rows of a partition below which all of it is rewritten, which takes half the time of finding the files to rewrite."""
_COMMIT_ATTEMPTS = 20
"""Each waits longer than the one before: in all about half a minute of others' commits to the same partition."""


class Snapshot:
    """The lake's tables, each opened on first access. Not thread-safe."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake
        self._handles: dict[str, Handle | None] = {}

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Return the open tables to the lake, which may reuse them for its session's next snapshot."""
        for handle in self._handles.values():
            if handle is not None:
                self.lake.release(handle)
        self._handles.clear()

    def table(self, table: TableSpec) -> DeltaTable | None:
        """The open table, or None if it did not exist on first access. Raises ``LakeError`` if it is damaged."""
        if table.path not in self._handles:
            self._handles[table.path] = self.lake.acquire(table.path)
        handle = self._handles[table.path]
        return None if handle is None else handle.delta

    def refreshed(self, table: TableSpec) -> DeltaTable | None:
        """The table, or None, after moving it to its newest version, where it stays."""
        handle = self._handles.get(table.path)
        if handle is None:
            self._handles.pop(table.path, None)
        else:
            self.lake.refresh(handle)
        return self.table(table)

    def keep(self, table: TableSpec, delta: DeltaTable) -> None:
        """Use `delta`, a table that was just created, for `table` from now on."""
        self._handles[table.path] = Handle(table.path, delta, int(delta.version()))

    def version(self, table: TableSpec) -> int | None:
        """The table's version (commit number), or None if it does not exist."""
        delta = self.table(table)
        return None if delta is None else int(delta.version())

    def state(self, table: TableSpec) -> TableState | None:
        """Summary of the table and its partitions, from its log alone, or None if it does not exist."""
        delta = self.table(table)
        return None if delta is None else table_state(self.lake.root, table, delta)

    def keys(self, table: TableSpec) -> set[str]:
        """Keys of the partitions that have rows, from the table's log alone."""
        state = self.state(table)
        return set() if state is None else set(state.partitions)

    def rows(self, table: TableSpec, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Batches with `columns` of the table's rows, in no particular order.

        `where` is an SQL predicate that filters rows. Yields nothing if the table does not exist. Raises ``LakeError``
        if it can't be read.
        """
        delta = self.table(table)
        if delta is not None:
            yield from read_table(self.lake.root, self.lake.full(table), delta, columns, where)

    def content(self, table: TableSpec, key: str, like: str | None = None) -> str:
        """Data version of a partition, computed from its rows, in the form of the version `like`."""
        return content_of(self.lake.root, self.lake.full(table), self.table(table), key, like)

    def partition(self, key: str) -> PartitionSnapshot:
        """The partition `key` of this snapshot; it shares the snapshot's open tables."""
        return PartitionSnapshot(self, key)

    def begin(self, key: str) -> PartitionSnapshot:
        """The partition `key` in a new snapshot, to be materialized."""
        return PartitionSnapshot(Snapshot(self.lake), key)


class PartitionSnapshot:
    """One partition of a snapshot. Reads its rows, and replaces them if no other run did meanwhile."""

    def __init__(self, tables: Snapshot, key: str) -> None:
        self.tables, self.key = tables, key
        self._baselines: dict[str, PartitionState] = {}
        self._documents: Collection[str] | None = None

    @property
    def lake(self) -> Lake:
        """The lake of the snapshot."""
        return self.tables.lake

    def close(self) -> None:
        """Return the snapshot's open tables to the lake."""
        self.tables.close()

    def only(self, documents: Collection[str] | None) -> PartitionSnapshot:
        """This partition, of which `rows` are those of some documents; None: of all."""
        part = copy(self)
        part._documents = documents
        return part

    def rows(self, table: TableSpec, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Batches with `columns` of the partition's rows. Raises ``LakeError`` if they can't be read."""
        documents = self._documents
        if documents is None:
            return self.tables.rows(table, columns, partition_predicate(self.key))
        if len(documents) <= MOST_VALUES:
            where = documents_predicate(self.key, documents)
            return self.tables.rows(table, columns, where) if documents else iter(())
        names = pa.array(documents, pa.string())
        batches = self.only(None).rows(table, list(dict.fromkeys([*columns, "document_id"])))
        found = (batch.filter(pc.is_in(batch.column("document_id"), value_set=names)) for batch in batches)
        return (batch.select(list(columns)) for batch in found if batch.num_rows)

    def count(self, table: TableSpec) -> int:
        """Number of the partition's rows in a table."""
        return sum(batch.num_rows for batch in self.rows(table, [table.schema.names[0]]))

    def state(self, table: TableSpec) -> PartitionState:
        """The baseline for a table: the files that held the partition's rows when this work first looked."""
        if table.path not in self._baselines:
            self._baselines[table.path] = self._state_of(table, self.tables.table(table))
        return self._baselines[table.path]

    def set_baseline(self, state: PartitionState) -> None:
        """Make `state` the baseline for its table: later changes to other files count as made by another run."""
        self._baselines[state.table.path] = state

    def reset_baseline(self, table: TableSpec) -> None:
        """Move the table to its newest version and make that the baseline."""
        self.set_baseline(self._state_of(table, self.tables.refreshed(table)))

    def require_current(self, *tables: TableSpec) -> None:
        """Raise ``SupersededError`` if another run replaced the partition's rows in one of the tables.

        Moves the tables to their newest version. Compaction, which rewrites files with the same rows, is not an error.
        """
        for table in tables:
            before = self.state(table)
            delta = self.tables.refreshed(table)
            now = self._state_of(table, delta)
            if now.version != before.version and now.files != before.files and not self._is_compacted(before, delta):
                raise self._superseded(table)
            self.set_baseline(now)

    def _superseded(self, table: TableSpec) -> SupersededError:
        return SupersededError(
            f"partition {self.key!r}: another run replaced its {table.path} while this one worked on "
            "the older ones, so its own were not recorded; run 'embed-assets plan' to see what is left to do",
            is_retryable=True,
        )

    @contextlib.contextmanager
    def watched(self, *tables: TableSpec) -> Iterator[None]:
        """Turn errors into ``SupersededError`` if another run replaced the partition's rows in one of the tables.

        Rows that change while they are read may cause any kind of error.
        """
        for table in tables:
            self.state(table)
        try:
            yield
        except SupersededError:
            raise
        except Exception as error:
            try:
                self.require_current(*tables)
            except SupersededError:
                raise
            except LakeError:
                raise error from None  # no comparison, so no better explanation
            raise

    def replace(
        self,
        table: TableSpec,
        new: Iterable[pa.RecordBatch] | SpooledRows,
        provenance: Provenance,
        check: Callable[[], None] = lambda: None,
        dimension: int | None = None,
        documents: Collection[str] | None = None,
    ) -> Replaced:
        """Atomically replace the partition's rows in `table` with `new` ones. Other partitions are not affected.

        With `documents`, only the rows of these are replaced, which takes about as long as rewriting the files that
        they are in, and `provenance.previous` is the data version of all the partition's rows at the baseline.

        Batches are first spooled to a local file, so that the commit is short and a failure while they are computed
        changes nothing. Nothing is committed if the table has the same content already, unless `provenance.rewrite`.
        `check` is called right before every commit attempt, with the table at its newest version, and raises if the
        rows must no longer be written; a later commit to the partition makes the attempt fail. `dimension` is the
        vector length if the table has to be created. Raises ``LakeError`` if the rows can't be written.
        """
        table = self.lake.full(table)
        if documents is not None and self.tables.table(table) is not None:
            return self._replace_documents(table, documents, new, provenance, check)
        with _spooled(table, self.key, new) as rows:
            delta = self.tables.refreshed(table)
            if delta is None and not rows.count:
                return Replaced(rows.data_version, 0, False, PartitionState(table, None))
            if delta is not None and not provenance.rewrite and self._has_content(table, rows.data_version):
                return self._replaced(rows, is_committed=False)
            if delta is None:
                self.tables.keep(table, self.lake.create(table, dimension))
            self._commit(rows, provenance, check, partition_predicate(self.key))
            return self._replaced(rows, is_committed=True)

    def _replace_documents(
        self,
        table: TableSpec,
        documents: Collection[str],
        new: Iterable[pa.RecordBatch] | SpooledRows,
        provenance: Provenance,
        check: Callable[[], None],
    ) -> Replaced:
        with _spooled(table, self.key, new) as rows, SpooledBatches(table.schema) as kept:
            content = ContentVersion(table.content_columns, provenance.previous)
            is_rewritten = content.row_count <= _LEAST_ROWS or len(documents) > MOST_VALUES
            for batch in self._rows_of_documents(table, documents, kept if is_rewritten else None):
                content.remove(batch)
            for batch in rows.batches:
                content.add(batch)
            rows = replace(rows, count=content.row_count, data_version=content.text())
            if rows.data_version == provenance.previous and not provenance.rewrite:
                check()
                self.require_current(table)
                return self._replaced(rows, is_committed=False)
            where = partition_predicate(self.key) if is_rewritten else documents_predicate(self.key, documents)
            if is_rewritten:
                size = rows.byte_size + kept.complete()
                rows = replace(rows, batches=Chained([kept, rows.batches]), byte_size=size)
            under: list[PartitionState] = []

            def check_all() -> None:
                check()
                self.require_current(table)
                under[:] = [self.state(table)]

            self._commit(rows, provenance, check_all, where)
            self._require_sole_commit(under[0])
            return self._replaced(rows, is_committed=True)

    def _rows_of_documents(
        self, table: TableSpec, documents: Collection[str], others: SpooledBatches | None
    ) -> Iterator[pa.RecordBatch]:
        """Batches with at least the content columns of some documents' rows; adds all other rows to `others`."""
        if others is None:
            yield from self.only(documents).rows(table, table.content_columns)
            return
        names = pa.array(documents, pa.string())
        for batch in self.rows(table, table.schema.names):
            is_one = pc.is_in(batch.column("document_id"), value_set=names)
            others.add(batch.filter(pc.invert(is_one)))
            yield batch.filter(is_one)

    def _require_sole_commit(self, under: PartitionState) -> None:
        """Raise ``SupersededError`` if another commit to the partition came between `under` and the one just made.

        Delta accepts both if their documents differ, but together they are what neither of the runs recorded.
        """
        table, delta = under.table, self.tables.table(under.table)
        if delta is None or under.version is None or int(delta.version()) == under.version + 1:
            return
        below = self.lake.open(table, int(delta.version()) - 1)
        if self._state_of(table, below).files != under.files and not self._is_compacted(under, below):
            raise self._superseded(table)

    def _commit(self, rows: SpooledRows, provenance: Provenance, check: Callable[[], None], where: str) -> None:
        """Replace the rows `where` says in one commit, retrying when another process committed a conflicting change.

        Afterwards the open table is at the commit's version.
        """
        self.lake.require_writable()
        table, row_bytes = rows.table, max(1, rows.byte_size // max(1, rows.count))
        for attempt in range(_COMMIT_ATTEMPTS):
            check()
            delta = self.tables.table(table)
            assert delta is not None
            with lake_errors(f"partition {self.key!r} of the table {table.path!r} can't be written", self.lake.root):
                try:
                    write_deltalake(
                        delta,
                        rows_to_write(rows, delta),
                        mode="overwrite",
                        predicate=where,
                        target_file_size=TARGET_FILE_BYTES,
                        writer_properties=writer_properties(table, row_bytes),
                        commit_properties=commit_properties(rows, provenance),
                    )
                    return
                except CommitFailedError:  # another process replaced or compacted the same partition
                    if attempt == _COMMIT_ATTEMPTS - 1:
                        raise
                    time.sleep(random.uniform(0.05, 0.3) * (attempt + 1))
                    delta.update_incremental()

    def _replaced(self, rows: SpooledRows, is_committed: bool) -> Replaced:
        table, delta = rows.table, self.tables.table(rows.table)
        state = self._state_of(table, delta)
        self.set_baseline(state)
        table_id = "" if delta is None else str(delta.metadata().id)
        return Replaced(rows.data_version, rows.count, is_committed, state, table_id)

    def holds(self, table: TableSpec, data_version: str, data_files: str) -> bool:
        """Whether the partition's rows are those with this data version, recorded as being in `data_files`.

        Compaction rewrites the same rows into other files, so where the files differ, their content decides.
        """
        if self.state(table).files_hash == data_files:
            return True
        with contextlib.suppress(LakeError):
            return self.tables.content(table, self.key, data_version) == data_version
        return False

    def _has_content(self, table: TableSpec, data_version: str) -> bool:
        """Whether the partition's rows have this data version. False if unreadable, so that they are replaced."""
        try:
            return self.tables.content(table, self.key) == data_version
        except LakeError:
            return False

    def _state_of(self, table: TableSpec, delta: DeltaTable | None) -> PartitionState:
        if delta is None:
            return PartitionState(table, None)
        with lake_errors(f"the table {table.path!r} can't be read", self.lake.root):
            return state_of(delta, table, self.key)

    def _is_compacted(self, before: PartitionState, now: DeltaTable | None) -> bool:
        """Whether the partition's rows are the same as before, in other files."""
        if before.version is None:
            return False
        table, root = before.table, self.lake.root
        then = self.lake.open(table, before.version)
        return content_of(root, table, then, self.key) == content_of(root, table, now, self.key)


def _spooled(
    table: TableSpec, key: str, new: Iterable[pa.RecordBatch] | SpooledRows
) -> contextlib.AbstractContextManager[SpooledRows]:
    return contextlib.nullcontext(new) if isinstance(new, SpooledRows) else spool_rows(table, key, new)
