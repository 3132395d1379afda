"""The Delta tables: where they are, how they are created and opened, and the one place that writes predicates."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import pyarrow as pa
from deltalake import DeltaTable, Field
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from obstore.exceptions import BaseError

from embed_assets.errors import LakeError, SettingsError
from embed_assets.lake.diagnosis import diagnose_log, find_empty_commit, has_orphaned_data
from embed_assets.lake.owner import Owner
from embed_assets.lake.storage import Storage
from embed_assets.records import CHUNKS, EMBEDDINGS, RAW_DOCUMENTS, REJECTED_DOCUMENTS
from embed_assets.settings import Settings, local_path

SCHEMAS: dict[str, pa.Schema] = {
    "raw_documents": RAW_DOCUMENTS,
    "rejected_documents": REJECTED_DOCUMENTS,
    "chunks": CHUNKS,
    "embeddings": EMBEDDINGS,
}
_SCHEMES = ("s3", "s3a", "gs", "abfs", "abfss", "az", "azure", "adl")
_DIMENSION_PROPERTY = "embed_assets.dimension"
_DRAWING = re.compile("\x1b\\[[0-9;]*m|↳")
_DISK_FULL = ("No space left on device", "File too large", "Disk quota exceeded")
_ALTER_ATTEMPTS = 20
_MOST_UPDATES = 50
"""A commit to a table of 1,500 files takes 9 ms right after it was opened, 16 ms after 60 updates, and opening it 12 to
22 ms."""
_UNUSABLE = re.compile(r"[\[\]^|\\\x00-\x1f\x7f\ud800-\udfff]")
"""Characters that no place of a table may have: Delta's library panics, or writes a table and can't find it again."""
_UNUSABLE_IN_PATHS = re.compile(r"%[0-9A-Fa-f]{2}")
"""Taken for an escape, once or twice, so that it is written to one folder and read from another."""
_UNUSABLE_IN_URLS = re.compile(r"[?#]")
"""The end of the path, as in a browser: 'lake#1' and 'lake#2' would be one lake."""


@dataclass(frozen=True, slots=True)
class TableSpec:
    """One of the lake's tables."""

    kind: str
    """Key of `SCHEMAS`."""
    space: str = ""
    """Name of the embedding space, for embeddings."""
    properties: Mapping[str, str] = field(default_factory=dict)
    """Written when the table is created."""
    extra: tuple[pa.Field, ...] = ()
    """Columns beside those of its kind. A table that was made without them gets them, null in the rows it has."""

    @property
    def path(self) -> str:
        """Place below the lake's root."""
        return f"{self.kind}/{self.space}" if self.space else self.kind

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the rows."""
        return pa.schema([*SCHEMAS[self.kind], *self.extra])


RAW = TableSpec("raw_documents")
REJECTED = TableSpec("rejected_documents")
CHUNK_TABLE = TableSpec("chunks")
_OWNED = (RAW, REJECTED)
"""The tables that say whose the lake is. They are written first: one of them is there as soon as anything is."""


def partition_predicate(key: str) -> str:
    """SQL that is true of the rows of one partition, whatever characters are in its key."""
    return f"partition_key = {quoted(key)}"


def is_one_of(column: str, values: Iterable[str]) -> str:
    """SQL that is true where a string column has one of the values, of which there must be one."""
    return f"{column} IN ({', '.join(map(quoted, values))})"


def quoted(value: str) -> str:
    """A SQL string literal."""
    return "'" + value.replace("'", "''") + "'"


@dataclass(eq=False, slots=True)
class Handle:
    """An open table, and the version at which it was opened."""

    path: str
    delta: DeltaTable
    opened_at: int

    @property
    def is_worn(self) -> bool:
        """It is quicker to open the table anew than to go on with this: each update makes the next commit slower."""
        return int(self.delta.version()) - self.opened_at > _MOST_UPDATES


@dataclass(frozen=True)
class Lake:
    """The root of the tables, on any storage that Delta supports."""

    root: str
    options: dict[str, str] = field(default_factory=dict, repr=False)
    """Delta storage options."""
    owner: Owner = field(default_factory=Owner)
    """The corpus that is to be in it."""
    _idle: list[Handle] | None = field(default=None, compare=False, repr=False)
    """Open tables that nobody uses at present; None where none are kept."""

    def session(self) -> Lake:
        """This lake, for the time of a run: it keeps tables open for the next snapshot."""
        return replace(self, _idle=[])

    def take(self, path: str) -> Handle | None:
        """The table below the root at its newest version, for one user; None when it does not exist."""
        idle = self._idle or []
        for handle in [handle for handle in idle if handle.path == path]:
            try:
                idle.remove(handle)
            except ValueError:  # another thread took it
                continue
            self.refresh(handle)
            return handle
        delta = self.open_path(path)
        return None if delta is None else Handle(path, delta, int(delta.version()))

    def refresh(self, handle: Handle) -> None:
        """Bring an open table up to date."""
        with self._table_errors(handle.path):
            handle.delta.update_incremental()

    def give_back(self, handle: Handle) -> None:
        """Take an open table back that its user has done with."""
        if self._idle is not None and not handle.is_worn:
            self._idle.append(handle)

    @classmethod
    def from_settings(cls, settings: Settings) -> Lake:
        """The lake that the settings name; nothing is created yet. Raises ``SettingsError`` or ``LakeError``."""
        path = local_path(settings.lake)
        scheme = settings.lake.partition("://")[0] if path is None else ""
        if scheme and scheme not in _SCHEMES:
            known = ", ".join(f"{name}://" for name in _SCHEMES)
            raise SettingsError(f"EMBED_LAKE must be a folder or one of {known}, got {settings.lake!r}; set EMBED_LAKE")
        if path is not None and path.exists() and not path.is_dir():
            raise LakeError(f"the lake {str(path)!r} must be a writable folder, it is a file; set EMBED_LAKE")
        root = str(path.absolute()) if path is not None else settings.lake.rstrip("/")
        others = _UNUSABLE_IN_URLS if path is None else _UNUSABLE_IN_PATHS
        if found := _UNUSABLE.search(root) or others.search(root):
            # https://github.com/delta-io/delta-rs/issues/1156 and its relatives
            raise SettingsError(
                f"Delta's library can't keep tables in a place with {found[0]!r} in its name, got EMBED_LAKE={root!r}; "
                "set EMBED_LAKE to another one"
            )
        return cls(root, settings.lake_options, Owner.from_settings(settings))

    def uri(self, table: TableSpec) -> str:
        """Where the table lies."""
        return f"{self.root}/{table.path}"

    def open(self, table: TableSpec, version: int | None = None) -> DeltaTable | None:
        """The table at a version, by default its newest, or None when it does not exist yet.

        Raises ``LakeError`` when it is damaged.
        """
        return self.open_path(table.path, version)

    def open_path(self, path: str, version: int | None = None) -> DeltaTable | None:
        """The table at `path` below the root, as `open` gives it."""
        with self._table_errors(path):
            try:
                return DeltaTable(f"{self.root}/{path}", version, self.options or None)
            except TableNotFoundError:
                return None

    def create(self, table: TableSpec, dimension: int | None = None) -> DeltaTable:
        """The table, created if need be. Safe when several processes do it at once.

        The dimension of an embeddings table is a constraint: rows with another length can't be committed.
        """
        configuration = {"delta.dataSkippingStatsColumns": "document_id", **table.properties, **self.owner.properties}
        if dimension is not None:
            # Constraints need writer version 3, and only here, at creation, are they set without a race.
            configuration |= {
                "delta.constraints.dimension": f"cardinality(embedding) = {dimension}",
                "delta.minWriterVersion": "3",
                _DIMENSION_PROPERTY: str(dimension),
            }
        with lake_errors(f"the table {table.path!r} can't be created", self.root):
            if has_orphaned_data(self.storage, table.path):
                raise LakeError(
                    f"the table {self.uri(table)!r} has data files and no _delta_log, so it is no table any more; "
                    "restore its _delta_log from a backup, or move the folder away and sync, which makes it anew"
                )
            made = DeltaTable.create(
                self.uri(table),
                table.schema,
                mode="ignore",
                partition_by=["partition_key"],
                name=table.path,
                configuration=configuration,
                storage_options=self.options or None,
                raise_if_key_not_exists=False,
            )
        self._check_owner_of(made)  # another corpus may have made it at the same time
        return made

    @contextlib.contextmanager
    def _table_errors(self, path: str) -> Iterator[None]:
        """Say what is wrong with the table's log, if it is that."""
        try:
            with lake_errors(f"the table {path!r} can't be opened", self.root):
                yield
        except LakeError as error:
            with contextlib.suppress(OSError, BaseError):  # then the library's own reason must do
                if problem := diagnose_log(self.storage, path):
                    raise self._damaged(path, problem) from error
            raise

    def _damaged(self, path: str, problem: str) -> LakeError:
        return LakeError(f"the table {path!r} in the lake {self.root!r} is damaged: {problem}")

    def check_usable(self, embeddings: TableSpec) -> None:
        """Raise ``LakeError`` now rather than once per partition when the lake is another corpus's, a table in it is
        damaged or another one than expected, or (where it is local) nothing can be written to it."""
        self._check_writable()
        self.check_owner()
        self.check_tables(embeddings)
        if self.owner.source:
            self._take_over()
        for table in (RAW, REJECTED, CHUNK_TABLE, embeddings):
            self._add_columns(table)

    def check_tables(self, embeddings: TableSpec) -> None:
        """Raise ``LakeError`` when a table lacks columns, or an entry of its log is empty, or the space's table is of
        another space."""
        for table in (RAW, REJECTED, CHUNK_TABLE, embeddings):
            if (delta := self.open(table)) is None:
                continue
            with lake_errors(f"the log of the table {table.path!r} can't be listed", self.root):
                problem = find_empty_commit(self.storage, table.path)
            if problem:
                raise self._damaged(table.path, problem)
            self._check_columns(table, delta)
            stored = delta.metadata().configuration
            for name, value in table.properties.items():
                if stored.get(name, value) != value:
                    raise LakeError(
                        f"the table {self.uri(table)!r} must be of the space {table.space!r}, but its property {name} "
                        f"is {stored[name]!r} instead of {value!r}; move the folder away and sync"
                    )

    def _check_columns(self, table: TableSpec, delta: DeltaTable) -> None:
        """Columns that somebody added stay, null in the rows we write; those that may be null can be added by us."""
        stored, ours = columns_of(delta), table.schema
        lost = [column.name for column in ours if column.name not in stored.names and not column.nullable]
        foreign = [column.name for column in stored if column.name not in ours.names and not column.nullable]
        if lost or foreign:
            what = f"lost {', '.join(lost)}" if lost else f"gained {', '.join(foreign)}, which can't be null"
            raise LakeError(
                f"the table {self.uri(table)!r} must have the columns {', '.join(ours.names)}; it has {what}; restore "
                "an older version of it, or move the folder away and sync"
            )

    def _add_columns(self, table: TableSpec) -> None:
        """Give a table that was made by older code the columns that are new, without writing a row."""
        delta = self.open(table) if table.extra else None
        if delta is None:
            return

        def add_missing() -> None:
            known = columns_of(delta).names
            if added := [Field.from_arrow(column) for column in table.extra if column.name not in known]:
                delta.alter.add_columns(added)

        self._alter(delta, f"the columns of {table.path!r} can't be added", add_missing)

    def check_owner(self) -> None:
        """Raise ``LakeError`` when the lake is another corpus's."""
        for table in _OWNED:
            if (delta := self.open(table)) is not None:
                self._check_owner_of(delta)

    def _check_owner_of(self, delta: DeltaTable) -> None:
        owner = Owner.of(delta)
        if self.owner.is_at_odds_with(owner):
            raise LakeError(
                f"a lake holds one corpus, {self.root!r} has that of {owner}, got {self.owner}: they would replace "
                "each other's partitions; set EMBED_LAKE to a lake of its own, or, if these are the same documents in "
                "another place, run 'embed-assets adopt'"
            )

    def adopt(self) -> bool:
        """Make this lake belong to the corpus of the settings; False when it already did, or has no tables yet."""
        tables = [delta for table in _OWNED if (delta := self.open(table)) is not None]
        foreign = [delta for delta in tables if Owner.of(delta) != self.owner]
        for delta in foreign:
            self._own(delta)
        return bool(foreign)

    def _take_over(self) -> None:
        """Note the owner in a lake that was made before lakes knew their source.

        Raises ``LakeError`` when another corpus did so first.
        """
        for table in _OWNED:
            if (delta := self.open(table)) is not None:
                self._check_owner_of(delta)
                if not Owner.of(delta).source:
                    self._own(delta, functools.partial(self._check_owner_of, delta))

    def _own(self, delta: DeltaTable, check: Callable[[], None] = lambda: None) -> None:
        properties = dict(self.owner.properties)

        def change() -> None:
            check()
            delta.alter.set_table_properties(properties, raise_if_not_exists=False)

        self._alter(delta, "the lake's owner can't be noted", change)

    def _alter(self, delta: DeltaTable, problem: str, change: Callable[[], None]) -> None:
        """Change a table's metadata, again where somebody wrote to it meanwhile."""
        for attempt in range(_ALTER_ATTEMPTS):
            with lake_errors(problem, self.root):
                try:
                    change()
                    return
                except CommitFailedError:
                    if attempt == _ALTER_ATTEMPTS - 1:
                        raise
                    delta.update_incremental()

    def _check_writable(self) -> None:
        path = local_path(self.root)
        if path is None:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise LakeError(
                f"the lake {self.root!r} must be a writable folder: {error.strerror}; set EMBED_LAKE or its permissions"
            ) from error

    def spaces(self) -> list[str]:
        """Names of the embedding spaces that have a table."""
        with lake_errors("the embedding spaces can't be listed", self.root):
            return self.storage.folders("embeddings")

    @cached_property
    def storage(self) -> Storage:
        """What lies beside the tables."""
        return Storage(self.root, self.options)


def columns_of(table: DeltaTable) -> pa.Schema:
    """Arrow schema of a table as it is, others' columns included."""
    return pa.schema(table.schema().to_arrow())


def dimension_of(table: DeltaTable) -> int | None:
    """Length of the vectors that an embeddings table holds."""
    value = table.metadata().configuration.get(_DIMENSION_PROPERTY)
    return int(value) if value is not None else None


@contextlib.contextmanager
def lake_errors(what: str, root: str) -> Iterator[None]:
    """Turn the libraries' errors into one line that says what could not be done."""
    try:
        yield
    except (DeltaError, BaseError, OSError, pa.ArrowException) as error:
        # The libraries draw a tree of causes, in colors; what is of use may be in any of its lines.
        plain = _DRAWING.sub(" ", str(error).partition("Debug source:")[0])
        reason = " ".join(plain.split())[:600] or type(error).__name__
        full = any(sign in str(error) for sign in _DISK_FULL)
        advice = f"free some space in {root!r}" if full else f"check EMBED_LAKE={root!r} and its permissions"
        raise LakeError(f"{what}: {reason}; {advice}", is_retryable=local_path(root) is None) from error
