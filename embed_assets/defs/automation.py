"""The automation condition that requests every partition that is missing or stale, whatever the reason.

Dagster's built-in conditions react to events and lose those that they miss: a backlog, a code change while the daemon
was down, a failed run (https://github.com/dagster-io/dagster/issues/34067). This condition evaluates the state of every
partition at every tick.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence, Set
from dataclasses import dataclass

import dagster as dg
from dagster import AssetKey, DagsterInstance

from embed_assets.corpus.source import has_same_files
from embed_assets.defs.dagster_internals import latest_attempts
from embed_assets.defs.generations import Survey
from embed_assets.defs.names import (
    ACTIVE,
    ASSETS,
    AUTOMATED_TAG,
    CODE_TAG,
    DEPENDENCIES,
    PERMANENT_FAILURE_TAG,
    SOURCE,
    Names,
    code_tag,
)
from embed_assets.defs.ranges import run_ranges
from embed_assets.defs.staleness import READ_EACH_TIME, History, Status, load_history, partition_statuses
from embed_assets.records import slices
from embed_assets.stages.pipeline import Pipeline

_INTERVAL_SECONDS = 15
"""Minimum time between ticks: with 10,000 unchanged partitions, one takes under a second on SQLite."""
_SECONDS_BETWEEN_ATTEMPTS = 3600.0
"""Delay before a run is retried after a transient failure (a store that is down, a machine that died): shorter recovers
sooner, longer starts fewer runs that fail again."""
_MOST_RANGES = 4
"""Ranges of adjacent partitions that are left as they are: so few runs are not worth showing others as requested."""
_RUNS_PER_QUERY = 500
"""Old builds of SQLite take no more than 999 variables in a statement."""


class StateReader:
    """Reads the recorded state once per tick for all three assets, and keeps unchanged records for the next tick."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._tick: object = None
        self._history: History | None = None
        self._attempts: dict[str, dict[str, Attempt]] = {}

    def history(self, instance: DagsterInstance, tick: object) -> History:
        """The history of all partitions at this tick; `tick` is any object that identifies the tick."""
        if self._history is None or self._tick is not tick:
            self.pipeline = self.pipeline.refreshed()
            self._history = load_history(instance, self.pipeline, earlier=self._history)
            self._tick, self._attempts = tick, {}
        return self._history

    def attempts(self, instance: DagsterInstance, asset: str) -> dict[str, Attempt]:
        """The latest attempt to materialize each partition of an asset, by key; call `history` first."""
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
        """The status of each of the three assets, judged by the latest observation of the source."""
        version = history.version(SOURCE, key)
        return partition_statuses(history, key, version, self.pipeline.code_versions)


@dataclass(frozen=True, slots=True)
class Attempt:
    """The latest run that planned to materialize a partition of an asset."""

    storage_id: int
    """Storage id of the event that recorded the plan."""
    run_id: str
    run: dg.RunRecord | None
    """None if the run was deleted."""

    def may_retry(self, status: Status, code: str, now: float) -> bool:
        """Whether to request the partition again although nothing changed since this attempt.

        False after a permanent failure or a canceled run. After any other failure, True once an hour has passed.
        After a successful run, True only if rows went missing since, or hourly for a source that must be read to
        detect changes: whatever else still looks stale, that run decided to leave alone. Always True if `code` differs
        from the code of the run, or the run was deleted. `now` is in seconds since 1970.
        """
        if self.run is None:
            return True
        run = self.run.dagster_run
        if run.tags.get(CODE_TAG, code) != code:
            return True
        is_long_ago = now - (self.run.end_time or self.run.update_timestamp.timestamp()) > _SECONDS_BETWEEN_ATTEMPTS
        if run.status == dg.DagsterRunStatus.SUCCESS:
            return status.state == "missing" or (READ_EACH_TIME in status.reasons and is_long_ago)
        if run.status == dg.DagsterRunStatus.CANCELED or PERMANENT_FAILURE_TAG in run.tags:
            return False
        return is_long_ago


