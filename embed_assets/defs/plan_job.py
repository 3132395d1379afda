"""The plan job for Dagster's UI: shows what is missing or stale, why, and what materializing it costs."""
# No `from __future__ import annotations`: Dagster inspects annotations as classes, see
# https://github.com/dagster-io/dagster/issues/26837

import dagster as dg

from embed_assets.defs.names import ASSETS, Names
from embed_assets.defs.processes import one_process_executor
from embed_assets.defs.sync import PartitionPlan, make_plan
from embed_assets.stages.pipeline import Pipeline

_SHOWN_PARTITIONS = 200
"""Rows of the table at most: more make the event and its page in the UI larger."""


def build_plan_job(pipeline: Pipeline) -> dg.JobDefinition:
    """Build a job that changes nothing: its only step counts, and shows the result as metadata."""
    names = Names.of(pipeline)

    @dg.op(name=names.prefixed("plan_partitions"), out=dg.Out(dg.Nothing))
    def plan_partitions(context: dg.OpExecutionContext) -> dg.Output[None]:
        """Read and chunk what is missing or stale, and count what would be embedded."""
        made = make_plan(context.instance, pipeline, count=True)
        due = [plan for plan in made.partitions if not plan.is_fresh]
        estimates = [plan.estimate for plan in due if plan.estimate is not None]
        metadata: dict[str, dg.MetadataValue | int | float] = {
            "plan": dg.MetadataValue.md(_table(due, len(made.partitions))),
            "partitions_to_make": len(due),
            "chunks_to_embed": sum(estimate.to_embed for estimate in estimates),
            "chunks_to_reuse": sum(estimate.to_reuse for estimate in estimates),
            "chunks_to_drop": sum(estimate.to_drop for estimate in estimates),
            "tokens": sum(estimate.tokens for estimate in estimates),
        }
        if made.estimated_seconds is not None:
            metadata["estimated_seconds"] = made.estimated_seconds
        return dg.Output(None, metadata=metadata)

    @dg.job(
        name=names.prefixed("plan"),
        executor_def=one_process_executor,
        description="Shows what is missing or stale, why, and what it will cost. Changes nothing.",
    )
    def plan() -> None:
        plan_partitions()

    return plan


def _table(due: list[PartitionPlan], partitions: int) -> str:
    """Markdown table of the partitions that are not fresh; `partitions` is the number of all."""
    if not due:
        return f"All {partitions:,} partitions are fresh."
    lines = [
        f"{len(due):,} of {partitions:,} partitions are missing or stale.",
        "",
        "| partition | why | to embed | to reuse | to drop | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for plan in due[:_SHOWN_PARTITIONS]:
        reasons = dict.fromkeys(reason for asset in ASSETS for reason in plan.statuses[asset].reasons)
        e = plan.estimate
        counts = "| | | " if e is None else f"{e.to_embed:,} | {e.to_reuse:,} | {e.to_drop:,} | {e.tokens:,}"
        shown = plan.partition.key.replace("|", "\\|")
        lines.append(f"| {shown} | {'; '.join(reasons)} | {counts} |")
    if len(due) > _SHOWN_PARTITIONS:
        lines.append(f"| ... and {len(due) - _SHOWN_PARTITIONS:,} more | | | | | |")
    return "\n".join(lines)
