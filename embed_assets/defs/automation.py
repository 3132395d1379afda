"""When Dagster starts runs by itself: whenever a partition is missing or stale, whatever the reason and however old.

Dagster's own conditions react to events and forget what they missed: a backlog, a change of code while the daemon
was down, a run that failed. This one looks at the state of every partition at every tick.
"""

from __future__ import annotations

import dagster as dg
from dagster import AssetKey, DagsterInstance

from embed_assets.corpus.source import is_only_touched
from embed_assets.defs.dagster_internals import latest_attempt
from embed_assets.defs.names import ASSETS, AUTOMATED_TAG, CODE_TAG, DEPENDENCIES, SOURCE, Names, code_tag
from embed_assets.defs.staleness import History, Status, load_history, partition_statuses
from embed_assets.stages.pipeline import Pipeline

_INTERVAL_SECONDS = 15


class StateReader:
    """The history as it is at a tick, read once for the three assets; what did not change is kept between ticks."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._history: History | None = None
        self._tick: object = None

    def history(self, instance: DagsterInstance, tick: object) -> History:
        """What is recorded."""
        if self._history is None or self._tick is not tick:
            self._history = load_history(instance, self.pipeline, earlier=self._history)
            self._tick = tick
        return self._history

    def statuses(self, history: History, key: str) -> dict[str, Status]:
        """The three assets' states, by what was observed last of the source."""
        version = history.version(SOURCE, key)
        return partition_statuses(history, key, version, self.pipeline.code_versions)


class Unsynced(dg.AutomationCondition[AssetKey]):
    """True for partitions that are missing or stale, or will be once a changed document is read."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader

    @property
    def name(self) -> str:
        """What the UI calls it."""
        return "unsynced"

    @property
    def description(self) -> str:
        """What the UI says of it."""
        return "missing or stale, or made from documents that have changed"

    def evaluate(self, context: dg.AutomationContext[AssetKey]) -> dg.AutomationResult[AssetKey]:
        """Among the candidates, those to be made."""
        history = self._reader.history(context.asset_graph_view.instance, context.asset_graph_view)
        asset = context.key.path[-1]
        candidates = context.candidate_subset.expensively_compute_partition_keys()
        keys = {key for key in candidates if self._is_unsynced(history, asset, key)}
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection_with_partition_keys(keys))

    def _is_unsynced(self, history: History, asset: str, key: str) -> bool:
        statuses = self._reader.statuses(history, key)
        return statuses[asset].state != "fresh" or (asset != "raw_documents" and _has_new_documents(history, key))


def _has_new_documents(history: History, key: str) -> bool:
    """Files came, went or changed their sizes, so that the documents will differ: all three assets go in one run.

    Where only times moved, the documents are read first, and nothing follows if they are the same.
    """
    record, version = history.record("raw_documents", key), history.version(SOURCE, key)
    if record is None or version is None:
        return False
    return not is_only_touched(record.input_versions.get(SOURCE, ""), version)


class ChangedSinceFailure(dg.AutomationCondition[AssetKey]):
    """True for partitions whose code or inputs are not those of the latest attempt to make them."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader

    @property
    def name(self) -> str:
        """What the UI calls it."""
        return "changed_since_failure"

    @property
    def description(self) -> str:
        """What the UI says of it."""
        return "code or data changed since the attempt that failed"

    def evaluate(self, context: dg.AutomationContext[AssetKey]) -> dg.AutomationResult[AssetKey]:
        """Among the candidates, those worth another attempt."""
        instance = context.asset_graph_view.instance
        history = self._reader.history(instance, context.asset_graph_view)
        candidates = context.candidate_subset.expensively_compute_partition_keys()
        keys = {key for key in candidates if self._is_changed(instance, history, context.key, key)}
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection_with_partition_keys(keys))

    def _is_changed(self, instance: DagsterInstance, history: History, asset: AssetKey, key: str) -> bool:
        attempt = latest_attempt(instance, asset, key)
        if attempt is None:
            return True
        storage_id, run_id = attempt
        run, code = instance.get_run_by_id(run_id), code_tag(self._reader.pipeline)
        if run is not None and run.tags.get(CODE_TAG, code) != code:
            return True
        upstream = {SOURCE, *DEPENDENCIES[asset.path[-1]]}
        records = (history.record(dependency, key) for dependency in upstream)
        # What the attempt itself recorded is no news.
        return any(r is not None and r.storage_id > storage_id and r.run_id != run_id for r in records)


def build_condition(pipeline: Pipeline) -> dg.AutomationCondition[AssetKey]:
    """The condition of the three assets: unsynced, not under way, and not failed on the same code and data."""
    condition, names, reader = dg.AutomationCondition, Names.of(pipeline), StateReader(pipeline)
    ours = dg.AssetSelection.assets(*(names.key(asset) for asset in ASSETS))
    return (
        Unsynced(reader)
        & ~condition.in_progress()
        & ~condition.any_deps_in_progress().allow(ours)
        & ~condition.any_deps_missing().allow(ours)
        & (~condition.execution_failed() | ChangedSinceFailure(reader))
    ).with_label("unsynced: missing or stale, not under way, not failed on the same code and data")


def build_automation_sensor(names: Names) -> dg.AutomationConditionSensorDefinition:
    """The sensor that evaluates the condition. On by default; it can be switched off in the UI."""
    return dg.AutomationConditionSensorDefinition(
        name=names.prefixed("unsynced"),
        target=[names.key(asset) for asset in ASSETS],
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=_INTERVAL_SECONDS,
        use_user_code_server=True,
        run_tags={AUTOMATED_TAG: "true"},
        description="Makes what is missing or stale: new and changed documents, changed settings, and any backlog.",
    )
