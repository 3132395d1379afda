"""Locate, create, open and validate the Delta tables, and build SQL predicates for them."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from embed_assets.locations import local_path
from embed_assets.metadata import parse_fields
from embed_assets.records import (
    ADDED_COLUMNS,
    CHUNKS,
    CONTENT_COLUMNS,
    COPIES,
    EMBEDDINGS,
    RAW_DOCUMENTS,
    REJECTED_DOCUMENTS,
)
from embed_assets.settings import Settings

SCHEMAS: dict[str, pa.Schema] = {
    "raw_documents": RAW_DOCUMENTS,
    "rejected_documents": REJECTED_DOCUMENTS,
    "chunks": CHUNKS,
    "embeddings": EMBEDDINGS,
    "copies": COPIES,
}
_STATS = {kind: "chunk_id" if kind == "copies" else "document_id" for kind in SCHEMAS}
"""The column of each table whose range the log keeps for each file."""
MOST_VALUES = 1000
"""Values that a predicate may list. Looking up 1,000 takes 0.02 s, 5,000 take 0.14 s; at about 24,000 delta-rs runs out
of stack, which ends the process."""
_SCHEMES = ("s3", "s3a", "gs", "abfs", "abfss", "az", "azure", "adl")
_DIMENSION_PROPERTY = "embed_assets.dimension"
_SETTINGS_PROPERTY = "embed_assets.settings"
_TREE_MARKUP = re.compile("\x1b\\[[0-9;]*m|↳")
_DISK_FULL = ("No space left on device", "File too large", "Disk quota exceeded")
_ALTER_ATTEMPTS = 20
"""Attempts to change a table's metadata while other runs commit to it; each one only rereads the log."""
_MAX_UPDATES = 50
"""Updates of an open table before it is reopened. Measured on a table of 1,500 files: a commit takes 9 ms right after
opening and 16 ms after 60 updates; opening takes 12 to 22 ms."""
_UNUSABLE = re.compile(r"[\[\]^|\\\x00-\x1f\x7f\ud800-\udfff]")
"""Characters that a lake's location must not contain: delta-rs panics, or writes a table that it then can't find."""
_UNUSABLE_IN_PATHS = re.compile(r"%[0-9A-Fa-f]{2}")
"""delta-rs decodes these as escapes, once or twice, and so writes to one folder and reads from another."""
_UNUSABLE_IN_URLS = re.compile(r"[?#]")
"""These end a URL's path: 'lake#1' and 'lake#2' would be the same lake."""


@dataclass(frozen=True, slots=True)
class TableSpec:
    """One of the lake's tables."""

    kind: str
    """Key of `SCHEMAS`."""
    space: str = ""
    """Name of the embedding space; empty except for embeddings."""
    properties: Mapping[str, str] = field(default_factory=dict)
    """Delta table properties, written when the table is created."""
    settings: str = ""
    """The settings that make an embedding space, as JSON; kept in its table, so that it can be made without them."""
    extra: tuple[pa.Field, ...] = field(default=(), compare=False)
    """Columns in addition to those of `kind`, of the same sort as `added`: those of metadata."""

    @property
    def path(self) -> str:
        """Path relative to the lake's root."""
        return f"{self.kind}/{self.space}" if self.space else self.kind

    @property
    def added(self) -> tuple[pa.Field, ...]:
        """Columns that older tables lack. They get them added, null in existing rows."""
        return (*ADDED_COLUMNS[self.kind], *self.extra)

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the rows."""
        return pa.schema([*SCHEMAS[self.kind], *self.added])

    @property
    def content_columns(self) -> tuple[str, ...]:
        """The columns that decide whether two rows are equal."""
        return (*CONTENT_COLUMNS[self.kind], *(column.name for column in self.extra))


RAW = TableSpec("raw_documents")
REJECTED = TableSpec("rejected_documents")
CHUNK_TABLE = TableSpec("chunks")
_DESCRIBED = ("raw_documents", "chunks", "embeddings")
_OWNER_TABLES = (RAW, REJECTED)
"""Tables that record which corpus the lake belongs to. They are written first, so a lake with tables has one."""


def partition_predicate(key: str) -> str:
    """SQL predicate for the rows of one partition. The key may contain any characters."""
    return f"partition_key = {quoted(key)}"


def documents_predicate(key: str, documents: Collection[str]) -> str:
    """SQL predicate for the rows of some documents of a partition."""
    return f"{partition_predicate(key)} AND {is_one_of('document_id', sorted(documents))}"


def is_one_of(column: str, values: Iterable[str]) -> str:
    """SQL predicate for rows whose string column has one of the values: at least one, and at most `MOST_VALUES`."""
    return f"{column} IN ({', '.join(map(quoted, values))})"


def quoted(value: str) -> str:
    """`value` as an SQL string literal."""
    return "'" + value.replace("'", "''") + "'"


@dataclass(eq=False, slots=True)
class Handle:
    """An open table that a lake's session can reuse."""

    path: str
    delta: DeltaTable
    opened_at: int
    """Version at which it was opened."""

    @property
    def should_reopen(self) -> bool:
        """Whether reopening the table is faster than reusing it: each update slows down later commits."""
        return int(self.delta.version()) - self.opened_at > _MAX_UPDATES


