"""`plan` and `sync`: what would run, and running it, in this process and with one model load."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import dagster as dg
from dagster import DagsterInstance

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.dagster_internals import (
    RANGE_END_TAG,
    RANGE_START_TAG,
    SerializableErrorInfo,
    error_of_run,
)
from embed_assets.defs.discovery import discover, find_orphans, list_partitions, refuse_if_emptied, with_gone_ones
from embed_assets.defs.heartbeat import heartbeat
from embed_assets.defs.names import ALLOW_EMPTY_TAG, Names
from embed_assets.defs.processes import PROCESS_TAG, this_process, wait_for_pool
from embed_assets.defs.progress import RunObserver, Sink
from embed_assets.defs.staleness import History, Status, load_history, partition_statuses
from embed_assets.errors import PartitionError, UserError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.staging import remove_windows, stale_windows
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Estimate, Estimator, Pipeline

_log = logging.getLogger(__name__)

_PROBE_TEXTS = 32
_SILENT_CONSOLE = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
"""Runs still log to the instance; what a person sees on the console is the observer's business."""


@dataclass(frozen=True, slots=True)
class PartitionPlan:
    """State of a partition, and what materializing it would come to."""

    partition: SourcePartition
    statuses: Mapping[str, Status]
    estimate: Estimate | None = None
    """None unless counting was asked for."""

    @property
    def is_fresh(self) -> bool:
        """Nothing would run."""
        return all(status.state == "fresh" for status in self.statuses.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sync would do."""

    partitions: list[PartitionPlan]
    """In order of their keys."""
    estimated_seconds: float | None = None
    """How long the model would take; None unless counting was asked for."""


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What a sync came to."""

    partitions: dict[str, PartitionOutcome]
    seconds: float
    hidden: Sequence[str]
    """Files and folders that were left out because their names begin with a dot."""

    @property
    def failed(self) -> list[str]:
        """Keys of the partitions that failed."""
        return [key for key, result in self.partitions.items() if result.state == "failed"]

    def total(self, name: str) -> int:
        """Sum of a number of `PartitionOutcome` over all partitions."""
        return sum(int(getattr(result, name)) for result in self.partitions.values())


def make_plan(instance: DagsterInstance, pipeline: Pipeline, count: bool = False) -> Plan:
    """State, reasons and (with `count`) costs of every partition. Nothing is recorded.

    Counting reads and splits the stale partitions' documents, which takes a small part of the time of embedding them.
    """
    pipeline.lake.check_owner()
    partitions = list_partitions(instance, pipeline.corpus.source, Names.of(pipeline))
    tables = Snapshot(pipeline.lake)
    history = load_history(instance, pipeline, tables=tables)
    plans = _plans(history, pipeline, partitions.values())
    if not count:
        return Plan(plans)
    # In the order of sync, emptied partitions last: with REUSE=table, a text is embedded where it comes up first.
    estimator = Estimator.over(pipeline, tables)
    estimates = {
        plan.partition.key: _estimate(estimator, history, plan)
        for plan in sorted(plans, key=lambda plan: not plan.partition.files)
    }
    counted = [PartitionPlan(p.partition, p.statuses, estimates[p.partition.key]) for p in plans]
    return Plan(counted, _estimated_seconds(history, pipeline, sum(e.tokens for e in estimates.values())))


def _estimated_seconds(history: History, pipeline: Pipeline, tokens: int) -> float | None:
    """How long the model would take for so many tokens: at the speed recorded last in this space, by the same kind of
    compute, else at a probe's; None where that can't be told."""
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
    """Tokens per second of the model on a few texts of about a chunk's length; 0 when it was not made yet, or runs
    elsewhere."""
    if not pipeline.model.is_calibrated or pipeline.settings.compute != "local":
        return 0.0
    words = pipeline.corpus.chunking.max_tokens // 2
    texts = [f"{i} " + "text of a document " * (words // 4) for i in range(_PROBE_TEXTS)]
    embedder = pipeline.model.engine.embedder
    embedder.embed(texts[:2])  # the first pass also sets up the device
    probe = embedder.embed(texts)
    return probe.stats.tokens_per_second


def run_sync(
    instance: DagsterInstance,
    pipeline: Pipeline,
    build: Callable[[RunObserver], dg.Definitions],
    sink: Sink,
    only: Sequence[str] = (),
    allow_empty: bool = False,
) -> SyncResult:
    """Discover, then materialize what is missing or stale (of the partitions in `only`, if there are any).

    A partition that fails does not stop the others. Raises ``PartitionError`` for an unknown key in `only`,
    ``SourceError`` for an empty source that had documents, unless `allow_empty`, and ``UserError`` when something is
    wrong that is no partition's fault, as a model that can't be loaded.
    """
    started = time.perf_counter()
    pipeline.lake.check_usable(pipeline.embeddings_table)
    listing = pipeline.corpus.source.listing()
    partitions = with_gone_ones(instance, listing.partitions, Names.of(pipeline))
    _check_known(only, partitions)
    tables = Snapshot(pipeline.lake)
    if orphans := find_orphans(tables, pipeline.embeddings_table, partitions):
        _log.warning(
            "%d partitions of the lake are neither in the source nor in Dagster (%s): left alone; "
            "'embed-assets forget KEY' removes one",
            len(orphans),
            ", ".join(map(repr, orphans[:5])),
        )
    history = load_history(instance, pipeline, tables=tables)
    if not allow_empty:
        refuse_if_emptied(pipeline.corpus.source, not listing.partitions, history.records["raw_documents"])
    discover(instance, partitions, history)
    plans = _plans(history, pipeline, (p for p in partitions.values() if not only or p.key in only))
    observer = RunObserver(sink)
    fresh = {p.partition.key: history.outcome(p.partition.key, p.partition.version) for p in plans if p.is_fresh}
    due = [plan.partition.key for plan in plans if not plan.is_fresh]
    observer.start({key: partitions[key].byte_size for key in due})
    registered = instance.get_dynamic_partitions(Names.of(pipeline).partitions_name)
    job = build(observer).resolve_implicit_global_asset_job_def()
    tags = {PROCESS_TAG: this_process()} | ({ALLOW_EMPTY_TAG: "true"} if allow_empty else {})
    with heartbeat(instance, this_process()):
        for message in wait_for_pool(instance) if due else ():
            _log.warning(message)
        for first, last, keys in _ranges(registered, due):
            run = job.execute_in_process(
                instance=instance,
                raise_on_error=False,
                run_config=_SILENT_CONSOLE,
                tags={RANGE_START_TAG: first, RANGE_END_TAG: last, **tags},
            )
            _check_complete(observer, keys, run)
    remove_windows(pipeline.lake, stale_windows(pipeline.lake, pipeline.embeddings_table))
    results = fresh | observer.outcomes
    seconds = round(time.perf_counter() - started, 3)
    return SyncResult({key: results[key] for key in sorted(results)}, seconds, listing.hidden)


def _plans(
    history: History, pipeline: Pipeline, partitions: Collection[SourcePartition] | Iterator[SourcePartition]
) -> list[PartitionPlan]:
    return [
        PartitionPlan(p, partition_statuses(history, p.key, p.version, pipeline.code_versions))
        for p in sorted(partitions, key=lambda partition: partition.key)
    ]


def _estimate(estimator: Estimator, history: History, plan: PartitionPlan) -> Estimate:
    stale = frozenset(asset for asset, status in plan.statuses.items() if status.state != "fresh")
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


def _ranges(registered: Sequence[str], keys: Collection[str]) -> Iterator[tuple[str, str, list[str]]]:
    """The keys as runs over neighbours in Dagster's order of partitions: (first, last, all)."""
    due = set(keys)
    neighbours: list[str] = []
    for key in [*registered, None]:
        if key is not None and key in due:
            neighbours.append(key)
        elif neighbours:
            yield neighbours[0], neighbours[-1], neighbours
            neighbours = []


def _check_complete(observer: RunObserver, keys: Sequence[str], run: dg.ExecuteInProcessResult) -> None:
    """Raise what stopped a run before all partitions were done: an interrupt, or an error that is none of theirs."""
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
        f"the run {run.run_id} broke off: {'; '.join(causes) or 'no reason was recorded'}; its log in Dagster has the "
        "trace, what was embedded before is kept"
    )


def _causes(error: SerializableErrorInfo) -> str:
    """The errors inside Dagster's own wrapping, the last one first, in one line."""
    chain = [error]
    while (cause := chain[-1].cause) is not None:
        chain.append(cause)
    ours = [e for e in chain if not (e.cls_name or "").startswith("Dagster")] or chain[-1:]
    return ", because of ".join(" ".join(e.message.split()) for e in ours)
