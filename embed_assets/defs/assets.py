"""The multi-asset whose single step materializes the three assets and evaluates their checks."""
# No `from __future__ import annotations`: Dagster inspects annotations as classes, see
# https://github.com/dagster-io/dagster/issues/26837

import contextlib
from collections.abc import Iterator, Sequence, Set

import dagster as dg

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.arrivals import wait_until_settled
from embed_assets.defs.checks import Checker, check_specs
from embed_assets.defs.corpus_run import CorpusRun
from embed_assets.defs.dagster_internals import drop_planned_evaluations, latest_evaluations
from embed_assets.defs.discovery import refuse_if_emptied
from embed_assets.defs.ingest import describe
from embed_assets.defs.metadata import MetadataWriter
from embed_assets.defs.names import (
    ACTIVE,
    ALLOW_EMPTY_TAG,
    ASSETS,
    AUTOMATED_TAG,
    CODE_TAG,
    PERMANENT_FAILURE_TAG,
    POOL,
    SOURCE,
    Names,
    code_tag,
)
from embed_assets.defs.recording import Recorder
from embed_assets.defs.resources import engine_key
from embed_assets.defs.specs import asset_specs
from embed_assets.defs.staleness import load_history
from embed_assets.defs.storage import kept_open
from embed_assets.defs.upkeep import keep_spaces
from embed_assets.errors import ModelError, PartitionError, SettingsError, UserError, is_retryable
from embed_assets.lake.copies import update_copies
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.spaces import activate_first, protect_active
from embed_assets.lake.tables import RAW
from embed_assets.stages.pipeline import DatedListing, Pipeline
from embed_assets.stages.progress import LogSink, RunObserver
from embed_assets.stages.remote import open_compute

RETRIES = dg.RetryPolicy(max_retries=2, delay=5, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)
"""Retries of transient errors: a store that is briefly unavailable, a lost device. What was embedded is kept.

Three attempts, waiting about 5 and 15 seconds: an outage that lasts longer is left to the automation condition. The
step raises the retry itself, because with an in-process executor Dagster's own `retry_policy` also retries a step that
was interrupted: https://github.com/dagster-io/dagster/issues/15026
"""


def build_corpus_assets(
    pipeline: Pipeline,
    observer: RunObserver | None = None,
    retries: dg.RetryPolicy = RETRIES,
    resource_keys: Set[str] = frozenset(),
    listed: DatedListing | None = None,
) -> dg.AssetsDefinition:
    """Build the multi-asset over `pipeline`; progress goes to `observer`, or by default to the run's log.

    Dagster initializes the resources named in `resource_keys` before the step starts. `listed` is the source,
    if it was listed just now: a run's first attempt may use that, later ones list the source anew.
    """
    names = Names.of(pipeline)
    specs = check_specs(names)

    @dg.multi_asset(
        name=names.prefixed("embed_corpus"),
        specs=asset_specs(pipeline),
        check_specs=specs,
        can_subset=True,
        pool=POOL,
        required_resource_keys={engine_key(names), *resource_keys},
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def embed_corpus(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None] | dg.Output[None]]:
        """Read, chunk and embed whatever is missing or stale in the run's partitions, partition by partition."""
        try:
            with _dropping_planned_evaluations(context):
                given = None if context.retry_number else listed
                engine = getattr(context.resources, engine_key(names))
                own = engine.applied_to(pipeline)
                gates = _has_assets_below(context, names)
                run = _begin(context, own, observer or RunObserver(LogSink(context.log)), given)
                with kept_open(context.instance), contextlib.closing(run.recorder):
                    if run.selected:
                        _materialize(run)
                        if gates:
                            run.check_untouched()
                    else:
                        _only_check(run, gates)
        except UserError as error:
            _request_retry(context, retries, [error])
            raise dg.Failure(description=str(error)) from None  # the message already names its cause
        if failures := run.failures:
            _request_retry(context, retries, list(failures.values()))
            run.confirm_fresh(key for key in run.keys if key not in failures)
            raise dg.Failure(
                description=f"{len(failures)} of {len(run.keys)} partitions failed, the others are materialized: "
                + "; ".join(f"{key!r}: {describe(error)}" for key, error in failures.items())
            )
        if gates:
            yield from run.outputs_for_downstream()
        yield from _outputs_of_checks(context, specs)

    return embed_corpus


def _materialize(run: CorpusRun) -> None:
    """Bring the run's partitions up to date in the configured space, and in others that are still in use."""
    if "embeddings" not in run.selected:
        run.materialize()
        return
    lake, space, who = run.pipeline.lake, run.pipeline.model.space.name, f"run {run.run_id}"
    protect_active(lake, space, who)
    try:
        run.materialize()
    except (ModelError, SettingsError):  # a model that can't be loaded must not keep documents from readers
        keep_spaces(run)
        raise
    keep_spaces(run)
    update_copies(lake, (space, *run.history.spaces))
    if not run.failures:
        activate_first(lake, space, who)


def _outputs_of_checks(
    context: dg.AssetExecutionContext, specs: Sequence[dg.AssetCheckSpec]
) -> Iterator[dg.Output[None]]:
    """Yield an output for each selected check: Dagster runs what is below the assets when it has them.

    The evaluations themselves are recorded by partition. A blocking check that failed has failed the step by now, but
    not in a run of checks alone with nothing below it.
    """
    selected = context.selected_asset_check_keys
    return (dg.Output(None, spec.get_python_identifier()) for spec in specs if spec.key in selected)


