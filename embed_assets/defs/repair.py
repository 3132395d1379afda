"""Making damaged partitions stale, so that the next sync makes their rows anew."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg
from dagster import DagsterInstance

from embed_assets.defs.dagster_internals import CODE_VERSION_TAG, DATA_VERSION_TAG, USER_PROVIDED_TAG
from embed_assets.defs.names import Names
from embed_assets.defs.staleness import REPAIR_CODE_VERSION
from embed_assets.lake.verify import Gaps


def mark_for_repair(instance: DagsterInstance, names: Names, damaged: Mapping[str, Gaps]) -> None:
    """Record that what is damaged of these partitions has a state that no code makes."""
    for key, gaps in damaged.items():
        for asset in gaps.assets:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    asset_key=names.key(asset),
                    partition=key,
                    description="verify found damaged rows; the next sync makes them anew",
                    tags={
                        DATA_VERSION_TAG: "damaged",
                        USER_PROVIDED_TAG: "true",
                        CODE_VERSION_TAG: REPAIR_CODE_VERSION,
                    },
                )
            )
