"""The commands that embed, search, check and measure."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embed_assets import cli_search, cli_spaces  # noqa: F401 (importing them adds their commands)
from embed_assets.commands import CommandResult, HomePath, command, main, open_pipeline
from embed_assets.console import (
    print_benchmark,
    print_hidden,
    print_maintenance,
    print_names,
    print_plan,
    print_rejections,
    print_spaces_of_sync,
    print_sync,
    print_tuning,
    print_unknown,
    stderr,
    stdout,
)
from embed_assets.errors import SettingsError
from embed_assets.locations import local_path
from embed_assets.settings import load_settings

if TYPE_CHECKING:
    from embed_assets.defs.sync import PartitionPlan, Plan
    from embed_assets.engine.capacity import Capacity
    from embed_assets.stages.pipeline import Pipeline

_TUNING_CHUNKS = 192
"""Chunks that `tune` embeds per budget: more make the measurement steadier, fewer make it faster."""
_SHORT_TOKENS = 64
"""Longest of the benchmark's short texts, in tokens."""


@command
@click.argument("folder", required=False, type=HomePath())
def sample(as_json: bool, folder: Path | None) -> CommandResult:
    """Write a small real corpus (the Python language reference) to FOLDER, by default EMBED_SOURCE."""
    from embed_assets.sample import write_sample

    source = load_settings().source
    folder = folder or local_path(source)
    if folder is None:
        raise SettingsError(f"the sample needs a local folder, got EMBED_SOURCE={source!r}; name one: sample DIR")
    counts = write_sample(folder)
    if not as_json:
        stdout.print(f"{sum(counts.values())} documents in {len(counts)} partitions under {folder}/", markup=False)
    return CommandResult({"folder": str(folder), "documents": sum(counts.values()), "partitions": counts})


@command
def init(as_json: bool) -> CommandResult:
    """Create or repair the Dagster instance of this folder or of DAGSTER_HOME.

    Every command does this itself; run it before programs that open the instance directly, such as `dagster dev`.
    """
    from embed_assets.defs.instance import open_instance

    with open_instance() as instance:
        root = instance.root_directory
    if not as_json:
        stdout.print(f"the Dagster instance in {root} is ready", markup=False)
    return CommandResult({"instance": root})


@command
def discover(as_json: bool) -> CommandResult:
    """List the source, register its partitions, and record which ones changed."""
    from embed_assets.defs.discovery import discover as discover_partitions
    from embed_assets.defs.discovery import with_emptied_partitions
    from embed_assets.defs.instance import open_instance
    from embed_assets.defs.names import Names
    from embed_assets.defs.staleness import load_history

    pipeline = open_pipeline()
    pipeline.lake.check_owner()
    with open_instance() as instance, stderr.status("listing the source") as status:
        listing = pipeline.corpus.source.listing()
        partitions = with_emptied_partitions(instance, listing.partitions, Names.of(pipeline))
        history = load_history(instance, pipeline)
        found = discover_partitions(instance, partitions, history, lambda line, share: status.update(line))
    if not as_json:
        print_names("new", found.added)
        print_names("changed", found.changed)
        print_names("emptied", found.emptied)
        stdout.print(f"{len(found.partitions)} partitions in {pipeline.corpus.source.root}", markup=False)
        print_hidden(listing.hidden)
    files = {key: len(partition.files) for key, partition in sorted(found.partitions.items())}
    changes = {"added": found.added, "changed": found.changed, "emptied": found.emptied}
    return CommandResult({"partitions": files, **changes, "hidden": list(listing.hidden)})


