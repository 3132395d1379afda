"""When Dagster starts runs by itself: whenever a partition is missing or stale, whatever the reason and however old.

Dagster's own conditions react to events and forget what they missed: a backlog, a change of code while the daemon
was down, a run that failed. This one looks at the state of every partition at every tick.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass

import dagster as dg
from dagster import AssetKey, DagsterInstance

from embed_assets.corpus.source import has_same_files
from embed_assets.defs.dagster_internals import latest_attempts
from embed_assets.defs.names import ASSETS, AUTOMATED_TAG, CODE_TAG, DEPENDENCIES, LASTING_TAG, SOURCE, Names, code_tag
from embed_assets.defs.staleness import READ_EACH_TIME, History, Status, load_history, partition_statuses
from embed_assets.records import slices
from embed_assets.stages.pipeline import Pipeline

_INTERVAL_SECONDS = 15
_SECONDS_BETWEEN_ATTEMPTS = 3600.0
"""At what may pass: a store that is down, a machine that died."""
_RUNS_PER_QUERY = 500


class StateReader:
    """What is recorded at a tick, read once for the three assets; what did not change is kept for the next."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._tick: object = None
        self._history: History | None = None
        self._attempts: dict[str, dict[str, Attempt]] = {}

    def history(self, instance: DagsterInstance, tick: object) -> History:
        """The partitions' records."""
        if self._history is None or self._tick is not tick:
            self.pipeline = self.pipeline.refreshed()
            self._history = load_history(instance, self.pipeline, earlier=self._history)
            self._tick, self._attempts = tick, {}
        return self._history

    def attempts(self, instance: DagsterInstance, asset: str) -> dict[str, Attempt]:
        """The latest attempt to make each partition of an asset; call `history` first."""
        if asset not in self._attempts:
            names = Names.of(self.pipeline)
            found = latest_attempts(instance, names.key(asset))
            run_ids = sorted({run_id for _, run_id in found.values()})
            records = {
                record.dagster_run.run_id: record
                for part in slices(run_ids, _RUNS_PER_QUERY)
                for record in instance.get_run_records(dg.RunsFilter(run_ids=part))
            }
            self._attempts[asset] = {
                key: Attempt(storage_id, run_id, records.get(run_id)) for key, (storage_id, run_id) in found.items()
            }
        return self._attempts[asset]

    def statuses(self, history: History, key: str) -> dict[str, Status]:
        """The three assets' states, by what was observed last of the source."""
        version = history.version(SOURCE, key)
        return partition_statuses(history, key, version, self.pipeline.code_versions)


@dataclass(frozen=True, slots=True)
class Attempt:
    """The latest run that was to make a partition."""

    storage_id: int
    """Of the event that says so."""
    run_id: str
    run: dg.RunRecord | None

    def is_worth_another(self, status: Status, code: str, now: float) -> bool:
        """Whether to try again although nothing changed since.

        Not what a run gave up for good, or a person stopped, and for an hour not what failed otherwise. Nor what a run
        looked at and left alone: it knew better. But what such a run made and was lost since; and after an hour what
        must be read to know whether it changed.
        """
        if self.run is None:
            return True
        run = self.run.dagster_run
        if run.tags.get(CODE_TAG, code) != code:
            return True
        is_long_ago = now - (self.run.end_time or self.run.update_timestamp.timestamp()) > _SECONDS_BETWEEN_ATTEMPTS
        if run.status == dg.DagsterRunStatus.SUCCESS:
            return status.state == "missing" or (READ_EACH_TIME in status.reasons and is_long_ago)
        if run.status == dg.DagsterRunStatus.CANCELED or LASTING_TAG in run.tags:
            return False
        return is_long_ago


class _PartitionCondition(dg.AutomationCondition[AssetKey]):
    """True for the partitions of which `holds` is."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader

    def evaluate(self, context: dg.AutomationContext[AssetKey]) -> dg.AutomationResult[AssetKey]:
        """Among the candidates, those for which it holds."""
        view, asset = context.asset_graph_view, context.key.path[-1]
        history = self._reader.history(view.instance, view)
        candidates = context.candidate_subset.expensively_compute_partition_keys()
        keys = {key for key in candidates if self.holds(view.instance, history, asset, key)}
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection_with_partition_keys(keys))

    @abstractmethod
    def holds(self, instance: DagsterInstance, history: History, asset: str, key: str) -> bool:
        """Whether it is true of a partition."""


class Unsynced(_PartitionCondition):
    """True for partitions that are missing or stale, or will be once a changed document is read."""

    @property
    def name(self) -> str:
        """What the UI calls it."""
        return "unsynced"

    @property
    def description(self) -> str:
        """What the UI says of it."""
        return "missing or stale, or made from documents that have changed"

    def holds(self, instance: DagsterInstance, history: History, asset: str, key: str) -> bool:
        """Not fresh, or not for long."""
        statuses = self._reader.statuses(history, key)
        if statuses[asset].state != "fresh":
            return True
        is_reading_due = asset != "raw_documents" and statuses["raw_documents"].state != "fresh"
        return is_reading_due and _has_new_documents(history, key)


def _has_new_documents(history: History, key: str) -> bool:
    """Files came, went or changed their sizes, so that the documents will differ: all three assets go in one run.

    Where only times moved, the documents are read first, and nothing follows if they are the same.
    """
    record, version = history.record("raw_documents", key), history.version(SOURCE, key)
    if record is None or version is None:
        return False
    return not has_same_files(record.input_versions.get(SOURCE, ""), version)


class WorthAnAttempt(_PartitionCondition):
    """True for partitions that were not tried yet with this code and this data, or may be tried again."""

    @property
    def name(self) -> str:
        """What the UI calls it."""
        return "worth_an_attempt"

    @property
    def description(self) -> str:
        """What the UI says of it."""
        return "code or data changed since the latest attempt, or it failed an hour ago for a reason that may pass"

    def holds(self, instance: DagsterInstance, history: History, asset: str, key: str) -> bool:
        """Something is new since the latest attempt, or it is worth another."""
        attempt = self._reader.attempts(instance, asset).get(key)
        if attempt is None:
            return True
        records = (history.record(a, key) for a in (SOURCE, asset, *DEPENDENCIES[asset]))
        # What the attempt itself recorded is no news.
        if any(r is not None and r.storage_id > attempt.storage_id and r.run_id != attempt.run_id for r in records):
            return True
        status = self._reader.statuses(history, key)[asset]
        return attempt.is_worth_another(status, code_tag(self._reader.pipeline), time.time())


def build_condition(pipeline: Pipeline) -> dg.AutomationCondition[AssetKey]:
    """The condition of the three assets: unsynced, not under way, and not tried in vain on the same code and data."""
    condition, names, reader = dg.AutomationCondition, Names.of(pipeline), StateReader(pipeline)
    ours = dg.AssetSelection.assets(*(names.key(asset) for asset in ASSETS))
    return (
        Unsynced(reader)
        & ~condition.in_progress()
        & ~condition.any_deps_in_progress().allow(ours)
        & ~condition.any_deps_missing().allow(ours)
        & WorthAnAttempt(reader)
    ).with_label("unsynced: missing or stale, not under way, not tried in vain on the same code and data")


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