class _PartitionCondition(dg.AutomationCondition[AssetKey]):
    """Base of conditions that are decided partition by partition, by `holds`."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader

    def evaluate(self, context: dg.AutomationContext[AssetKey]) -> dg.AutomationResult[AssetKey]:
        """Select the candidate partitions for which the condition holds."""
        view, asset = context.asset_graph_view, context.key.path[-1]
        history = self._reader.history(view.instance, view)
        candidates = context.candidate_subset.expensively_compute_partition_keys()
        keys = {key for key in candidates if self.holds(view.instance, history, asset, key)}
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection_with_partition_keys(keys))

    @abstractmethod
    def holds(self, instance: DagsterInstance, history: History, asset: str, key: str) -> bool:
        """Whether the condition is true of one partition of an asset."""


class Unsynced(_PartitionCondition):
    """True for partitions that are missing or stale, or will be once changed documents are read."""

    @property
    def name(self) -> str:
        """Name of the condition in the UI."""
        return "unsynced"

    @property
    def description(self) -> str:
        """Description of the condition in the UI."""
        return "missing or stale, or made from documents that have changed"

    def holds(self, instance: DagsterInstance, history: History, asset: str, key: str) -> bool:
        """Whether the partition is not fresh, or will not be once its documents are read again."""
        statuses = self._reader.statuses(history, key)
        if statuses[asset].state != "fresh":
            return True
        # Spaces that are kept up to date besides the configured one are part of the embeddings.
        if asset == "embeddings" and any(s.state != "fresh" for a, s in statuses.items() if a not in ASSETS):
            return True
        is_reading_due = asset != "raw_documents" and statuses["raw_documents"].state != "fresh"
        return is_reading_due and _has_new_documents(history, key)


def _has_new_documents(history: History, key: str) -> bool:
    """Whether files were added, removed or resized, so that the documents must differ: all three assets run together.

    If only modification times changed, raw_documents runs alone, and nothing follows if the text is the same.
    """
    record, version = history.record("raw_documents", key), history.version(SOURCE, key)
    if record is None or version is None:
        return False
    return not has_same_files(record.input_versions.get(SOURCE, ""), version)


class WorthAnAttempt(_PartitionCondition):
    """True for partitions not yet attempted with the current code and data, and for those that may be retried."""

    @property
    def name(self) -> str:
        """Name of the condition in the UI."""
        return "worth_an_attempt"

    @property
    def description(self) -> str:
        """Description of the condition in the UI."""
        return "code or data changed since the latest attempt, or it failed over an hour ago with a retryable error"

    def holds(self, instance: DagsterInstance, history: History, asset: str, key: str) -> bool:
        """Whether something was recorded since the latest attempt, or the attempt may be retried."""
        attempt = self._reader.attempts(instance, asset).get(key)
        if attempt is None:
            return True
        records = (history.record(a, key) for a in (SOURCE, asset, *DEPENDENCIES[asset]))
        # Events that the attempt itself recorded are not a change.
        if any(r is not None and r.storage_id > attempt.storage_id and r.run_id != attempt.run_id for r in records):
            return True
        status = self._reader.statuses(history, key)[asset]
        return attempt.may_retry(status, code_tag(self._reader.pipeline), time.time())


class InFewRuns(dg.AutomationCondition[AssetKey]):
    """Adds fresh partitions to many scattered ones, so that Dagster makes a few runs of them.

    Dagster starts a run, with a process and a model, for each range of adjacent partitions. Runs pass over fresh ones.
    """

    def __init__(self, operand: dg.AutomationCondition[AssetKey], reader: StateReader) -> None:
        self._operand, self._reader = operand, reader

    @property
    def name(self) -> str:
        """Name of the condition in the UI."""
        return "in_few_runs"

    @property
    def description(self) -> str:
        """Description of the condition in the UI."""
        return f"as below; if that takes more than {_MOST_RANGES} runs, also the fresh partitions in between"

    @property
    def children(self) -> Sequence[dg.AutomationCondition[AssetKey]]:
        """The condition of the partitions that are due."""
        return [self._operand]

    async def evaluate(self, context: dg.AutomationContext[AssetKey]) -> dg.AutomationResult[AssetKey]:  # type: ignore[override]
        """Select the partitions that are due, and fresh ones between them."""
        below = context.for_child_condition(self._operand, [0], context.candidate_subset)
        result = await below.evaluate_async()
        due = result.true_subset.expensively_compute_partition_keys()
        keys = due | self._between(context, due) if len(due) > _MOST_RANGES else due
        wanted = context.candidate_subset.compute_intersection_with_partition_keys(set(keys))
        return dg.AutomationResult(context, wanted, child_results=[result])

    def _between(self, context: dg.AutomationContext[AssetKey], due: Set[str]) -> set[str]:
        """The fresh partitions to add; none if there are few ranges without them."""
        view = context.asset_graph_view
        history = self._reader.history(view.instance, view)
        registered = view.instance.get_dynamic_partitions(Names.of(self._reader.pipeline).partitions_name)
        if len(list(run_ranges(registered, due, set()))) <= _MOST_RANGES:
            return set()
        statuses = {key: self._reader.statuses(history, key) for key in registered if key not in due}
        fresh = {key for key, found in statuses.items() if all(s.state == "fresh" for s in found.values())}
        place = {key: i for i, key in enumerate(registered)}
        ranges = run_ranges(registered, due, fresh)
        return {key for first, last, _ in ranges for key in registered[place[first] : place[last] + 1]} - due


def build_condition(pipeline: Pipeline) -> dg.AutomationCondition[AssetKey]:
    """Build the assets' condition: unsynced, not in progress, and not already attempted on the same code and data."""
    condition, names, reader = dg.AutomationCondition, Names.of(pipeline), StateReader(pipeline)
    own_assets = dg.AssetSelection.assets(*(names.key(asset) for asset in ASSETS))
    due = (
        Unsynced(reader)
        & ~condition.in_progress()
        & ~condition.any_deps_in_progress().allow(own_assets)
        & ~condition.any_deps_missing().allow(own_assets)
        & WorthAnAttempt(reader)
    ).with_label("unsynced: missing or stale, not in progress, not already attempted on the same code and data")
    return InFewRuns(due, reader)