@command
@click.option("--count", is_flag=True, help="Also read and chunk, to count chunks and tokens and estimate the time.")
@click.option("--device", metavar="NAME", help="With --count: estimate for T4, L4, A10, A10G, A100, H100 or CPU.")
@click.option(
    "--devices", default=1, show_default=True, type=click.IntRange(min=1), help="Number of devices (CPU: cores)."
)
@click.option("--price", type=click.FloatRange(min=0), help="Price of one device per hour, in any currency.")
def plan(as_json: bool, count: bool, device: str | None, devices: int, price: float | None) -> CommandResult:
    """Show what is missing or stale, why, and (with --count) what it will cost. Changes nothing."""
    from embed_assets.defs.instance import open_instance
    from embed_assets.defs.sync import make_plan
    from embed_assets.lake.spaces import find_spaces

    if device is None and (price is not None or devices != 1):
        raise SettingsError("--devices and --price need a device, got none; name it with --device")
    if device is not None and not count:
        raise SettingsError(f"--device needs counted tokens, got --device {device} alone; add --count")
    pipeline = open_pipeline()
    with open_instance() as instance, stderr.status("reading, chunking and counting" if count else "planning"):
        made = make_plan(instance, pipeline, count)
    rows, seconds = [_plan_row(p) for p in made.partitions], made.estimated_seconds
    capacity = None if device is None else _capacity(pipeline, made, device, devices, price)
    if not as_json:
        print_plan(rows, count, seconds, capacity)
        if count:
            counts = {row["partition_key"]: (row["unknown_tokens"], row["tokens"]) for row in rows}
            print_unknown(counts, pipeline.settings.max_unknown_percent)
    active = find_spaces(pipeline.lake, pipeline.model.space.name).active
    if not as_json and active not in (None, pipeline.model.space.name):
        stdout.print(
            f"{pipeline.model.space.name} is built beside {active}, which readers use until it is promoted",
            markup=False,
            soft_wrap=True,
        )
    answer: dict[str, object] = {"partitions": rows, "space": pipeline.model.space.name, "active": active}
    if count:
        totals = ("chunks_to_embed", "chunks_to_reuse", "chunks_to_drop", "tokens", "unknown_tokens")
        answer |= {name: sum(row[name] for row in rows) for name in totals} | {"estimated_seconds": seconds}
    if capacity is not None:
        answer["capacity"] = asdict(capacity)
    return CommandResult(answer)


@command
@click.option("--partition", "partitions", multiple=True, metavar="KEY", help="Only this partition; may be repeated.")
@click.option("--allow-empty", is_flag=True, help="Drop everything if the source is empty.")
def sync(as_json: bool, partitions: Sequence[str], allow_empty: bool) -> CommandResult:
    """Discover, then materialize what is missing or stale. Exits 1 if any partition failed."""
    from embed_assets.stages.foresight import load_model_early

    pipeline = open_pipeline()
    listing = load_model_early(pipeline)

    from embed_assets.definitions import definitions_over
    from embed_assets.defs.instance import open_instance
    from embed_assets.defs.sync import SyncRequest, run_sync
    from embed_assets.lake.rejections import rejections_by_reason, unknown_tokens
    from embed_assets.lake.snapshot import Snapshot
    from embed_assets.lake.spaces import recorded_spaces
    from embed_assets.progress import ConsoleSink

    if not pipeline.model.is_calibrated:
        with stderr.status("quantizing the model to int8 once, on a sample of the documents"):
            pipeline = pipeline.calibrated()
    # Keep stdout for the result: redirect whatever libraries print.
    redirected = contextlib.redirect_stdout(sys.stderr)
    with open_instance() as instance, ConsoleSink(stderr) as sink, redirected:
        request = SyncRequest(partitions, allow_empty, listing)
        result = run_sync(instance, pipeline, partial(definitions_over, pipeline), sink, request)
    totals = {name: result.total(name) for name in ("embedded", "reused", "dropped", "tokens")}
    tables = Snapshot(pipeline.lake)
    rejections = rejections_by_reason(tables)
    unknown = unknown_tokens(tables, {key for key, r in result.partitions.items() if r.state == "materialized"})
    if not as_json:
        print_sync({key: r.as_json() for key, r in result.partitions.items()}, totals, result.seconds)
        print_rejections(rejections)
        print_hidden(result.hidden)
        print_unknown(unknown, pipeline.settings.max_unknown_percent)
    if result.failed:
        stderr.print(f"error: {len(result.failed)} of {len(result.partitions)} partitions failed", style="red")
    rows: dict[str, object] = {key: r.as_json() for key, r in result.partitions.items()}
    answer = {"partitions": rows, **totals, "seconds": result.seconds, "space": pipeline.model.space.name}
    answer |= {"rejections": [asdict(each) for each in rejections], "hidden": list(result.hidden)}
    answer["unknown_tokens"] = sum(count for count, _ in unknown.values())
    active = recorded_spaces(pipeline.lake).active
    answer |= {"active": active, "spaces": result.kept_totals()}
    if not as_json:
        print_spaces_of_sync(result.kept_totals(), result.promotion, active, pipeline.model.space.name)
    return CommandResult(answer, exit_code=int(not result.is_good))


