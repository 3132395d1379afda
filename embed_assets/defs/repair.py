"""Marks damaged partitions as stale, so that the next sync rebuilds their rows."""

from __future__ import annotations

from collections.abc import Mapping

from dagster import DagsterInstance

from embed_assets.defs.names import Names
from embed_assets.defs.recording import damage
from embed_assets.lake.verify import Gaps


def mark_for_repair(instance: DagsterInstance, names: Names, damaged: Mapping[str, Gaps]) -> None:
    """Record the damaged assets of these partitions with a code version that no code has; `damaged` is by key."""
    for key, gaps in damaged.items():
        for asset in gaps.assets:
            instance.report_runless_asset_event(damage(names, asset, key))
