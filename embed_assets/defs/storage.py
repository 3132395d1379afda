"""Dagster's records in SQLite, made for the first time by one process alone.

Dagster makes its databases when it first opens them, and processes that do so at once break each other's work, some
of it for good (https://github.com/dagster-io/dagster/issues/27390). `dagster.yaml` names the storage in
this module, so that all who open the instance (commands, webserver, daemon, code servers, runs) take turns.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from embed_assets.defs.dagster_internals import (
    LAST_UNSTAMPED_REVISION,
    ConfigurableClassData,
    DagsterSqliteStorage,
    InstanceRef,
)

_DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
_LOCK_SECONDS = 120.0
"""Making the databases takes a second; a process that holds the lock longer hangs."""
_BUSY_SECONDS = 30.0


class LockedSqliteStorage(DagsterSqliteStorage):
    """Dagster's SQLite storage, with `prepare` before it is opened."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        prepare(base_dir)
        super().__init__(base_dir, inst_data=inst_data)

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:
        """As Dagster makes it from dagster.yaml: of `base_dir`."""
        return cls.from_local(inst_data=inst_data, **config_value)


def prepare_for(ref: InstanceRef) -> None:
    """`prepare` what an instance keeps its records in, where that is Dagster's own SQLite storage."""
    data = ref.storage_data
    if data is not None and data.class_name == DagsterSqliteStorage.__name__:
        base_dir = data.config_dict["base_dir"]
        prepare(os.environ[base_dir["env"]] if isinstance(base_dir, dict) else base_dir)


def prepare(base_dir: str) -> None:
    """See to it that the databases in `base_dir` are there and whole; safe in any number of processes at once.

    New ones are made beside it and moved to their place: a process that dies meanwhile leaves nothing half done.
    Raises OSError (or ``filelock.Timeout``, which is one) and ``sqlite3.Error``.
    """
    root = Path(base_dir).absolute()
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock"), timeout=_LOCK_SECONDS):
        missing = [name for name in _DATABASES if not (root / name).exists()]
        for name in set(_DATABASES).difference(missing):
            _mend(root / name)
        if not missing:
            return
        draft = root.with_name(f".{root.name}.new")
        if draft.exists():
            shutil.rmtree(draft)
        DagsterSqliteStorage.from_local(str(draft)).dispose()
        for name in missing:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).replace(root / name)
        shutil.rmtree(draft)


def _mend(database: Path) -> None:
    """Drop the second revision that processes gave the database which made it at once.

    One of them saw the other's new tables without a revision yet, took them for old ones and stamped them so; both
    stamps together keep every later process from opening it.
    """
    with contextlib.closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return
        revisions = {revision for (revision,) in connection.execute("SELECT version_num FROM alembic_version")}
        if len(revisions) > 1:
            connection.execute("DELETE FROM alembic_version WHERE version_num = ?", (LAST_UNSTAMPED_REVISION,))