@command
@click.option("--reason", metavar="CODE", help="Only those of this reason, such as empty.")
def rejected(as_json: bool, reason: str | None) -> CommandResult:
    """List the files and rows that could not be read or embedded, each with its reason and what to do."""
    from embed_assets.lake.rejections import iter_rejections
    from embed_assets.lake.snapshot import Snapshot

    rows = sorted(
        iter_rejections(Snapshot(open_pipeline().lake), reason), key=lambda row: (row.partition_key, row.document_id)
    )
    if not as_json:
        for row in rows:
            stdout.print(f"{row.partition_key}/{row.document_id}: {row.reason}", markup=False, soft_wrap=True)
            stdout.print(f"    {row.detail}", markup=False, soft_wrap=True, style="dim")
        stdout.print(f"{len(rows):,} rejected")
    return CommandResult({"rejected": [asdict(row) for row in rows]})


@command
@click.argument("key")
def forget(as_json: bool, key: str) -> CommandResult:
    """Forget partition KEY, whose files are gone: delete its rows from every table and its key from Dagster."""
    from embed_assets.defs.forget import forget as forget_partition
    from embed_assets.defs.instance import open_instance

    pipeline = open_pipeline()
    with open_instance() as instance:
        emptied = forget_partition(instance, pipeline, key)
    if not as_json:
        stdout.print(f"{key}: forgotten, rows deleted from {emptied} tables", markup=False)
    return CommandResult({"partition_key": key, "tables": emptied})


@command
def adopt(as_json: bool) -> CommandResult:
    """Assign the lake to the current EMBED_SOURCE and EMBED_NAME_PREFIX, after the documents moved."""
    pipeline = open_pipeline()
    was_foreign = pipeline.lake.adopt()
    if not as_json:
        change = "now belongs" if was_foreign else "has no tables yet, or already belonged,"
        stdout.print(f"the lake {pipeline.lake.root} {change} to {pipeline.lake.owner}", markup=False)
    return CommandResult({"lake": pipeline.lake.root, "source": pipeline.corpus.source.root, "adopted": was_foreign})


@command
@click.option("--repair", is_flag=True, help="Mark damaged partitions stale, so that the next sync rebuilds them.")
def verify(as_json: bool, repair: bool) -> CommandResult:
    """Check that every chunk has exactly one valid vector of its current text. Exits 1 if not."""
    from embed_assets.defs.instance import open_instance
    from embed_assets.defs.names import Names
    from embed_assets.defs.repair import mark_for_repair
    from embed_assets.lake.snapshot import Snapshot
    from embed_assets.lake.verify import verify as verify_table

    pipeline = open_pipeline()
    if repair:
        pipeline.lake.require_writable()
    pipeline.lake.check_readable(pipeline.embeddings_table)
    with stderr.status("verifying"):
        found = dict(verify_table(Snapshot(pipeline.lake), pipeline.embeddings_table, pipeline.model.space.model_input))
    damaged = {key: gaps for key, gaps in found.items() if gaps.total}
    if repair and damaged:
        with open_instance() as instance:
            mark_for_repair(instance, Names.of(pipeline), damaged)
    if not as_json:
        for key, gaps in damaged.items():
            stdout.print(
                f"{key}: " + ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in asdict(gaps).items() if n),
                markup=False,
            )
        advice = "marked stale, run 'embed-assets sync'" if repair else "run 'embed-assets verify --repair'"
        stdout.print(f"{len(found)} partitions checked, {len(damaged)} damaged" + (f": {advice}" if damaged else ""))
    return CommandResult(
        {
            "ok": not damaged,
            "checked": len(found),
            "repaired": repair and bool(damaged),
            "partitions": {key: asdict(gaps) for key, gaps in damaged.items()},
        },
        exit_code=int(bool(damaged)),
    )


@command
@click.option("--dry-run", is_flag=True, help="Only show what would be done.")
@click.option(
    "--remove-space", "spaces", multiple=True, metavar="NAME", help="Also remove the table of this unused space."
)
def maintain(as_json: bool, dry_run: bool, spaces: Sequence[str]) -> CommandResult:
    """Compact, vacuum and checkpoint the tables, and remove files that killed runs left. Safe during other runs."""
    from embed_assets.defs.instance import open_instance
    from embed_assets.defs.maintenance_job import retention
    from embed_assets.lake.maintenance import maintain as maintain_lake
    from embed_assets.lake.spaces import find_spaces

    pipeline = open_pipeline()
    pipeline.lake.check_owner()
    in_use = find_spaces(pipeline.lake, pipeline.model.space.name).in_use
    with open_instance() as instance, stderr.status("maintaining") as status:
        done = maintain_lake(pipeline.lake, in_use, retention(instance), dry_run, spaces, status.update)
    if not as_json:
        print_maintenance(done, dry_run)
    return CommandResult({"dry_run": dry_run, **asdict(done)}, exit_code=int(bool(done.failed)))