@dataclass(frozen=True)
class Lake:
    """The root of the tables, on any storage that Delta supports."""

    root: str
    options: dict[str, str] = field(default_factory=dict, repr=False)
    """Delta storage options."""
    owner: Owner = field(default_factory=Owner)
    """The corpus that the lake is expected to belong to."""
    is_read_only: bool = False
    """Whether everything that would change the lake is refused."""
    metadata: tuple[pa.Field, ...] = ()
    """Columns of documents' metadata, which the tables of `_DESCRIBED` have."""
    _idle: list[Handle] | None = field(default=None, compare=False, repr=False)
    """Open tables that are not in use, for reuse; None outside a session."""

    def require_writable(self) -> None:
        """Raise ``SettingsError`` if this deployment must not change the lake."""
        if self.is_read_only:
            raise SettingsError(
                f"this deployment must not change the lake {self.root!r}, as EMBED_READ_ONLY=true says; materialize in "
                "the deployment that owns it, or unset EMBED_READ_ONLY and name another EMBED_LAKE"
            )

    def full(self, table: TableSpec) -> TableSpec:
        """The table with the columns of metadata that it has in this lake."""
        return replace(table, extra=self.metadata) if self.metadata and table.kind in _DESCRIBED else table

    def session(self) -> Lake:
        """A copy of this lake that keeps tables open between snapshots, for the duration of a run."""
        return replace(self, _idle=[])

    def acquire(self, path: str) -> Handle | None:
        """The table at `path` below the root, at its newest version, for exclusive use; None if it does not exist.

        Raises ``LakeError`` if it is damaged.
        """
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
        """Move an open table to its newest version. Raises ``LakeError``.

        Looks for the next commit first: updating takes 2 ms, and 7.5 ms at 7,000 files, even if there is none.
        """
        with self._table_errors(handle.path):
            if self.storage.has(f"{handle.path}/_delta_log/{int(handle.delta.version()) + 1:020}.json"):
                handle.delta.update_incremental()

    def release(self, handle: Handle) -> None:
        """Return a table from `acquire`, for reuse within a session."""
        if self._idle is not None and not handle.should_reopen:
            self._idle.append(handle)

    @classmethod
    def from_settings(cls, settings: Settings) -> Lake:
        """The lake of the settings. Creates nothing. Raises ``SettingsError`` or ``LakeError``."""
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
            # https://github.com/delta-io/delta-rs/issues/1156 and similar issues
            raise SettingsError(
                f"Delta's library can't keep tables in a place with {found[0]!r} in its name, got EMBED_LAKE={root!r}; "
                "set EMBED_LAKE to another location"
            )
        metadata = tuple(found.column for found in parse_fields(settings.metadata))
        return cls(root, settings.lake_options, Owner.from_settings(settings), settings.read_only, metadata)

    def uri(self, table: TableSpec) -> str:
        """Path or URL of the table."""
        return f"{self.root}/{table.path}"

    def open(self, table: TableSpec, version: int | None = None) -> DeltaTable | None:
        """The table at `version`, by default the newest, or None if it does not exist.

        Raises ``LakeError`` if it is damaged.
        """
        return self.open_path(table.path, version)

    def open_path(self, path: str, version: int | None = None) -> DeltaTable | None:
        """The table at `path` below the root, at `version` or its newest, or None if it does not exist.

        Raises ``LakeError`` if it is damaged.
        """
        with self._table_errors(path):
            try:
                return DeltaTable(f"{self.root}/{path}", version, self.options or None)
            except TableNotFoundError:
                return None

    def create(self, table: TableSpec, dimension: int | None = None) -> DeltaTable:
        """Create the table unless it exists, and return it. Safe when several processes do so at once.

        `dimension`, for embeddings, becomes a table constraint: vectors of another length can't be committed. Raises
        ``LakeError`` if the table can't be created or belongs to another corpus.
        """
        self.require_writable()
        configuration = {
            "delta.dataSkippingStatsColumns": _STATS[table.kind],
            **table.properties,
            **self.owner.properties,
        }
        if table.settings:
            configuration[_SETTINGS_PROPERTY] = table.settings
        if dimension is not None:
            # Constraints need writer version 3. Setting them at creation avoids a race with other writers.
            configuration |= {
                "delta.constraints.dimension": f"cardinality(embedding) = {dimension}",
                "delta.minWriterVersion": "3",
                _DIMENSION_PROPERTY: str(dimension),
            }
        with lake_errors(f"the table {table.path!r} can't be created", self.root):
            if has_orphaned_data(self.storage, table.path):
                raise LakeError(
                    f"the table {self.uri(table)!r} has data files and no _delta_log, so it can't be read; restore its "
                    "_delta_log from a backup, or move the folder away and sync, which rebuilds the table"
                )
            made = DeltaTable.create(
                self.uri(table),
                self.full(table).schema,
                mode="ignore",
                partition_by=["partition_key"],
                name=table.path,
                configuration=configuration,
                storage_options=self.options or None,
                raise_if_key_not_exists=False,
            )
        self._check_owner_of(made)  # another corpus may have created it at the same time
        return made

    @contextlib.contextmanager
    def _table_errors(self, path: str) -> Iterator[None]:
        """Turn errors about a table into ``LakeError``, with a diagnosis if its log is damaged."""
        try:
            with lake_errors(f"the table {path!r} can't be opened", self.root):
                yield
        except LakeError as error:
            with contextlib.suppress(OSError, BaseError):  # if the diagnosis fails, report the original error
                if problem := diagnose_log(self.storage, path):
                    raise self._damaged(path, problem) from error
            raise

    def _damaged(self, path: str, problem: str) -> LakeError:
        return LakeError(f"the table {path!r} in the lake {self.root!r} is damaged: {problem}")

    def check_readable(self, embeddings: TableSpec) -> None:
        """Raise ``LakeError`` if the lake belongs to another corpus, or a table is damaged or not the expected one."""
        self.check_owner()
        self.check_tables(embeddings)

    def check_usable(self, embeddings: TableSpec) -> None:
        """Check the lake before a run, so that problems are reported once instead of once per partition.

        Also records the owner and adds new columns to tables created by older versions. Raises ``LakeError`` if a local
        lake is not writable, the lake belongs to another corpus, or a table is damaged or not the expected one.
        """
        self.require_writable()
        self._check_writable()
        self.check_readable(embeddings)
        if self.owner.source:
            self._claim()
        for table in (RAW, REJECTED, CHUNK_TABLE, embeddings):
            self._add_columns(table)
        self._keep_settings(embeddings)

    def check_tables(self, embeddings: TableSpec) -> None:
        """Raise ``LakeError`` if a table lacks columns, has an empty commit, or is of another embedding space."""
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
        """Raise ``LakeError`` if a required column is missing or a foreign one can't be null.

        Nullable foreign columns are kept, null in the rows we write; our own nullable columns can still be added.
        """
        stored, ours = columns_of(delta), table.schema
        types = {column.name: column.type for column in delta.schema().fields}
        for column in self.full(table).extra:
            if types.get(column.name) not in (None, wanted := Field.from_arrow(column).type):
                raise SettingsError(
                    f"EMBED_METADATA must not change the type of a column, but {column.name} of the table "
                    f"{self.uri(table)!r} has {types[column.name]} in place of {wanted}; give the field another name"
                )
        lost = [column.name for column in ours if column.name not in stored.names and not column.nullable]
        foreign = [column.name for column in stored if column.name not in ours.names and not column.nullable]
        if lost or foreign:
            what = f"lost {', '.join(lost)}" if lost else f"gained {', '.join(foreign)}, which can't be null"
            raise LakeError(
                f"the table {self.uri(table)!r} must have the columns {', '.join(ours.names)}; it has {what}; restore "
                "an older version of it, or move the folder away and sync"
            )

    def _add_columns(self, table: TableSpec) -> None:
        """Add columns that a table created by an older version lacks. Changes only metadata."""
        delta = self.open(table)
        if delta is None:
            return

        def add_missing() -> None:
            known = columns_of(delta).names
            added = [column for column in self.full(table).added if column.name not in known]
            if added:
                delta.alter.add_columns([Field.from_arrow(column) for column in added])

        self._alter(delta, f"the columns of {table.path!r} can't be added", add_missing)

    def _keep_settings(self, table: TableSpec) -> None:
        """Record the settings of a space again if they changed, or an older version did not record them."""
        delta = self.open(table)
        if delta is None or settings_of(delta) == table.settings:
            return
        change = functools.partial(delta.alter.set_table_properties, {_SETTINGS_PROPERTY: table.settings}, False)
        self._alter(delta, f"the settings of {table.path!r} can't be recorded", change)

    def check_owner(self) -> None:
        """Raise ``LakeError`` if the lake belongs to another corpus."""
        for table in _OWNER_TABLES:
            if (delta := self.open(table)) is not None:
                self._check_owner_of(delta)

    def _check_owner_of(self, delta: DeltaTable) -> None:
        owner = Owner.of(delta)
        if self.owner.conflicts_with(owner):
            raise LakeError(
                f"a lake holds one corpus, {self.root!r} has that of {owner}, got {self.owner}: they would replace "
                "each other's partitions; set EMBED_LAKE to another lake or, if these are the same documents in a "
                "new location, run 'embed-assets adopt'"
            )

    def adopt(self) -> bool:
        """Record the corpus of the settings as the lake's owner.

        Returns False if it already was, or if there are no tables yet. Raises ``LakeError``.
        """
        self.require_writable()
        tables = [delta for table in _OWNER_TABLES if (delta := self.open(table)) is not None]
        foreign = [delta for delta in tables if Owner.of(delta) != self.owner]
        for delta in foreign:
            self._set_owner(delta)
        return bool(foreign)

    def _claim(self) -> None:
        """Record the owner in a lake created before version 0.2, whose tables have no source recorded.

        Raises ``LakeError`` if another corpus did so first.
        """
        for table in _OWNER_TABLES:
            if (delta := self.open(table)) is not None:
                self._check_owner_of(delta)
                if not Owner.of(delta).source:
                    self._set_owner(delta, functools.partial(self._check_owner_of, delta))

    def _set_owner(self, delta: DeltaTable, check: Callable[[], None] = lambda: None) -> None:
        properties = dict(self.owner.properties)

        def change() -> None:
            check()
            delta.alter.set_table_properties(properties, raise_if_not_exists=False)

        self._alter(delta, "the lake's owner can't be recorded", change)

    def _alter(self, delta: DeltaTable, problem: str, change: Callable[[], None]) -> None:
        """Change a table's metadata, retrying when another process committed to it at the same time."""
        self.require_writable()
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
        """Sorted names of the embedding spaces that have a table. Raises ``LakeError``."""
        with lake_errors("the embedding spaces can't be listed", self.root):
            return self.storage.folders("embeddings")

    @cached_property
    def storage(self) -> Storage:
        """The lake's plain files, beside the tables."""
        return Storage(self.root, self.options)


