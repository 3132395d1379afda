"""Dagster's SQLite storage: only one process creates its databases, and they stay open while many events are written.

Dagster creates the databases when it first opens them. Processes that do so at the same time corrupt each other's work,
sometimes permanently: https://github.com/dagster-io/dagster/issues/27390. `dagster.yaml` names this module's storage,
so that every process that opens the instance (commands, webserver, daemon, code servers, runs) takes the lock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import dagster as dg
from dagster import DagsterInstance
from filelock import FileLock
from sqlalchemy import create_engine
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import QueuePool

from embed_assets.defs.dagster_internals import (
    INDEX_SHARD,
    LAST_UNSTAMPED_REVISION,
    ConfigurableClassData,
    DagsterSqliteStorage,
    InstanceRef,
    LegacyEventLogStorage,
    SqliteEventLogStorage,
    planned_checks_in_parts,
)

_DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
_LOCK_SECONDS = 120.0
"""Creating the databases takes about a second; a process that holds the lock this long hangs."""
_BUSY_SECONDS = 30.0
"""How long to wait for SQLite's own lock on a database: shorter fails beside a busy writer, longer delays an error."""


class KeptOpenEventLog(SqliteEventLogStorage):
    """Dagster's event log in SQLite, whose databases stay open between events within `kept_open`.

    Dagster opens and closes them, and compiles its SQL, for each event, which takes half of the 11 ms of one. Other
    processes, such as the webserver, go on like that: what they read may be replaced under them.
    """

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self._engines: dict[str, Engine] = {}
        """Of the index and of the newest run."""
        self._keepers = 0

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
        """Keep open what is opened inside. Can be nested, and entered by several threads."""
        with self._db_lock:
            self._keepers += 1
        try:
            yield
        finally:
            with self._db_lock:
                self._keepers -= 1
                self._close_unless_kept()

    def store_asset_check_event(self, event: dg.EventLogEntry, event_id: int | None) -> None:
        """Index an event of a check.

        Dagster stores a planned check as a row per partition, each with the event, which names all of the run's
        partitions: 6 GB, and 2 GB of memory, for a run over 10,000. https://github.com/dagster-io/dagster/pull/33231
        """
        for part in planned_checks_in_parts(event):
            super().store_asset_check_event(part, event_id)

    @contextlib.contextmanager
    def _connect(self, shard: str) -> Iterator[Connection]:
        with self._db_lock:
            try:
                with self._engine(shard).connect() as connection, connection.begin():
                    yield connection
            finally:
                self._close_unless_kept()

    def _engine(self, shard: str) -> Engine:
        """The database of a run, or the index. Closes those of other runs."""
        if shard not in self._engines:
            for other in self._engines.keys() - {INDEX_SHARD}:
                if shard != INDEX_SHARD:
                    self._engines.pop(other).dispose()
            arguments = {"timeout": _BUSY_SECONDS, "check_same_thread": False}
            place = self.conn_string_for_shard(shard)
            self._engines[shard] = create_engine(place, poolclass=QueuePool, pool_size=1, connect_args=arguments)
        if shard not in self._initialized_dbs:
            self._initdb(self._engines[shard])
            self._initialized_dbs.add(shard)
        return self._engines[shard]

    def _close_unless_kept(self) -> None:
        while not self._keepers and self._engines:
            self._engines.popitem()[1].dispose()


def kept_open(instance: DagsterInstance) -> contextlib.AbstractContextManager[None]:
    """Keep the databases of the instance's event log open inside, if it is in SQLite and dagster.yaml names ours."""
    log = instance.event_log_storage
    if isinstance(log, LegacyEventLogStorage):
        log = log._storage.event_log_storage
    return log.kept_open() if isinstance(log, KeptOpenEventLog) else contextlib.nullcontext()


class LockedSqliteStorage(DagsterSqliteStorage):
    """Dagster's SQLite storage, which calls `prepare` before it opens its databases."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        prepare(base_dir)
        super().__init__(base_dir, inst_data=inst_data)
        self._event_log_storage = KeptOpenEventLog(self._event_log_storage._base_dir)

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:
        """Create the storage from its section in dagster.yaml, which holds `base_dir`."""
        return cls.from_local(inst_data=inst_data, **config_value)


def prepare_for(ref: InstanceRef) -> None:
    """Call `prepare` for an instance that uses Dagster's own SQLite storage; does nothing for any other storage."""
    data = ref.storage_data
    if data is not None and data.class_name == DagsterSqliteStorage.__name__:
        base_dir = data.config_dict["base_dir"]
        prepare(os.environ[base_dir["env"]] if isinstance(base_dir, dict) else base_dir)


def prepare(base_dir: str) -> None:
    """Create missing databases in `base_dir` and repair existing ones; safe in any number of processes at once.

    New databases are created in a folder inside it and moved into place, so a process that dies leaves no partial one.
    Raises ``OSError`` (``filelock.Timeout`` is one) or ``sqlite3.Error``.
    """
    root = Path(base_dir).absolute()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock", timeout=_LOCK_SECONDS):
        missing = [name for name in _DATABASES if not (root / name).exists()]
        for name in set(_DATABASES).difference(missing):
            _repair_revision(root / name)
        if not missing:
            return
        draft = root / ".new"
        if draft.exists():
            shutil.rmtree(draft)
        DagsterSqliteStorage.from_local(str(draft)).dispose()
        for name in missing:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).replace(root / name)
        shutil.rmtree(draft)


def _repair_revision(database: Path) -> None:
    """Delete the extra schema revision that a database has if two processes created it at the same time.

    One of them found the other's new tables without a revision, took them for old ones and stamped them as such. No
    later process can open a database with two revisions.
    """
    with contextlib.closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return
        revisions = {revision for (revision,) in connection.execute("SELECT version_num FROM alembic_version")}
        if len(revisions) > 1:
            connection.execute("DELETE FROM alembic_version WHERE version_num = ?", (LAST_UNSTAMPED_REVISION,))
