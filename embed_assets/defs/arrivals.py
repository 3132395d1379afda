"""The arrivals sensor: lists the source, registers new partitions and records observations of changed ones.

The sensor launches no runs: its observations make partitions missing or stale, and the automation condition requests
them.
"""
# No `from __future__ import annotations`: Dagster inspects annotations as classes, see
# https://github.com/dagster-io/dagster/issues/26837

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

import dagster as dg
from dagster import DagsterInstance

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.active_asset import show_active
from embed_assets.defs.discovery import KEYS_PER_ADD, list_partitions
from embed_assets.defs.heartbeat import HeartbeatMonitor
from embed_assets.defs.names import SOURCE, Names
from embed_assets.defs.processes import end_dead_runs
from embed_assets.defs.recording import observation
from embed_assets.defs.staleness import Record, load_records
from embed_assets.errors import LakeError, SourceError
from embed_assets.records import slices
from embed_assets.stages.pipeline import Pipeline

_INTERVAL_SECONDS = 10
"""Minimum time between ticks: shorter notices files sooner, longer lists the source less often."""
_EVENTS_PER_TICK = 1_000
"""Observations per tick: one takes Dagster's daemon some milliseconds, so this keeps a tick to seconds. The next
tick continues."""
_LISTING_SHARE = 0.1
"""Largest share of time spent on listing: a source that is slow to list is listed less often."""
_MAX_SETTLE_PERIODS = 10
"""A partition that never settles is observed anyway after this many times SETTLE_SECONDS: more risks never reading it,
fewer reads half-written files more often."""
_EMPTY_SECONDS = 60.0
"""Seconds a source must stay empty before that is recorded: it may be a disk that is not mounted yet."""
_MAX_WAITS = 3
"""Waits of at most SETTLE_SECONDS before an automated run reads files that are still changing: the run holds its
process meanwhile."""


@dataclass(slots=True)
class Cursor:
    """State that one tick passes to the next, stored as the sensor's cursor."""

    listed_at: float = 0.0
    """When the source was last listed, in seconds since 1970."""
    listing_seconds: float = 0.0
    """How long that listing took, in seconds."""
    empty_since: float | None = None
    """When the source was first seen empty, in seconds since 1970; None if it has files."""
    unsettled: dict[str, float] = field(default_factory=dict)
    """Partitions that are still being written to, with the time they were first seen so (seconds since 1970)."""

    @classmethod
    def loads(cls, text: str | None, now: float) -> Self:
        """Parse a stored cursor; one that is missing or malformed gives an empty cursor, so everything is listed again.

        Times after `now` come from a clock that was set back: an `empty_since` or `unsettled` time becomes `now`, and
        the source counts as not listed yet.
        """
        try:
            state = cls(**json.loads(text)) if text else cls()
        except (ValueError, TypeError):
            return cls()
        if state.listed_at > now:
            state.listed_at = 0.0
        if state.empty_since is not None:
            state.empty_since = min(state.empty_since, now)
        state.unsettled = {key: min(since, now) for key, since in state.unsettled.items()}
        return state

    def dumps(self) -> str:
        """Serialize the cursor as JSON for Dagster to store."""
        return json.dumps(asdict(self))