@command
@click.argument("folder", required=False, type=HomePath(exists=True, file_okay=False))
@click.option("--png", default="tuning.png", show_default=True, type=HomePath(), help="File of the plot.")
def tune(as_json: bool, folder: Path | None, png: Path) -> CommandResult:
    """Find and save the fastest library and token budget on this machine.

    Measures on chunks of the documents in FOLDER, by default the sample corpus.
    """
    from embed_assets.plots import can_plot, check_writable, plot_tuning

    pipeline = open_pipeline()
    if can_plot():
        check_writable(png)
    with stderr.status("reading documents") as status:
        with _pipeline_over(folder, precision="auto") as measured:
            texts = measured.corpus.sample(_TUNING_CHUNKS)
        status.update("loading the model")
        found = pipeline.model.engine.tune(
            texts, True, lambda library, point: status.update(f"{library}: {point.max_batch_tokens:,} tokens measured")
        )
    if can_plot():
        plot_tuning(found, f"{pipeline.model.space.name}, {pipeline.model.engine.info.precision}", png)
    if not as_json:
        print_tuning(found)
        plot = f"plot in {png}" if can_plot() else "no plot: pip install 'embed-assets[plots]'"
        stdout.print(f"{len(texts):,} chunks measured; {plot}; later runs use this result", markup=False)
    answer = asdict(found) | {"png": str(png) if can_plot() else None, "space": pipeline.model.space.name}
    return CommandResult(answer)


@command
@click.argument("folder", required=False, type=HomePath(exists=True, file_okay=False))
@click.option(
    "--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Rounds to take the median of."
)
@click.option(
    "--chunks", default=192, show_default=True, type=click.IntRange(min=8), help="Number of long chunks to embed."
)
def benchmark(as_json: bool, folder: Path | None, rounds: int, chunks: int) -> CommandResult:
    """Compare speed and vectors of the engine with SentenceTransformer.encode, on the CPU.

    Embeds long chunks, short texts and a mixed set of the documents in FOLDER, by default the sample corpus.
    """
    from embed_assets.engine.benchmark import run_benchmark

    with stderr.status("reading documents") as status, _pipeline_over(folder, precision="auto") as pipeline:
        long, short = pipeline.corpus.sample(chunks), pipeline.corpus.sample(chunks * 3, _SHORT_TOKENS)
        sets = {"long": long, "short": short, "mixed": [*long[::2], *short[::2]]}
        report = run_benchmark(pipeline.model.float_space, sets, rounds, status.update)
    if not as_json:
        print_benchmark(report)
    return CommandResult(asdict(report))


@contextlib.contextmanager
def _pipeline_over(folder: Path | None, **settings: str) -> Iterator[Pipeline]:
    """A pipeline over the documents in `folder`, or over the sample corpus if it is None."""
    from embed_assets.sample import write_sample
    from embed_assets.stages.pipeline import Pipeline

    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            write_sample(Path(temporary))
        source = load_settings(source=str(folder or temporary), partition_by="folder", **settings)
        yield Pipeline.from_settings(source)


def _capacity(pipeline: Pipeline, plan: Plan, device: str, devices: int, price: float | None) -> Capacity:
    """Estimate the time and cost of embedding the counted texts on a device."""
    from embed_assets.engine.capacity import cost_of_space, estimate_capacity

    estimates = [p.estimate for p in plan.partitions if p.estimate is not None]
    tokens, texts = sum(e.tokens for e in estimates), sum(e.to_embed for e in estimates)
    cost, precision = cost_of_space(pipeline.model.float_space), pipeline.settings.precision
    return estimate_capacity(cost, tokens, tokens / max(1, texts), device, precision, devices, price)


def _plan_row(plan: PartitionPlan) -> dict[str, Any]:
    """A partition of the plan as JSON."""
    row: dict[str, Any] = {
        "partition_key": plan.partition.key,
        "assets": {name: {"state": s.state, "reasons": list(s.reasons)} for name, s in plan.statuses.items()},
    }
    if plan.estimate is not None:
        row |= {
            "chunks_to_embed": plan.estimate.to_embed,
            "chunks_to_reuse": plan.estimate.to_reuse,
            "chunks_to_drop": plan.estimate.to_drop,
            "tokens": plan.estimate.tokens,
            "unknown_tokens": plan.estimate.unknown_tokens,
        }
    return row


if __name__ == "__main__":
    main()