def columns_of(table: DeltaTable) -> pa.Schema:
    """Arrow schema of a table as stored, including columns added by others."""
    return pa.schema(table.schema().to_arrow())


def dimension_of(table: DeltaTable) -> int | None:
    """Vector length of an embeddings table; None if the table does not record it."""
    value = table.metadata().configuration.get(_DIMENSION_PROPERTY)
    return int(value) if value is not None else None


def settings_of(table: DeltaTable) -> str:
    """The settings recorded in an embeddings table, as JSON; empty if an older version created it."""
    return str(table.metadata().configuration.get(_SETTINGS_PROPERTY, ""))


@contextlib.contextmanager
def lake_errors(what: str, root: str) -> Iterator[None]:
    """Turn errors of delta-rs, obstore and Arrow into a ``LakeError`` of one line that starts with `what`.

    Errors of remote storage are retryable, those of a local disk are not.
    """
    try:
        yield
    except (DeltaError, BaseError, OSError, pa.ArrowException) as error:
        # The libraries print a colored tree of causes, and the helpful one may be on any line.
        plain = _TREE_MARKUP.sub(" ", str(error).partition("Debug source:")[0])
        reason = " ".join(plain.split())[:600] or type(error).__name__
        full = any(sign in str(error) for sign in _DISK_FULL)
        advice = f"free some space in {root!r}" if full else f"check EMBED_LAKE={root!r} and its permissions"
        raise LakeError(f"{what}: {reason}; {advice}", is_retryable=local_path(root) is None) from error
