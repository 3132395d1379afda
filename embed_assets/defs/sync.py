"""`plan` and `sync`: determines what is not fresh, and materializes it in this process with one model load."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import dagster as dg
from dagster import DagsterInstance

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.active_asset import show_active
from embed_assets.defs.dagster_internals import (
    RANGE_END_TAG,
    RANGE_START_TAG,
    SerializableErrorInfo,
    error_of_run,
)
from embed_assets.defs.discovery import (
    discover,
    find_orphans,
    list_partitions,
    refuse_if_emptied,
    with_emptied_partitions,
)
from embed_assets.defs.generations import Survey
from embed_assets.defs.heartbeat import heartbeat
from embed_assets.defs.names import ALLOW_EMPTY_TAG, ASSETS, Names
from embed_assets.defs.processes import PROCESS_TAG, this_process, wait_for_pool
from embed_assets.defs.ranges import run_ranges
from embed_assets.defs.staleness import History, Status, load_history, partition_statuses
from embed_assets.defs.storage import kept_open
from embed_assets.errors import PartitionError, UserError
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.spaces import Promotion, Signature, space_table, this_user
from embed_assets.lake.staging import remove_windows, stale_windows
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.stages.changes import ChangeFinder
from embed_assets.stages.foresight import remember_synced
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import DatedListing, Estimate, Estimator, Pipeline
from embed_assets.stages.progress import RunObserver, Sink
from embed_assets.stages.promotion import promote

_log = logging.getLogger(__name__)

_PROBE_TEXTS = 32
"""Texts of a speed probe: more make the estimate steadier, fewer make `plan --count` faster."""
_SILENT_CONSOLE = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
"""Run config that keeps Dagster's log off the console, where the observer shows progress, but in the instance."""


