"""The commands for embedding spaces: which there are, and which one readers use."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embed_assets.commands import CommandResult, HomePath, command, open_pipeline
from embed_assets.console import print_evaluation, print_gates, print_spaces, stderr, stdout
from embed_assets.errors import SettingsError
from embed_assets.records import COPY_KINDS, CopyKind
from embed_assets.settings import load_settings

if TYPE_CHECKING:
    from embed_assets.lake.spaces import Promotion


@command
def spaces(as_json: bool) -> CommandResult:
    """List the embedding spaces: the active one, which readers use, those being built, and what is left of others."""
    from embed_assets.defs.generations import Survey
    from embed_assets.defs.instance import open_instance

    pipeline = open_pipeline()
    pipeline.lake.check_owner()
    with open_instance() as instance, stderr.status("looking at the spaces"):
        survey = Survey.of(instance, pipeline)
        found = survey.summaries()
    if not as_json:
        print_spaces(found, survey.spaces)
    return CommandResult({"active": survey.spaces.active, "spaces": [asdict(each) for each in found]})


@command
@click.option("--space", "names", multiple=True, metavar="NAME", help="A space to evaluate; may be repeated.")
def evaluate(as_json: bool, names: Sequence[str]) -> CommandResult:
    """Evaluate spaces, by default the active one and that of the settings: by labelled queries, and by their gates.

    EMBED_EVALUATION names the queries. Exits 1 if a gate fails.
    """
    from embed_assets.defs.generations import Survey
    from embed_assets.defs.instance import open_instance
    from embed_assets.stages.evaluation import evaluate as evaluate_spaces
    from embed_assets.stages.evaluation import load_labels
    from embed_assets.stages.gates import judge

    pipeline = open_pipeline()
    pipeline.lake.check_owner()
    redirected = contextlib.redirect_stdout(sys.stderr)
    with open_instance() as instance, redirected, stderr.status("looking at the spaces") as status:
        survey = Survey.of(instance, pipeline)
        labelled = load_labels(pipeline.settings, survey.tables)
        trials = [survey.trial(name) for name in names or survey.compared()]
        gates = {t.space: judge(t, lambda name: status.update(f"gate {name}"), but="evaluation") for t in trials}
        status.update("searching for the labelled queries")
        found = evaluate_spaces([t.pipeline for t in trials], survey.tables, labelled) if labelled and trials else None
    if not as_json:
        for space, results in gates.items():
            stdout.print(space, markup=False, style="bold")
            print_gates(results)
        print_evaluation(found)
    is_good = all(gate.passed for results in gates.values() for gate in results)
    answer: dict[str, object] = {
        "queries": len(found.labelled.queries) if found else 0,
        "spaces": {space: found.scores[space].means if found else {} for space in gates},
        "differences": [{"space": s, "baseline": found.baseline, **asdict(d)} for s, d in found.differences()]
        if found
        else [],
        "gates": {space: [asdict(gate) for gate in results] for space, results in gates.items()},
        "notes": list(found.labelled.notes) if found else [],
    }
    return CommandResult(answer, exit_code=int(not is_good))


@command
@click.argument("space", required=False)
@click.option("--why", default="", help="The reason, for the record.")
def promote(as_json: bool, space: str | None, why: str) -> CommandResult:
    """Make SPACE, by default that of the settings, the active one if it is complete and passes its gates.

    Exits 1 and changes nothing if a gate fails.
    """
    from embed_assets.defs.active_asset import show_active
    from embed_assets.defs.generations import Survey
    from embed_assets.defs.instance import open_instance
    from embed_assets.lake.spaces import Signature, this_user
    from embed_assets.stages.promotion import promote as promote_space

    pipeline = open_pipeline()
    pipeline.lake.require_writable()
    pipeline.lake.check_owner()
    # Keep stdout for the result: redirect whatever libraries print.
    redirected = contextlib.redirect_stdout(sys.stderr)
    with open_instance() as instance, redirected, stderr.status("looking at the spaces") as status:
        survey = Survey.of(instance, pipeline)
        trial = survey.trial(space or survey.spaces.configured)
        signed = Signature(this_user(), why)
        done = promote_space(pipeline.lake, survey.spaces, trial, signed, lambda name: status.update(f"gate {name}"))
        if not done.failed:
            show_active(instance, pipeline)
    return _answer(done, as_json)


@command
@click.option("--why", default="", help="The reason, for the record.")
def rollback(as_json: bool, why: str) -> CommandResult:
    """Make the space that was active before the active one again. Embeds nothing."""
    from embed_assets.arrow_startup import skip_pandas
    from embed_assets.lake.spaces import Signature, recorded_spaces, this_user
    from embed_assets.lake.spaces import rollback as roll_back
    from embed_assets.lake.tables import Lake

    # Neither the model nor Dagster is loaded, so that it takes no time. The UI shows it after the sensor's next tick.
    skip_pandas()
    lake = Lake.from_settings(load_settings())
    lake.check_owner()
    return _answer(roll_back(lake, recorded_spaces(lake), Signature(this_user(), why)), as_json)


@command
@click.argument("kind", type=click.Choice(COPY_KINDS))
@click.option("--space", metavar="NAME", help="The space to copy; default: the active one.")
def derive(as_json: bool, kind: CopyKind, space: str | None) -> CommandResult:
    """Make a small copy of a space's vectors, a bit (binary) or a byte (int8) per dimension, or bring it up to date.

    Uses no model. `search --using KIND` finds candidates in it and scores them exactly. Runs keep it up to date.
    """
    from embed_assets.lake.copies import update_copy
    from embed_assets.lake.snapshot import Snapshot
    from embed_assets.lake.spaces import find_spaces

    pipeline = open_pipeline()
    pipeline.lake.check_owner()
    active = find_spaces(pipeline.lake, pipeline.model.space.name).active
    with Snapshot(pipeline.lake) as tables, stderr.status("copying"):
        done = update_copy(tables, space or active or pipeline.model.space.name, kind)
    if not as_json:
        stdout.print(
            f"{done.space}: {done.rows:,} vectors of {done.bytes_per_vector} bytes in the {kind} copy; "
            f"{done.partitions:,} partitions were new or changed",
            markup=False,
        )
    return CommandResult(asdict(done))


@command
@click.argument("file", type=HomePath(dir_okay=False), default="report.html")
def report(as_json: bool, file: Path) -> CommandResult:
    """Write one HTML page about the lake to FILE: a map, distributions, runs, rejections, gates, duplicates, outliers.

    The page needs no network. It contains passages of the documents.
    """
    from embed_assets.defs.generations import Survey
    from embed_assets.defs.instance import open_instance
    from embed_assets.defs.report import gather
    from embed_assets.report.page import render

    pipeline = open_pipeline()
    pipeline.lake.check_owner()
    redirected = contextlib.redirect_stdout(sys.stderr)
    with open_instance() as instance, redirected, stderr.status("looking at the spaces") as status:
        page = render(gather(Survey.of(instance, pipeline), status.update))
    try:
        file.write_text(page, "utf-8")
    except OSError as error:
        raise SettingsError(f"the report must be a file that can be written, got {str(file)!r}: {error}") from error
    if not as_json:
        stdout.print(f"{file}: {len(page.encode()) / 1e6:.1f} MB; open it in a browser", markup=False)
    return CommandResult({"file": str(file), "bytes": len(page.encode())})


@command
@click.argument("space")
@click.option("--why", default="", help="The reason, for the record.")
def retire(as_json: bool, space: str, why: str) -> CommandResult:
    """Remove SPACE, by name: arriving documents no longer go into it, and its table is deleted."""
    from embed_assets.lake.spaces import Signature, find_spaces, this_user
    from embed_assets.lake.spaces import retire as retire_space

    pipeline = open_pipeline()
    pipeline.lake.check_owner()
    found = find_spaces(pipeline.lake, pipeline.model.space.name)
    retire_space(pipeline.lake, found, space, Signature(this_user(), why))
    if not as_json:
        stdout.print(f"{space}: retired, its table is deleted", markup=False)
    return CommandResult({"retired": space, "active": found.active})


def _answer(done: Promotion, as_json: bool) -> CommandResult:
    if not as_json:
        print_gates(done.gates)
        if done.failed:
            stderr.print(
                f"error: {len(done.failed)} of {len(done.gates)} gates failed; nothing was changed", style="red"
            )
        before = f"; 'embed-assets rollback' goes back to {done.previous}" if done.previous else ""
        stdout.print(f"active: {done.active or 'none'}{before}", markup=False, soft_wrap=True)
    answer: dict[str, object] = {
        "active": done.active,
        "previous": done.previous,
        "gates": [asdict(g) for g in done.gates],
    }
    return CommandResult(answer, exit_code=int(bool(done.failed)))
