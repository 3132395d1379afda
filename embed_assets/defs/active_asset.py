"""The asset `active_embeddings`: its materialization is the promotion of a space, its blocking checks are the gates."""
# No `from __future__ import annotations`: Dagster inspects annotations as classes, see
# https://github.com/dagster-io/dagster/issues/26837

from collections.abc import Callable, Iterator, Sequence

import dagster as dg
from dagster import DagsterInstance

from embed_assets.defs.automation import build_promotion_condition
from embed_assets.defs.dagster_internals import RANGE_START_TAG, drop_planned_evaluations
from embed_assets.defs.generations import Survey
from embed_assets.defs.names import ACTIVE, POOL, Names
from embed_assets.defs.resources import engine_key
from embed_assets.errors import UserError
from embed_assets.lake.generations import Change, GateResult, Generations, read_generations
from embed_assets.lake.spaces import Promotion, Signature
from embed_assets.stages.gates import GATES, judge
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.promotion import promote

_PARTITION_TAGS = {"dagster/partition", RANGE_START_TAG}
_DESCRIPTION = (
    "The embedding space that readers use: one row of the table `generations`, which has every change of it. "
    "Materializing it promotes the space of the settings, if that is complete and passes its gates."
)


def build_active_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    """Build the asset over `pipeline`."""
    names = Names.of(pipeline)
    key = names.key(ACTIVE)
    is_automatic = pipeline.settings.promote == "auto" and not pipeline.settings.read_only
    checks = [dg.AssetCheckSpec(gate.name, asset=key, description=gate.description, blocking=True) for gate in GATES]

    @dg.multi_asset(
        name=names.prefixed("promote_space"),
        specs=[
            dg.AssetSpec(
                key=key,
                deps=[names.key("embeddings")],
                description=_DESCRIPTION,
                group_name=names.group,
                kinds={"deltalake"},
                owners=["team:data"],
                skippable=True,
                automation_condition=build_promotion_condition(pipeline) if is_automatic else None,
            )
        ],
        check_specs=checks,
        can_subset=True,
        pool=POOL,
        # Without partitions of its own, but `--partition-range` must take it along with those that have them.
        backfill_policy=dg.BackfillPolicy.single_run(),
        required_resource_keys={engine_key(names)},
    )
    def promote_space(
        context: dg.AssetExecutionContext,
    ) -> Iterator[dg.Output[None] | dg.MaterializeResult[None]]:
        """Evaluate the gates of the space of the settings and, if all pass, make it the active one."""
        is_selected = key in context.selected_asset_keys
        try:
            own = getattr(context.resources, engine_key(names)).applied_to(pipeline)
            if is_selected and context.run.tags.keys() & _PARTITION_TAGS:
                context.log.info("a run of partitions promotes nothing: materialize active_embeddings alone")
                done = Promotion(None, None)
            elif is_selected:
                survey, signed = Survey.of(context.instance, own), Signature(f"run {context.run.run_id}")
                trial = survey.trial(survey.spaces.configured)
                done = promote(own.lake, survey.spaces, trial, signed, context.log.info)
            else:
                done = Promotion(None, None, _evaluated(Survey.of(context.instance, own), context.log.info))
        except UserError as error:
            raise dg.Failure(description=str(error)) from None
        # Yielded as results, a failed one would fail a run of checks alone.
        selected = {check.name for check in context.selected_asset_check_keys}
        for gate in done.gates:
            if gate.name in selected:
                context.log_event(_event(key, gate))
        yield from (dg.Output(None, c.get_python_identifier()) for c in checks if c.name in selected)
        if done.active is None:
            drop_planned_evaluations(context.instance, context.run.run_id, context.selected_asset_check_keys)
            return
        if done.failed:
            failed = "; ".join(f"{gate.name}: {gate.detail}" for gate in done.failed)
            raise dg.Failure(description=f"{own.model.space.name!r} does not become active, gates failed: {failed}")
        yield dg.MaterializeResult(asset_key=key, metadata=_metadata(read_generations(own.lake)))

    return promote_space


def _evaluated(survey: Survey, on_gate: Callable[[str], None]) -> Sequence[GateResult]:
    """What the gates say of the space of the settings, for a run of checks alone; nothing if it has no table."""
    space = survey.spaces.configured
    return judge(survey.trial(space), on_gate) if space in survey.spaces.tables else ()


def show_active(instance: DagsterInstance, pipeline: Pipeline) -> None:
    """Record the active space in Dagster, and its gates, if somebody changed it outside of Dagster.

    Raises ``LakeError`` if it can't be read.
    """
    generations, key = read_generations(pipeline.lake), Names.of(pipeline).key(ACTIVE)
    if not generations.changes:
        return
    latest = instance.get_latest_materialization_event(key)
    shown = latest.asset_materialization.metadata if latest and latest.asset_materialization else {}
    number = shown.get("change")
    if number is not None and number.value == len(generations.changes):
        return
    for gate in generations.changes[-1].gates:
        instance.report_runless_asset_event(_event(key, gate))
    instance.report_runless_asset_event(dg.AssetMaterialization(asset_key=key, metadata=_metadata(generations)))


def _metadata(generations: Generations) -> dict[str, dg.MetadataValue | str | int]:
    last = generations.changes[-1]
    return {
        "space": last.active,
        "previous": last.previous or "none",
        "change": len(generations.changes),
        "changed_by": last.changed_by,
        "reason": last.reason or "none given",
        "history": dg.MetadataValue.md(_history(generations.changes)),
    }


def _history(changes: Sequence[Change]) -> str:
    """Markdown table of the changes, newest first."""
    lines = [
        f"| {c.changed_at:%Y-%m-%d %H:%M} | {c.action.replace('_', ' ')} | `{c.space}` | {c.changed_by} | {c.reason} |"
        for c in reversed(changes)
    ]
    return "\n".join(["| when (UTC) | | space | by | why |", "|---|---|---|---|---|", *lines[:50]])


def _numbers(gate: GateResult) -> dict[str, float]:
    figures = {"value": gate.value, "limit": gate.limit}
    return {name: float(figure) for name, figure in figures.items() if figure is not None}


def _event(key: dg.AssetKey, gate: GateResult) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=key,
        check_name=gate.name,
        passed=gate.passed,
        description=gate.detail,
        metadata=_numbers(gate),
        severity=dg.AssetCheckSeverity.ERROR,
        blocking=True,
    )
