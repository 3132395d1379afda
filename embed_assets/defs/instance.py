"""The one Dagster instance that the UI, the command line and CI share."""

from __future__ import annotations

import os
from pathlib import Path

from dagster import DagsterInstance

from embed_assets.errors import SettingsError


def open_instance() -> DagsterInstance:
    """The instance of DAGSTER_HOME, or else of the ``dagster.yaml`` in the current folder.

    Raises ``SettingsError`` when there is neither: a temporary instance would forget everything.
    """
    if os.environ.get("DAGSTER_HOME"):
        return DagsterInstance.get()
    if not Path("dagster.yaml").is_file():
        raise SettingsError(
            f"there must be a dagster.yaml in the current folder or a DAGSTER_HOME, in {str(Path.cwd())!r} is neither; "
            "change to the project's folder or copy its dagster.yaml here"
        )
    return DagsterInstance.from_config(str(Path.cwd()))