class Promotable(dg.AutomationCondition[AssetKey]):
    """True while the space of the settings is complete and not the active one."""

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader

    @property
    def name(self) -> str:
        """Name of the condition in the UI."""
        return "promotable"

    @property
    def description(self) -> str:
        """Description of the condition in the UI."""
        return "the space of the settings is complete, and readers use another one"

    def evaluate(self, context: dg.AutomationContext[AssetKey]) -> dg.AutomationResult[AssetKey]:
        """Select the asset if the condition holds."""
        view = context.asset_graph_view
        history = self._reader.history(view.instance, view)
        survey = Survey.over(view.instance, self._reader.pipeline, history)
        is_true = survey.promotable is not None
        return dg.AutomationResult(context, context.candidate_subset if is_true else context.get_empty_subset())


def build_promotion_condition(pipeline: Pipeline) -> dg.AutomationCondition[AssetKey]:
    """Build the condition that promotes a space once when it is complete: not again and again if a gate fails."""
    return (Promotable(StateReader(pipeline)).newly_true() & ~dg.AutomationCondition.in_progress()).with_label(
        "EMBED_PROMOTE=auto: the space of the settings is complete"
    )


def build_automation_sensor(names: Names) -> dg.AutomationConditionSensorDefinition:
    """Build the sensor that evaluates the condition; it is on by default and can be switched off in the UI."""
    return dg.AutomationConditionSensorDefinition(
        name=names.prefixed("unsynced"),
        target=[names.key(asset) for asset in (*ASSETS, ACTIVE)],
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=_INTERVAL_SECONDS,
        use_user_code_server=True,
        run_tags={AUTOMATED_TAG: "true"},
        description="Materializes what is missing or stale: new and changed documents, changed settings, any backlog.",
    )
