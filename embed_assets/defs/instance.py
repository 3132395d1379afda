"""Opens the Dagster instance that the UI, the command line and CI share."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from dagster import DagsterInstance, DagsterInvalidInvocationError
from sqlalchemy.exc import SQLAlchemyError

from embed_assets.defs.dagster_internals import InstanceRef
from embed_assets.defs.storage import prepare_for
from embed_assets.errors import SettingsError

_NO_COMPUTE_LOGS = {
    "compute_logs": {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
}
"""Otherwise Dagster redirects this process's stdout and stderr to files and starts tail processes that handle Ctrl-C
themselves; they can also lose a step's last lines: https://github.com/dagster-io/dagster/issues/23336"""


@contextlib.contextmanager
def open_instance() -> Iterator[DagsterInstance]:
    """Open the instance of DAGSTER_HOME, or else of the ``dagster.yaml`` in the current folder.

    Raises ``SettingsError`` if there is neither (a temporary instance would lose all records), or if it can't be
    opened, read or written.
    """
    home = Path(os.environ.get("DAGSTER_HOME") or Path.cwd()).expanduser()
    if os.environ.get("DAGSTER_HOME") and not (home.is_absolute() and home.is_dir()):
        raise SettingsError(f"DAGSTER_HOME must be an existing absolute folder, got {str(home)!r}; set or unset it")
    if not os.environ.get("DAGSTER_HOME") and not (home / "dagster.yaml").is_file():
        raise SettingsError(
            f"there must be a dagster.yaml in the current folder or a DAGSTER_HOME, {str(home)!r} has neither; "
            "change to the project's folder or copy its dagster.yaml here"
        )
    with _opened(home) as instance:
        try:
            yield instance
        except (SQLAlchemyError, sqlite3.Error, DagsterInvalidInvocationError) as error:
            if isinstance(error, DagsterInvalidInvocationError) and "instance migrate" not in str(error):
                raise
            raise SettingsError(
                f"Dagster's instance of {str(home)!r} can't be read or written: {_first_line(error)}; free some space, "
                "or move its folder (.dagster) away and sync: the lake is recorded again, nothing is embedded again"
            ) from error


def _opened(home: Path) -> DagsterInstance:
    try:
        ref = InstanceRef.from_dir(str(home), overrides=_NO_COMPUTE_LOGS)
        prepare_for(ref)
        return DagsterInstance.from_ref(ref)
    except Exception as error:  # from malformed YAML to a database that can't be opened
        raise SettingsError(
            f"Dagster's instance in {str(home)!r} can't be opened: {_first_line(error)}; correct dagster.yaml, or free "
            "some space, or move its folder (.dagster) away and sync: nothing is embedded again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Errors in dagster.yaml have their details after a heading.
    reason = next((line for line in lines if line.startswith("Error 1:")), lines[0] if lines else "")
    return reason or type(error).__name__