@dataclass(frozen=True, slots=True)
class PartitionPlan:
    """Statuses of a partition's assets, and what materializing it would cost."""

    partition: SourcePartition
    statuses: Mapping[str, Status]
    """Statuses of the three assets, by name."""
    estimate: Estimate | None = None
    """Chunks and tokens; None unless counting was requested."""

    @property
    def is_fresh(self) -> bool:
        """Whether all assets of the partition are fresh, so that nothing would run."""
        return all(status.state == "fresh" for status in self.statuses.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sync would materialize."""

    partitions: list[PartitionPlan]
    """All partitions, sorted by key."""
    estimated_seconds: float | None = None
    """Seconds the model would take; None unless counting was requested and a speed is known."""


@dataclass(frozen=True, slots=True)
class SyncResult:
    """The result of a sync."""

    partitions: dict[str, PartitionOutcome]
    """Outcomes by key, sorted."""
    seconds: float
    """Wall-clock time of the whole sync."""
    hidden: Sequence[str]
    """Files and folders that were skipped because their names begin with a dot."""
    kept: Mapping[str, Mapping[str, PartitionOutcome]] = field(default_factory=dict)
    """Outcomes of partitions that were brought up to date in other spaces that are still in use, by space and key."""
    promotion: Promotion | None = None
    """The result of promoting the space; None if that was not tried."""

    @property
    def failed(self) -> list[str]:
        """Keys of the partitions that failed."""
        return [key for key, result in self.partitions.items() if result.state == "failed"]

    @property
    def is_good(self) -> bool:
        """Whether nothing failed: no partition, and no gate of a promotion."""
        return not self.failed and not (self.promotion and self.promotion.failed)

    def kept_totals(self) -> dict[str, dict[str, int]]:
        """Sums of what was done in other spaces, by space and name of a count."""
        names = ("embedded", "reused", "dropped", "tokens")
        return {
            space: {name: sum(int(getattr(outcome, name)) for outcome in found.values()) for name in names}
            for space, found in self.kept.items()
        }

    def total(self, name: str) -> int:
        """Sum of a count of `PartitionOutcome`, by its attribute name, over all partitions."""
        return sum(int(getattr(result, name)) for result in self.partitions.values())


def make_plan(instance: DagsterInstance, pipeline: Pipeline, count: bool = False) -> Plan:
    """Statuses and (with `count`) costs of every partition. Nothing is recorded.

    Counting reads and chunks the documents of stale partitions, in a fraction of the time that embedding them takes.
    """
    pipeline.lake.check_owner()
    partitions = list_partitions(instance, pipeline.corpus.source, Names.of(pipeline))
    tables = Snapshot(pipeline.lake)
    history = load_history(instance, pipeline, tables=tables)
    plans = _plans(history, pipeline, partitions.values())
    if not count:
        return Plan(plans)
    # Emptied partitions last, in the order of sync: with REUSE=table, the first partition with a text embeds it.
    estimator = Estimator(pipeline, tables, _change_finder(history, pipeline, tables).find)
    estimates = {
        plan.partition.key: _estimate(estimator, history, plan)
        for plan in sorted(plans, key=lambda plan: not plan.partition.files)
    }
    counted = [PartitionPlan(p.partition, p.statuses, estimates[p.partition.key]) for p in plans]
    return Plan(counted, _estimated_seconds(history, pipeline, sum(e.tokens for e in estimates.values())))


def _change_finder(history: History, pipeline: Pipeline, tables: Snapshot) -> ChangeFinder:
    """Finds what a sync would read of partitions."""

    def is_as_recorded(partition: PartitionSnapshot) -> bool:
        codes = pipeline.code_versions
        return all(history.is_as_recorded(table, partition, codes[table.kind]) for table in (RAW, CHUNK_TABLE))

    return ChangeFinder(tables, pipeline.corpus.source, is_as_recorded)


def _estimated_seconds(history: History, pipeline: Pipeline, tokens: int) -> float | None:
    """Seconds the model would take for this many tokens; None if no speed is known.

    Uses the speed recorded last for this space and the same kind of compute, or else that of a probe.
    """
    if not tokens:
        return 0.0
    records = history.records["embeddings"].values()
    speeds = [
        (record.storage_id, record.counts["tokens_per_second"])
        for record in records
        if record.code_version == pipeline.model.space.name
        and record.counts.get("tokens_per_second")
        and ("ray_workers" in record.counts) == (pipeline.settings.compute == "ray")
    ]
    speed = max(speeds)[1] if speeds else _probe_speed(pipeline)
    return round(tokens / speed, 1) if speed else None


def _probe_speed(pipeline: Pipeline) -> float:
    """Tokens per second of the model on a few texts of about a chunk's length.

    Returns 0 if the model is not quantized yet, or does not run in this process.
    """
    model = pipeline.model
    if not model.is_calibrated or pipeline.settings.compute != "local" or model.space.is_remote:
        return 0.0
    words = pipeline.corpus.chunking.max_tokens // 2
    texts = [f"{i} " + "text of a document " * (words // 4) for i in range(_PROBE_TEXTS)]
    embedder = pipeline.model.engine.embedder
    embedder.embed(texts[:2])  # warm-up: the first pass also initializes the device
    probe = embedder.embed(texts)
    return probe.stats.tokens_per_second


class Build(Protocol):
    """Builds the definitions that a sync runs."""

    def __call__(self, observer: RunObserver, *, listed: DatedListing | None) -> dg.Definitions:
        """Definitions over an observer, and over the source if it was listed just now."""
        ...


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """What to sync."""

    only: Sequence[str] = ()
    """Keys of the partitions to materialize if they are missing or stale; empty for all."""
    allow_empty: bool = False
    """Drop everything if the source is empty."""
    listing: DatedListing | None = None
    """The source, if it was listed just now."""


def run_sync(
    instance: DagsterInstance, pipeline: Pipeline, build: Build, sink: Sink, request: SyncRequest = SyncRequest()
) -> SyncResult:
    """Discover partitions, then materialize those that are missing or stale.

    A partition that fails does not stop the others. Raises ``PartitionError`` for an unknown key,
    ``SourceError`` for an empty source that had documents unless the request allows it, and ``UserError`` for errors
    that affect every partition, such as a model that can't be loaded.
    """
    only = request.only
    started = time.perf_counter()
    pipeline.lake.check_usable(pipeline.embeddings_table)
    listing = request.listing or DatedListing.of(pipeline)
    partitions = with_emptied_partitions(instance, listing.partitions, Names.of(pipeline))
    _check_known(only, partitions)
    tables = Snapshot(pipeline.lake)
    if orphans := find_orphans(tables, pipeline.embeddings_table, partitions):
        _log.warning(
            "%d partitions of the lake are neither in the source nor in Dagster (%s) and were not changed; "
            "run 'embed-assets forget KEY' to remove one",
            len(orphans),
            ", ".join(map(repr, orphans[:5])),
        )
    history = load_history(instance, pipeline, tables=tables)
    if not request.allow_empty:
        refuse_if_emptied(pipeline.corpus.source, not listing.partitions, history.records["raw_documents"])
    discover(instance, partitions, history, sink.progress)
    plans = _plans(history, pipeline, (p for p in partitions.values() if not only or p.key in only))
    observer = RunObserver(sink)
    fresh = {p.partition.key: history.outcome(p.partition.key, p.partition.version) for p in plans if p.is_fresh}
    due = [plan.partition.key for plan in plans if not plan.is_fresh]
    observer.start({key: partitions[key].byte_size for key in due})
    registered = instance.get_dynamic_partitions(Names.of(pipeline).partitions_name)
    tags = {PROCESS_TAG: this_process()} | ({ALLOW_EMPTY_TAG: "true"} if request.allow_empty else {})
    # Dagster plans an event for each partition and asset before a run.
    with heartbeat(instance, this_process()), kept_open(instance):
        listed: DatedListing | None = listing
        for message in wait_for_pool(instance) if due else ():
            _log.warning(message)
            listed = None  # the wait may have been long
        job = build(observer, listed=listed).resolve_implicit_global_asset_job_def()
        for first, last, keys in run_ranges(registered, due, fresh):
            run = job.execute_in_process(
                instance=instance,
                asset_selection=[Names.of(pipeline).key(asset) for asset in ASSETS],
                raise_on_error=False,
                run_config=_SILENT_CONSOLE,
                tags={RANGE_START_TAG: first, RANGE_END_TAG: last, **tags},
            )
            _check_complete(observer, keys, run)
    for table in (pipeline.embeddings_table, *(space_table(space) for space in history.spaces)):
        remove_windows(pipeline.lake, stale_windows(pipeline.lake, table))
    if not pipeline.settings.read_only:
        show_active(instance, pipeline)
    results = fresh | observer.outcomes
    if not only and all(outcome.error is None for outcome in results.values()):
        remember_synced(pipeline, listing.partitions)
    promotion = None if only or pipeline.settings.promote != "auto" else promote_if_ready(instance, pipeline, sink)
    seconds = round(time.perf_counter() - started, 3)
    outcomes = {key: results[key] for key in sorted(results)}
    return SyncResult(outcomes, seconds, listing.hidden, observer.kept, promotion)


def promote_if_ready(instance: DagsterInstance, pipeline: Pipeline, sink: Sink) -> Promotion | None:
    """Promote the configured space if it is complete and not active yet; None if there is nothing to do."""
    survey = Survey.of(instance, pipeline)
    space = survey.promotable
    if space is None:
        return None
    signed = Signature(this_user(), "EMBED_PROMOTE=auto")
    done = promote(pipeline.lake, survey.spaces, survey.trial(space), signed, lambda name: sink.news(f"gate {name}"))
    if not done.failed:
        show_active(instance, pipeline)
    return done


def _plans(
    history: History, pipeline: Pipeline, partitions: Collection[SourcePartition] | Iterator[SourcePartition]
) -> list[PartitionPlan]:
    return [
        PartitionPlan(p, partition_statuses(history, p.key, p.version, pipeline.code_versions))
        for p in sorted(partitions, key=lambda partition: partition.key)
    ]


def _estimate(estimator: Estimator, history: History, plan: PartitionPlan) -> Estimate:
    stale = frozenset(asset for asset in ASSETS if plan.statuses[asset].state != "fresh")
    is_damaged = history.is_marked_for_repair("embeddings", plan.partition.key)
    return estimator.estimate(plan.partition, stale, is_damaged)


def _check_known(only: Sequence[str], partitions: Mapping[str, SourcePartition]) -> None:
    unknown = [key for key in only if key not in partitions]
    if unknown:
        known = ", ".join(repr(key) for key in sorted(partitions)[:10]) or "none"
        raise PartitionError(
            f"--partition must name a partition of the source, got {unknown[0]!r}; there are {len(partitions)}: {known}"
            f"{', ...' if len(partitions) > 10 else ''}"
        )


def _check_complete(observer: RunObserver, keys: Sequence[str], run: dg.ExecuteInProcessResult) -> None:
    """Raise if a run stopped before all its partitions were done.

    Raises ``KeyboardInterrupt`` after an interrupt, else ``UserError`` with the error that is not any partition's.
    """
    failures = [event.step_failure_data for event in run.all_events if event.is_step_failure]
    errors = [failure.error for failure in failures if failure.error is not None]
    if any(error.cls_name == "DagsterExecutionInterruptedError" for error in errors):
        raise KeyboardInterrupt
    if all(key in observer.outcomes for key in keys):
        return
    for failure in failures:
        if failure.user_failure_data is not None and failure.user_failure_data.description:
            raise UserError(failure.user_failure_data.description)
    errors += [error for event in run.all_events if (error := error_of_run(event)) is not None]
    causes = dict.fromkeys(_causes(error) for error in errors)
    raise UserError(
        f"run {run.run_id} stopped early: {'; '.join(causes) or 'no reason was recorded'}; its log in Dagster has the "
        "traceback, and what was embedded before is kept"
    )


def _causes(error: SerializableErrorInfo) -> str:
    """Chain of errors in one line, outermost first, without Dagster's own wrappers."""
    chain = [error]
    while (cause := chain[-1].cause) is not None:
        chain.append(cause)
    causes = [e for e in chain if not (e.cls_name or "").startswith("Dagster")] or chain[-1:]
    return ", because of ".join(" ".join(e.message.split()) for e in causes)
