"""Telling Dagster what was materialized: one event per asset and partition, with versions, counts and provenance.

A range run has one data version for all its partitions unless the events are logged one by one, as here.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import dagster as dg
from dagster import AssetKey, DagsterInstance

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.specs import DEPENDENCIES
from embed_assets.defs.staleness import CODE_VERSION_TAG, DATA_VERSION_TAG, INPUT_VERSION_TAG

MetadataValue = int | float | str
_POINTER_TAG = "dagster/input_event_pointer/"
_USER_PROVIDED_TAG = "dagster/data_version_is_user_provided"


@dataclass(frozen=True, slots=True)
class Recorder:
    """Logs materializations of the step's assets."""

    instance: DagsterInstance
    log: Callable[[dg.AssetMaterialization | dg.AssetObservation], None]
    """Takes an event into the run's log, or into the instance's outside of runs."""

    def materialized(
        self,
        asset: str,
        key: str,
        data_version: str,
        code_version: str,
        input_versions: Mapping[str, str],
        metadata: Mapping[str, MetadataValue],
    ) -> None:
        """Record that a partition of an asset now has this content, made from these inputs."""
        tags = {DATA_VERSION_TAG: data_version, CODE_VERSION_TAG: code_version, _USER_PROVIDED_TAG: "true"}
        for dependency in DEPENDENCIES[asset]:
            tags[INPUT_VERSION_TAG + dependency] = input_versions.get(dependency, "")
            # Dagster's own staleness compares with the dependency's event that was the latest one.
            record = self.instance.get_latest_data_version_record(AssetKey(dependency), partition_key=key)
            tags[_POINTER_TAG + dependency] = str(record.storage_id) if record else "NULL"
        self.log(dg.AssetMaterialization(asset_key=asset, partition=key, tags=tags, metadata=dict(metadata)))


def observation(partition: SourcePartition) -> dg.AssetObservation:
    """The event that says which files a partition has now."""
    return dg.AssetObservation(
        asset_key="source_files",
        partition=partition.key,
        tags={DATA_VERSION_TAG: partition.version},
        metadata={"files": len(partition.files), "bytes": sum(file.size for file in partition.files)},
    )


def peak_memory_bytes() -> int:
    """The most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
