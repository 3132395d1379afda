"""The lake as one piece of work sees it: every table stays at the version it had when it was first read.

A reader makes a `Snapshot` and drops it. A run makes a `PartitionSnapshot` per partition: it reads rows, and replaces
them unless another run was faster. There is no lock and no clock in that. The snapshot knows which files hold the rows
it read, and looks again after it has opened the table it writes to and before it commits. Whoever replaces the inputs
after that look still has its own commit to the same partition ahead of it, and wins; whoever did it before is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
from deltalake import DeltaTable

from embed_assets.errors import LakeError, SupersededError
from embed_assets.lake.reader import PartitionState, TableState, content_of, read_table, state_of, table_state
from embed_assets.lake.tables import Handle, Lake, TableSpec, lake_errors, partition_predicate
from embed_assets.lake.writer import Provenance, Replaced, SpooledRows, commit_rows, spool_rows


class Snapshot:
    """The lake's tables. Each is opened when it is first asked for. Usable by one thread at a time."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake
        self._handles: dict[str, Handle | None] = {}

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the open tables to the lake, for the next snapshot of its session."""
        for handle in self._handles.values():
            if handle is not None:
                self.lake.give_back(handle)
        self._handles.clear()

    def table(self, table: TableSpec) -> DeltaTable | None:
        """The open table, or None when it did not exist. Raises ``LakeError`` when it is damaged."""
        if table.path not in self._handles:
            self._handles[table.path] = self.lake.take(table.path)
        handle = self._handles[table.path]
        return None if handle is None else handle.delta

    def refreshed(self, table: TableSpec) -> DeltaTable | None:
        """The table at its newest version, where it stays from now on."""
        handle = self._handles.get(table.path)
        if handle is None:
            self._handles.pop(table.path, None)
        else:
            self.lake.refresh(handle)
        return self.table(table)

    def keep(self, table: TableSpec, delta: DeltaTable) -> None:
        """Go on with a table that was created meanwhile."""
        self._handles[table.path] = Handle(table.path, delta, int(delta.version()))

    def version(self, table: TableSpec) -> int | None:
        """The table's commit number, or None when it does not exist."""
        delta = self.table(table)
        return None if delta is None else int(delta.version())

    def state(self, table: TableSpec) -> TableState | None:
        """What the table's log tells of all its partitions, or None when it does not exist."""
        delta = self.table(table)
        return None if delta is None else table_state(self.lake.root, table, delta)

    def keys(self, table: TableSpec) -> set[str]:
        """Keys of the partitions that have rows, from the table's log alone."""
        state = self.state(table)
        return set() if state is None else set(state.partitions)

    def rows(self, table: TableSpec, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """The columns of all rows for which the SQL `where` is true, batch by batch, in no particular order.

        None when the table does not exist. Raises ``LakeError`` when it can't be read.
        """
        delta = self.table(table)
        if delta is not None:
            yield from read_table(self.lake.root, table, delta, columns, where)

    def content(self, table: TableSpec, key: str) -> str:
        """Hash of what the table holds of a partition: its data version."""
        return content_of(self.lake.root, table, self.table(table), key)

    def partition(self, key: str) -> PartitionSnapshot:
        """One partition of these tables."""
        return PartitionSnapshot(self, key)

    def begin(self, key: str, *tables: TableSpec) -> PartitionSnapshot:
        """A partition to work on, in a snapshot of its own, that counts as superseded when another run replaced its
        rows in `tables` since this snapshot was made."""
        work = PartitionSnapshot(Snapshot(self.lake), key)
        for table in tables:
            work.expect(self.partition(key).state(table))
        return work


class PartitionSnapshot:
    """One partition of a snapshot: its rows, the files that hold them, and replacing them."""

    def __init__(self, tables: Snapshot, key: str) -> None:
        self.tables, self.key = tables, key
        self._states: dict[str, PartitionState] = {}

    @property
    def lake(self) -> Lake:
        """The lake that the partition is in."""
        return self.tables.lake

    def close(self) -> None:
        """As `Snapshot.close`."""
        self.tables.close()

    def rows(self, table: TableSpec, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The columns of the partition's rows, as `Snapshot.rows` gives them."""
        return self.tables.rows(table, columns, partition_predicate(self.key))

    def count(self, table: TableSpec) -> int:
        """Rows of the partition."""
        return sum(batch.num_rows for batch in self.rows(table, [table.schema.names[0]]))

    def state(self, table: TableSpec) -> PartitionState:
        """The files that hold the partition's rows, as this work knows them."""
        if table.path not in self._states:
            self._states[table.path] = self._state_of(table, self.tables.table(table))
        return self._states[table.path]

    def expect(self, state: PartitionState) -> None:
        """Take `state` for what this work knows of a table."""
        self._states[state.table.path] = state

    def observe(self, table: TableSpec) -> None:
        """Take what the table has now for what this work knows of it."""
        self.expect(self._state_of(table, self.tables.refreshed(table)))

    def require_current(self, *tables: TableSpec) -> None:
        """Raise ``SupersededError`` when another run replaced the partition's rows in one of the tables.

        Compaction, which makes other files of the same rows, replaces nothing.
        """
        for table in tables:
            before = self.state(table)
            delta = self.tables.refreshed(table)
            now = self._state_of(table, delta)
            if now.version != before.version and now.files != before.files and not self._is_compacted(before, delta):
                raise SupersededError(
                    f"partition {self.key!r}: another run replaced its {table.path} while this one worked on "
                    "the older ones, so its own were not written; the newer ones stand, see 'embed-assets plan'",
                    is_retryable=True,
                )
            self._states[table.path] = now

    @contextlib.contextmanager
    def watched(self, *tables: TableSpec) -> Iterator[None]:
        """Report an error as ``SupersededError`` if another run replaced the partition's rows in one of the tables:
        that is its cause."""
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
                raise error from None  # what can't be compared does not explain it
            raise

    def replace(
        self,
        table: TableSpec,
        batches: Iterable[pa.RecordBatch],
        provenance: Provenance,
        check: Callable[[], None] = lambda: None,
        dimension: int | None = None,
    ) -> Replaced:
        """Make `batches` the rows of the partition, atomically, and leave every other partition alone.

        The rows are first spooled to a local file, so that the commit is short and a failure while they are made
        changes nothing. No commit is made when the table holds the same content already, unless the provenance says
        `rewrite`. `check` raises when the rows must not be written any more; it is asked right before every attempt to
        commit, once the table is at its newest version: a later commit to the partition makes the attempt fail.
        `dimension` is that of the vectors of a table that is created. Raises ``LakeError`` when it can't be written.
        """
        with spool_rows(table, self.key, batches) as rows:
            delta = self.tables.refreshed(table)
            if delta is None and not rows.count:
                return Replaced(rows.data_version, 0, False, PartitionState(table, None))
            if delta is not None and not provenance.rewrite and self._holds(table, rows.data_version):
                return self._replaced(table, delta, rows, is_committed=False)
            if delta is None:
                delta = self.lake.create(table, dimension)
                self.tables.keep(table, delta)
            commit_rows(self.lake.root, delta, rows, provenance, check)
            return self._replaced(table, delta, rows, is_committed=True)

    def _replaced(self, table: TableSpec, delta: DeltaTable, rows: SpooledRows, is_committed: bool) -> Replaced:
        self._states[table.path] = self._state_of(table, delta)
        table_id = str(delta.metadata().id)
        return Replaced(rows.data_version, rows.count, is_committed, self._states[table.path], table_id)

    def _holds(self, table: TableSpec, data_version: str) -> bool:
        """The table has this content. Files that can't be read hold nothing, and are replaced."""
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
        """Both versions of the table have the same content."""
        if before.version is None:
            return False
        table, root = before.table, self.lake.root
        then = self.lake.open(table, before.version)
        return content_of(root, table, then, self.key) == content_of(root, table, now, self.key)
