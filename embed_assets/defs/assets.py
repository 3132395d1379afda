"""The one step that makes the three assets and asks their checks."""
# No postponed annotations here: Dagster looks at the step's as they are.

import contextlib
from collections.abc import Iterator, Sequence, Set

import dagster as dg

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.arrivals import wait_until_settled
from embed_assets.defs.checks import Checker, check_specs
from embed_assets.defs.corpus_run import CorpusRun, describe
from embed_assets.defs.dagster_internals import drop_unanswered, latest_answers
from embed_assets.defs.discovery import refuse_if_emptied
from embed_assets.defs.metadata import MetadataWriter
from embed_assets.defs.names import (
    ALLOW_EMPTY_TAG,
    ASSETS,
    AUTOMATED_TAG,
    CODE_TAG,
    LASTING_TAG,
    POOL,
    SOURCE,
    Names,
    code_tag,
)
from embed_assets.defs.progress import LogSink, RunObserver
from embed_assets.defs.recording import Recorder
from embed_assets.defs.specs import asset_specs
from embed_assets.defs.staleness import load_history, partition_statuses
from embed_assets.errors import UserError, is_retryable
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import RAW
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.remote import open_compute

RETRIES = dg.RetryPolicy(max_retries=2, delay=5, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)
"""For what may pass: a store that hiccups, a device that was lost. What was embedded before is not done again.

Asked for by the step itself: given to Dagster, a policy would also start an interrupted step anew.
"""


def build_corpus_assets(
    pipeline: Pipeline,
    observer: RunObserver | None = None,
    retries: dg.RetryPolicy = RETRIES,
    resource_keys: Set[str] = frozenset(),
) -> dg.AssetsDefinition:
    """The multi-asset over `pipeline`. What happens is told to `observer`, or else to the run's log.

    Dagster sets up the resources of `resource_keys` before the step.
    """
    names = Names.of(pipeline)

    @dg.multi_asset(
        name=names.prefixed("embed_corpus"),
        specs=asset_specs(pipeline),
        check_specs=check_specs(names),
        can_subset=True,
        pool=POOL,
        required_resource_keys=set(resource_keys),
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def embed_corpus(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        """Read, chunk and embed what is missing or stale in the run's partitions, one after the other."""
        try:
            with _dropping_unanswered(context):
                run = _begin(context, pipeline, observer or RunObserver(LogSink(context.log)))
                with contextlib.closing(run.recorder):
                    if not run.selected:
                        _only_check(run)
                        return
                    run.materialize()
        except UserError as error:
            _retry_if_it_helps(context, retries, [error])
            raise dg.Failure(description=str(error)) from None  # its own cause is in its one line
        if failures := run.failures:
            _retry_if_it_helps(context, retries, list(failures.values()))
            run.confirm_unmade(key for key in run.keys if key not in failures)
            raise dg.Failure(
                description=f"{len(failures)} of {len(run.keys)} partitions failed, the others are materialized: "
                + "; ".join(f"{key!r}: {describe(error)}" for key, error in failures.items())
            )
        yield from run.outputs_for_downstream(context.job_def.asset_layer.selected_asset_keys)

    return embed_corpus


def _retry_if_it_helps(context: dg.AssetExecutionContext, retries: dg.RetryPolicy, errors: Sequence[Exception]) -> None:
    """Have Dagster start the step again in a while, if any of the errors may pass and there is an attempt left."""
    passing = [error for error in errors if is_retryable(error)]
    if not passing:
        context.instance.add_run_tags(context.run.run_id, {LASTING_TAG: "true"})
    if passing and context.retry_number < retries.max_retries:
        seconds = retries.calculate_delay(context.retry_number + 1)
        context.log.warning(f"{describe(passing[0])}; trying again in {seconds:.0f} s")
        raise dg.RetryRequested(retries.max_retries, seconds) from UserError(describe(passing[0]))


def _begin(context: dg.AssetExecutionContext, pipeline: Pipeline, observer: RunObserver) -> CorpusRun:
    """List the source, read what is recorded, and note what the source has that was not observed yet."""
    names = Names.of(pipeline)
    selected = [asset for asset in ASSETS if names.key(asset) in context.selected_asset_keys]
    pipeline.lake.check_usable(pipeline.embeddings_table)
    pipeline = pipeline.calibrated() if selected else pipeline.refreshed()
    context.instance.add_run_tags(context.run.run_id, {CODE_TAG: code_tag(pipeline)})
    _ = pipeline.target  # with REUSE=table, texts may move out of a partition before another one takes them in
    wanted = _partition_keys(context, names)
    before = Snapshot(pipeline.lake.session())
    before.version(RAW)  # before the listing: what is written after it is noticed
    listed = wait_until_settled(pipeline, context.partition_keys) if _is_automated(context) else None
    listed = pipeline.corpus.source.partitions() if listed is None else listed
    partitions = {key: listed.get(key, SourcePartition(key)) for key in wanted}
    # Emptied partitions come last, so that their vectors can still be found by those their texts moved to.
    keys = sorted(partitions, key=lambda key: (not partitions[key].files, key))
    history = load_history(context.instance, pipeline, keys)
    if ALLOW_EMPTY_TAG not in context.run.tags:
        refuse_if_emptied(pipeline.corpus.source, not listed, history.records["raw_documents"])
    recorder = Recorder(context.instance, context.log_event, history)
    for key in keys if selected else ():
        if history.version(SOURCE, key) != partitions[key].version:
            recorder.observed(partitions[key])
    checks = context.selected_asset_check_keys
    # Who runs the checks alone wants to see that they were asked.
    known = latest_answers(context.instance, context.run.run_id, checks, keys) if selected else {}
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
def _dropping_unanswered(context: dg.AssetExecutionContext) -> Iterator[None]:
    """Answers that did not change are not recorded again; Dagster must not take those for ones that are missing."""
    try:
        yield
    finally:
        drop_unanswered(context.instance, context.run.run_id, context.selected_asset_check_keys)


def _only_check(run: CorpusRun) -> None:
    """Ask the checks about the tables as they are."""
    for key in run.keys:
        statuses = partition_statuses(run.history, key, run.partitions[key].version, run.pipeline.code_versions)
        stale = {asset: status for asset, status in statuses.items() if status.state != "fresh"}
        for asset in ASSETS:
            run.checker.outcomes(asset, run.before.partition(key), stale)
    run.recorder.drain()


def _partition_keys(context: dg.AssetExecutionContext, names: Names) -> Sequence[str]:
    """The run's partitions; all of them where it names none, as runs of checks alone do."""
    if context.has_partition_key or context.has_partition_key_range:
        return list(context.partition_keys)
    return list(context.instance.get_dynamic_partitions(names.partitions_name))


def _is_automated(context: dg.AssetExecutionContext) -> bool:
    return AUTOMATED_TAG in context.run.tags