def _request_retry(context: dg.AssetExecutionContext, retries: dg.RetryPolicy, errors: Sequence[Exception]) -> None:
    """Raise ``RetryRequested`` if any of the errors is retryable and an attempt is left; tag the run if none is."""
    retryable = [error for error in errors if is_retryable(error)]
    if not retryable:
        context.instance.add_run_tags(context.run.run_id, {PERMANENT_FAILURE_TAG: "true"})
    if retryable and context.retry_number < retries.max_retries:
        seconds = retries.calculate_delay(context.retry_number + 1)
        context.log.warning(f"{describe(retryable[0])}; retrying in {seconds:.0f} s")
        raise dg.RetryRequested(retries.max_retries, seconds) from UserError(describe(retryable[0]))


def _begin(
    context: dg.AssetExecutionContext,
    pipeline: Pipeline,
    observer: RunObserver,
    early: DatedListing | None,
) -> CorpusRun:
    """Set up a run: list the source, load the recorded history, and record observations of what changed.

    The source is not listed again if no run changed the documents since the `early` listing.
    """
    names = Names.of(pipeline)
    selected = [asset for asset in ASSETS if names.key(asset) in context.selected_asset_keys]
    if selected:
        pipeline.lake.check_usable(pipeline.embeddings_table)
    else:  # a run of checks alone
        pipeline.lake.check_readable(pipeline.embeddings_table)
    pipeline = pipeline.calibrated() if selected else pipeline.refreshed()
    context.instance.add_run_tags(context.run.run_id, {CODE_TAG: code_tag(pipeline)})
    # Pin the vectors to reuse now: with REUSE=table, a text may leave one partition before another one takes it in.
    _ = pipeline.target
    wanted = _partition_keys(context, names)
    before = Snapshot(pipeline.lake.session())
    before.version(RAW)  # pinned before the listing, to detect rows that another run writes after it
    if _is_automated(context):
        listed = wait_until_settled(pipeline, context.partition_keys)
    elif early is not None and before.version(RAW) == early.documents_version:
        listed = early.partitions
    else:
        listed = pipeline.corpus.source.partitions()
    partitions = {key: listed.get(key, SourcePartition(key)) for key in wanted}
    # Emptied partitions come last: partitions that their texts moved to can still reuse their vectors.
    keys = sorted(partitions, key=lambda key: (not partitions[key].files, key))
    history = load_history(context.instance, pipeline, keys)
    if ALLOW_EMPTY_TAG not in context.run.tags:
        refuse_if_emptied(pipeline.corpus.source, not listed, history.records["raw_documents"])
    recorder = Recorder(context.instance, context.log_event, history)
    for key in keys if selected else ():
        if history.version(SOURCE, key) != partitions[key].version:
            recorder.observed(partitions[key])
    checks = context.selected_asset_check_keys
    # A run of checks alone records every evaluation, so that the UI shows that they ran.
    known = latest_evaluations(context.instance, context.run.run_id, checks, keys) if selected else {}
    checker = Checker(pipeline, names, recorder.checked, checks, known)
    return CorpusRun(
        pipeline=pipeline,
        compute=open_compute(pipeline),
        observer=observer,
        run_id=context.run.run_id,
        recorder=recorder,
        metadata=MetadataWriter(pipeline, history),
        checker=checker,
        partitions=partitions,
        before=before,
        keys=keys,
        selected=selected,
    )


@contextlib.contextmanager
def _dropping_planned_evaluations(context: dg.AssetExecutionContext) -> Iterator[None]:
    """At the end of the run, drop its planned check evaluations that were not recorded because nothing changed.

    Dagster would show them as skipped.
    """
    try:
        yield
    finally:
        drop_planned_evaluations(context.instance, context.run.run_id, context.selected_asset_check_keys)


def _has_assets_below(context: dg.AssetExecutionContext, names: Names) -> bool:
    """Whether the run also materializes assets of others."""
    own = {names.key(asset) for asset in (SOURCE, *ASSETS, ACTIVE)}
    return not set(context.job_def.asset_layer.selected_asset_keys) <= own


def _only_check(run: CorpusRun, gates: bool) -> None:
    """Evaluate the selected checks on the tables as they are, without materializing anything.

    Raises ``PartitionError`` if a blocking check fails and `gates`: what is below it must not run.
    """
    failed: list[str] = []
    tables = Snapshot(run.pipeline.lake)
    for key in run.keys:
        stale = run.stale(key)
        for asset in ASSETS:
            try:
                run.checker.check(asset, tables.partition(key), stale)
            except PartitionError as error:
                failed.append(f"{key!r}: {error}")
    run.drain()
    if failed and gates:
        raise PartitionError(f"what is below does not run: {'; '.join(failed)}")


def _partition_keys(context: dg.AssetExecutionContext, names: Names) -> Sequence[str]:
    """Keys of the run's partitions; all registered keys for a run without partitions, such as one of checks alone."""
    if context.has_partition_key or context.has_partition_key_range:
        return list(context.partition_keys)
    return list(context.instance.get_dynamic_partitions(names.partitions_name))


def _is_automated(context: dg.AssetExecutionContext) -> bool:
    return AUTOMATED_TAG in context.run.tags