def build_arrivals_sensor(pipeline: Pipeline) -> dg.SensorDefinition:
    """Build the sensor that watches the pipeline's source."""
    known: dict[str, Record] = {}
    monitor = HeartbeatMonitor()

    @dg.sensor(
        name=Names.of(pipeline).prefixed("arrivals"),
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Lists the source, registers new partitions and observes new, changed and emptied ones. "
        "Also marks runs as failed whose process is dead, and shows which space is active.",
    )
    def arrivals(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        for run_id in end_dead_runs(context.instance, monitor):
            context.log.warning(f"run {run_id} is marked as failed: its process is dead")
        try:
            show_active(context.instance, pipeline)
        except LakeError as error:
            context.log.warning(f"the active space could not be shown: {error}")
        return observe_arrivals(context.instance, pipeline, context.cursor, time.time(), known)

    return arrivals


def observe_arrivals(
    instance: DagsterInstance, pipeline: Pipeline, cursor: str | None, now: float, known: dict[str, Record]
) -> dg.SensorResult:
    """Run one tick at the time `now` (seconds since 1970): list the source and observe what changed.

    `known` is a cache of observations by partition: it is read, then updated with this tick's.
    """
    state = Cursor.loads(cursor, now)
    if now - state.listed_at < state.listing_seconds / _LISTING_SHARE:
        return _skip(state, f"listing takes {state.listing_seconds:.1f} s: the source is listed less often")
    started = time.monotonic()
    try:
        partitions = list_partitions(instance, pipeline.corpus.source, Names.of(pipeline))
    except SourceError as error:
        return _skip(state, str(error))
    state.listed_at, state.listing_seconds = now, round(time.monotonic() - started, 3)
    is_empty = bool(partitions) and not any(p.files for p in partitions.values())
    state.empty_since = (state.empty_since or now) if is_empty else None
    if state.empty_since is not None and now - state.empty_since < _EMPTY_SECONDS:
        return _skip(
            state,
            f"the source {pipeline.corpus.source.root!r} is empty: recorded as such after {_EMPTY_SECONDS:.0f} s",
        )
    return _observe(instance, pipeline, partitions, state, now, known)


def _observe(
    instance: DagsterInstance,
    pipeline: Pipeline,
    partitions: Mapping[str, SourcePartition],
    state: Cursor,
    now: float,
    known: dict[str, Record],
) -> dg.SensorResult:
    names = Names.of(pipeline)
    observed = load_records(instance, names, SOURCE, None, known)
    known.clear()
    known.update(observed)
    registered = set(instance.get_dynamic_partitions(names.partitions_name))
    changed = [
        p
        for key, p in partitions.items()
        if key not in registered or key not in observed or observed[key].data_version != p.version
    ]
    settle_seconds = pipeline.settings.settle_seconds
    state.unsettled = {
        p.key: state.unsettled.get(p.key, now) for p in changed if seconds_until_settled(p, settle_seconds, now) > 0
    }
    waiting = {key for key, since in state.unsettled.items() if now - since < _MAX_SETTLE_PERIODS * settle_seconds}
    ready = [p for p in changed if p.key not in waiting]
    batch = ready[:_EVENTS_PER_TICK]
    for partition in batch:
        state.unsettled.pop(partition.key, None)
    added = [p.key for p in batch if p.key not in registered]
    if not batch and waiting:
        return _skip(state, f"{len(waiting)} partitions are still being written to: {', '.join(sorted(waiting)[:5])}")
    if not batch:
        return _skip(state, f"nothing changed in {len(partitions)} partitions")
    return dg.SensorResult(
        dynamic_partitions_requests=[names.partitions.build_add_request(keys) for keys in slices(added, KEYS_PER_ADD)],
        asset_events=[observation(names, p) for p in batch],
        cursor=state.dumps(),
    )


def seconds_until_settled(partition: SourcePartition, settle_seconds: float, now: float) -> float:
    """Seconds until no file of the partition was modified within the last `settle_seconds`; 0 if it has settled.

    Modification times far in the future come from another machine's clock and are ignored.
    """
    ages = (now - file.modified_at.timestamp() for file in partition.files)
    return max((settle_seconds - age for age in ages if abs(age) < settle_seconds), default=0.0)


def wait_until_settled(
    pipeline: Pipeline, keys: Collection[str], sleep: Callable[[float], object] = time.sleep
) -> dict[str, SourcePartition]:
    """Wait until the partitions in `keys` have settled, but only for a few waits, then list all partitions by key."""
    settle_seconds = pipeline.settings.settle_seconds
    for _ in range(_MAX_WAITS):
        partitions = pipeline.corpus.source.partitions()
        now = time.time()
        found = (partitions[key] for key in keys if key in partitions)
        seconds = max((seconds_until_settled(p, settle_seconds, now) for p in found), default=0.0)
        if not seconds:
            return partitions
        sleep(seconds)
    return pipeline.corpus.source.partitions()


def _skip(state: Cursor, reason: str) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=reason, cursor=state.dumps())
