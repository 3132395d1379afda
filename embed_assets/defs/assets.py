"""The one step that makes the three assets."""
# No postponed annotations here: Dagster looks at the step's as they are.

import time
from collections.abc import Iterator, Mapping

import dagster as dg

from embed_assets.defs.corpus_run import CorpusRun
from embed_assets.defs.results import PartitionResult, RemainingTime, RunObserver, describe_progress
from embed_assets.defs.specs import asset_specs
from embed_assets.errors import UserError
from embed_assets.stages.embeddings import Progress
from embed_assets.stages.pipeline import Pipeline

_SECONDS_BETWEEN_LINES = 10.0


def build_corpus_assets(pipeline: Pipeline, observer: RunObserver | None = None) -> dg.AssetsDefinition:
    """The multi-asset over `pipeline`. What happens is told to `observer`, or else to the run's log."""

    @dg.multi_asset(
        name="embed_corpus",
        specs=asset_specs(pipeline),
        can_subset=True,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def embed_corpus(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        """Read, chunk and embed what is missing or stale in the run's partitions, one after the other."""
        try:
            run = CorpusRun.begin(context, pipeline, observer or LogObserver(context))
            failures = run.materialize()
        except UserError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from error
        if failures:
            raise dg.Failure(
                description=f"{len(failures)} of {len(run.keys)} partitions failed, the others are materialized: "
                + "; ".join(f"{key!r}: {message}" for key, message in failures.items()),
                allow_retries=False,
            )
        yield from run.outputs_for_downstream(context.job_def.asset_layer.selected_asset_keys)

    return embed_corpus


class LogObserver:
    """Writes progress to the run's log."""

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        self._log = context.log
        self._remaining = RemainingTime()
        self._last_line = time.monotonic()

    def on_start(self, sizes: Mapping[str, int]) -> None:
        """Remembered for the time that remains."""
        self._remaining.start(sizes)

    def on_progress(self, partition_key: str, progress: Progress) -> None:
        """A line every few seconds."""
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            remaining = self._remaining.seconds(partition_key, progress.share)
            self._log.info(describe_progress(partition_key, progress, remaining))

    def on_window(self, partition_key: str, texts: int, tokens: int) -> None:
        """A line per window."""
        self._log.info(f"{partition_key}: embedded {texts} texts, {tokens} tokens in this partition so far")

    def on_partition(self, partition_key: str, result: PartitionResult) -> None:
        """A line per partition."""
        self._remaining.finish(partition_key)
        if result.error is not None:
            self._log.error(f"{partition_key}: failed: {result.error}")
        else:
            self._log.info(
                f"{partition_key}: {result.state}; {result.chunks} chunks: {result.embedded} embedded, "
                f"{result.reused} reused, {result.dropped} dropped; {result.rejected} documents rejected"
            )
