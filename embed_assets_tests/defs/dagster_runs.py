"""Runs, events and states in real Dagster instances, for the tests of `defs`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dagster as dg
from dagster._core.asset_graph_view.asset_graph_view import AssetGraphView
from dagster._core.definitions.data_version import CachingStaleStatusResolver

from embed_assets.definitions import build_definitions
from embed_assets.defs.names import ASSETS, SOURCE
from embed_assets.defs.staleness import load_history, partition_statuses
from embed_assets.settings import load_settings
from embed_assets.stages.pipeline import Pipeline

DAGSTER = Path(sys.executable).parent / "dagster"
RANGE = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"


def definitions() -> dg.Definitions:
    return build_definitions(load_settings())


def materialize(*arguments: str, select: str = "*") -> subprocess.CompletedProcess[str]:
    """Run `dagster asset materialize` as a user does."""
    command = [str(DAGSTER), "asset", "materialize", "-m", "embed_assets.definitions", "--select", select, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(instance: dg.DagsterInstance, key: str, *assets: str) -> dg.ExecuteInProcessResult:
    """Run one partition in this process, with all checks of its assets."""
    job = definitions().resolve_implicit_global_asset_job_def()
    selection = [dg.AssetKey(asset) for asset in assets] or None
    return job.execute_in_process(instance=instance, partition_key=key, asset_selection=selection, raise_on_error=False)


def run_range(instance: dg.DagsterInstance, first: str, last: str) -> dg.ExecuteInProcessResult:
    """Run a range of partitions."""
    job = definitions().resolve_implicit_global_asset_job_def()
    tags = dict(zip(RANGE, (first, last), strict=True))
    return job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)


def latest(instance: dg.DagsterInstance, asset: str, key: str) -> dg.AssetMaterialization:
    record = instance.get_latest_data_version_record(dg.AssetKey(asset), partition_key=key)
    assert record is not None and record.asset_materialization is not None
    return record.asset_materialization


def events(instance: dg.DagsterInstance, asset: str) -> int:
    return len(instance.fetch_materializations(dg.AssetKey(asset), limit=1000).records)


def dagster_says(instance: dg.DagsterInstance, *keys: str) -> dict[str, dict[str, str]]:
    """States of the assets by Dagster's own resolver."""
    view = AssetGraphView.for_test(definitions(), instance)
    resolver = CachingStaleStatusResolver(instance=instance, asset_graph=view.asset_graph, loading_context=view)
    return {
        key: {asset: resolver.get_status(dg.AssetKey(asset), key).value.lower() for asset in ASSETS} for key in keys
    }


def we_say(instance: dg.DagsterInstance, *keys: str) -> dict[str, dict[str, str]]:
    """States of the assets by our own rule, from the recorded events."""
    pipeline = Pipeline.from_settings(load_settings())
    history = load_history(instance, pipeline)
    states = {k: partition_statuses(history, k, history.version(SOURCE, k), pipeline.code_versions) for k in keys}
    return {key: {asset: found[asset].state for asset in ASSETS} for key, found in states.items()}
