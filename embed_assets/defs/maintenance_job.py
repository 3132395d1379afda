"""The maintenance job of the lake for Dagster's UI, and how long the lake's files must be retained."""
# No `from __future__ import annotations`: Dagster inspects annotations as classes, see
# https://github.com/dagster-io/dagster/issues/26837

import time
from dataclasses import asdict
from datetime import timedelta

import dagster as dg
from pydantic import Field

from embed_assets.defs.names import Names
from embed_assets.defs.processes import one_process_executor
from embed_assets.errors import UserError
from embed_assets.lake.maintenance import Maintenance, maintain
from embed_assets.lake.spaces import find_spaces
from embed_assets.stages.pipeline import Pipeline

_MARGIN = timedelta(hours=24)
"""Added to the age of the oldest run: longer protects slow runs and readers, shorter frees disk space sooner."""
_UNFINISHED = (
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)


class MaintenanceConfig(dg.Config):
    """Run configuration of the maintenance job."""

    dry_run: bool = Field(False, description="Only show what there is to do.")
    remove_spaces: list[str] = Field([], description="Embedding spaces, by name, whose tables are removed as well.")


def retention(instance: dg.DagsterInstance) -> timedelta:
    """How long unreferenced files must be kept: longer than the oldest unfinished run, which may still use them.

    Zero if no run is unfinished.
    """
    records = instance.get_run_records(dg.RunsFilter(statuses=list(_UNFINISHED)))
    starts = [record.start_time for record in records if record.start_time is not None]
    return timedelta(seconds=max(0.0, time.time() - min(starts))) + _MARGIN if starts else timedelta()


def build_maintenance_job(pipeline: Pipeline) -> dg.JobDefinition:
    """Build the job that maintains the lake; its only step shows what it did as metadata."""
    names = Names.of(pipeline)

    @dg.op(name=names.prefixed("maintain_lake"), out=dg.Out(dg.Nothing))
    def maintain_lake(context: dg.OpExecutionContext, config: MaintenanceConfig) -> dg.Output[None]:
        """Compact, vacuum and checkpoint the tables, and remove files that killed runs left behind."""
        try:
            pipeline.lake.check_owner()
            in_use = find_spaces(pipeline.lake, pipeline.refreshed().model.space.name).in_use
            age = retention(context.instance)
            done = maintain(pipeline.lake, in_use, age, config.dry_run, config.remove_spaces)
        except UserError as error:
            raise dg.Failure(description=str(error)) from None
        if done.failed:
            raise dg.Failure(description="; ".join(work.error for work in done.failed))
        return dg.Output(None, metadata=_metadata(done, config.dry_run))

    @dg.job(
        name=names.prefixed("maintain"),
        executor_def=one_process_executor,
        description="Compacts, vacuums and checkpoints the tables; safe while jobs run. `dry_run` only reports.",
    )
    def maintain_job() -> None:
        maintain_lake()

    return maintain_job


def _metadata(done: Maintenance, dry_run: bool) -> dict[str, dg.MetadataValue | bool | float | int]:
    rows = [asdict(work) for work in done.tables]
    names = [name for name in rows[0] if name != "error"] if rows else ["table"]
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    spaces = [f"- `{space.name}`: {space.bytes / 1e6:,.1f} MB, {done.use_of(space)}" for space in done.spaces]
    return {
        "tables": dg.MetadataValue.md("\n".join(lines)),
        "spaces": dg.MetadataValue.md("\n".join(spaces) or "none"),
        "abandoned_files": len(done.abandoned_files),
        "retention_hours": done.retention_hours,
        "dry_run": dry_run,
    }
