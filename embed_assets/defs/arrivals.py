"""Noticing what arrives: a sensor lists the source, registers new partitions and observes changed ones.

It starts no run: what it records makes partitions missing or stale, and the automation condition takes it from there.
"""
# No postponed annotations here: Dagster looks at the sensor's as they are.

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

import dagster as dg
from dagster import DagsterInstance

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.discovery import KEYS_PER_ADD, list_partitions
from embed_assets.defs.heartbeat import Silence
from embed_assets.defs.names import SOURCE, Names
from embed_assets.defs.processes import end_dead_runs
from embed_assets.defs.recording import observation
from embed_assets.defs.staleness import Record, load_records
from embed_assets.errors import SourceError
from embed_assets.records import slices
from embed_assets.stages.pipeline import Pipeline

_INTERVAL_SECONDS = 10
_EVENTS_PER_TICK = 1_000
"""An event takes Dagster's daemon some milliseconds; the next tick goes on."""
_LISTING_SHARE = 0.1
"""Of the time is spent on listing at most; a large source is listed less often."""
_PATIENCE = 10
"""A partition that is written to without a pause is taken as it is after so many times SETTLE_SECONDS."""
_EMPTY_SECONDS = 60.0
"""An empty source is believed after so long: it may be a disk that is not mounted."""
_WAITS = 3


@dataclass(slots=True)
class Cursor:
    """What one tick tells the next."""

    listed_at: float = 0.0
    """Seconds since 1970."""
    listing_seconds: float = 0.0
    empty_since: float | None = None
    unsettled: dict[str, float] = field(default_factory=dict)
    """Partitions that are being written to, and since when that is seen."""

    @classmethod
    def loads(cls, text: str | None, now: float) -> Self:
        """The cursor as it was kept; times after `now` are of a clock that was set back, and mean now.

        One that can't be read is as good as none: the tick looks at everything again.
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
        """As Dagster keeps it."""
        return json.dumps(asdict(self))


def build_arrivals_sensor(pipeline: Pipeline) -> dg.SensorDefinition:
    """The sensor over the pipeline's source."""
    known: dict[str, Record] = {}
    silence = Silence()

    @dg.sensor(
        name=Names.of(pipeline).prefixed("arrivals"),
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Lists the source, registers new partitions and observes new, changed and emptied ones. "
        "Also ends runs whose process is gone.",
    )
    def arrivals(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        for run_id in end_dead_runs(context.instance, silence):
            context.log.warning(f"the process of the run {run_id} is gone: it is marked as failed")
        return observe_arrivals(context.instance, pipeline, context.cursor, time.time(), known)

    return arrivals


def observe_arrivals(
    instance: DagsterInstance, pipeline: Pipeline, cursor: str | None, now: float, known: dict[str, Record]
) -> dg.SensorResult:
    """One tick at the time `now` (seconds since 1970).

    `known` has the observations that were read by earlier ticks, and gets those read by this one.
    """
    state = Cursor.loads(cursor, now)
    if now - state.listed_at < state.listing_seconds / _LISTING_SHARE:
        return _skip(state, f"listing takes {state.listing_seconds:.1f} s: it is done less often")
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
            state, f"the source {pipeline.corpus.source.root!r} is empty: believed after {_EMPTY_SECONDS:.0f} s"
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
    waiting = {key for key, since in state.unsettled.items() if now - since < _PATIENCE * settle_seconds}
    ready = [p for p in changed if p.key not in waiting]
    batch = ready[:_EVENTS_PER_TICK]
    for partition in batch:
        state.unsettled.pop(partition.key, None)
    added = [p.key for p in batch if p.key not in registered]
    if not batch and waiting:
        return _skip(state, f"{len(waiting)} partitions are being written to: {', '.join(sorted(waiting)[:5])}")
    if not batch:
        return _skip(state, f"nothing changed in {len(partitions)} partitions")
    return dg.SensorResult(
        dynamic_partitions_requests=[names.partitions.build_add_request(keys) for keys in slices(added, KEYS_PER_ADD)],
        asset_events=[observation(names, p) for p in batch],
        cursor=state.dumps(),
    )


def seconds_until_settled(partition: SourcePartition, settle_seconds: float, now: float) -> float:
    """How long until none of the files was changed in the last `settle_seconds`; 0 when that is so.

    Times far in the future are another machine's clock and say nothing.
    """
    ages = (now - file.modified_at.timestamp() for file in partition.files)
    return max((settle_seconds - age for age in ages if abs(age) < settle_seconds), default=0.0)


def wait_until_settled(
    pipeline: Pipeline, keys: Collection[str], sleep: Callable[[float], object] = time.sleep
) -> dict[str, SourcePartition]:
    """All partitions of the source, once those of `keys` are not being written to, or after some seconds."""
    settle_seconds = pipeline.settings.settle_seconds
    for _ in range(_WAITS):
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
