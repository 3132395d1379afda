"""Prints the results of commands as tables on stdout, and errors and warnings on stderr."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from embed_assets.defs.generations import SpaceSummary
    from embed_assets.engine.benchmark import Report
    from embed_assets.engine.capacity import Capacity
    from embed_assets.engine.tuning import Tuning
    from embed_assets.lake.generations import GateResult
    from embed_assets.lake.maintenance import Maintenance
    from embed_assets.lake.rejections import RejectedReason
    from embed_assets.lake.spaces import Promotion, Spaces
    from embed_assets.stages.evaluation import Evaluation

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_WIDTH_OF_PIPES = 200
"""Columns when the output is no terminal: fewer fold long reasons, more make wide logs."""


class _SafeConsole(Console):
    """A console that shows the control characters of texts in place of obeying them.

    A document could otherwise move the cursor, change colours or retitle the window of whoever searches it.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(visible(each) if isinstance(each, str) else each for each in objects), **options)


def visible(text: str) -> str:
    """The text with control characters, and those that turn the direction of writing, as escapes that JSON has too."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _console(is_stderr: bool = False) -> Console:
    console = _SafeConsole(stderr=is_stderr, highlight=False)
    return console if console.is_terminal else _SafeConsole(stderr=is_stderr, highlight=False, width=_WIDTH_OF_PIPES)


stderr = _console(is_stderr=True)
stdout = _console()


class WarningLines(logging.Handler):
    """Logging handler that prints each record as one line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        stderr.print(f"{record.levelname.lower()}: {record.getMessage()}", style="yellow", markup=False, soft_wrap=True)


def print_plan(
    rows: Sequence[dict[str, Any]], count: bool, seconds: float | None, capacity: Capacity | None = None
) -> None:
    """Print the rows of `plan --json` as a table, with counts and `seconds` of the model if `count` is set."""
    counts = ("chunks_to_embed", "chunks_to_reuse", "chunks_to_drop", "tokens") if count else ()
    shown = _table("partition", "state", "why", numbers=[name.removeprefix("chunks_") for name in counts])
    for row in rows:
        states = [asset["state"] for asset in row["assets"].values()]
        state = next((s for s in ("missing", "stale") if s in states), "fresh")
        why = "; ".join(
            f"{name}: {', '.join(asset['reasons'])}" for name, asset in row["assets"].items() if asset["reasons"]
        )
        if state == "missing" and all(s == "missing" for s in states):
            why = "never materialized"
        shown.add_row(escape(row["partition_key"]), state, escape(why), *(f"{row[name]:,}" for name in counts))
    stdout.print(shown)
    due = sum(any(a["state"] != "fresh" for a in row["assets"].values()) for row in rows)
    time = "" if seconds is None else f"; about {seconds:,.0f} s for the model"
    stdout.print(
        f"{due} of {len(rows)} partitions to materialize"
        + (f", {sum(r['tokens'] for r in rows):,} tokens{time}" if count else "")
    )
    if capacity is not None:
        _print_capacity(capacity)


def _print_capacity(capacity: Capacity) -> None:
    """Print time, cost and speed on a device as a sentence."""
    rate = capacity.price_per_hour
    price = "" if capacity.cost is None else f", cost {capacity.cost:,.2f} at {rate:g} per device hour"
    stdout.print(
        f"on {capacity.devices} x {capacity.device} ({capacity.about}): {_span(capacity.hours)}, "
        f"{_hours(capacity.device_hours)} device hours{price}; for the model alone, "
        f"estimated at {capacity.tokens_per_second:,.0f} tokens/s each",
        markup=False,
        soft_wrap=True,
    )
    if capacity.bottleneck != "devices":
        stdout.print(
            f"reading and chunking is the bottleneck: it takes {capacity.feed_cores} cores to keep the devices busy, "
            f"this machine has {capacity.cores} and needs {_span(capacity.feed_hours)}; on a Ray cluster, all are used",
            soft_wrap=True,
        )


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.3g}"


def _span(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:,.1f} s"
    return f"{hours * 60:,.1f} min" if hours < 1 else f"{hours:,.1f} h"


def print_sync(rows: dict[str, dict[str, Any]], totals: dict[str, int], seconds: float) -> None:
    """Print the partitions of `sync --json` as a table, and their errors on stderr."""
    names = ("documents", "rejected", "chunks", "embedded", "reused", "dropped")
    shown = _table("partition", "state", numbers=names)
    for key, row in rows.items():
        shown.add_row(escape(key), row["state"], *(f"{row[name]:,}" for name in names))
    stdout.print(shown)
    for key, row in rows.items():
        if row["error"]:
            stderr.print(f"{key}: {row['error']}", style="red", markup=False, soft_wrap=True)
        if row["rejected_chunks"]:
            chunks = "1 chunk" if row["rejected_chunks"] == 1 else f"{row['rejected_chunks']:,} chunks"
            stderr.print(f"{key}: {chunks} the model can't embed, see rejected_documents", style="yellow", markup=False)
    stdout.print(
        f"{totals['embedded']:,} chunks embedded ({totals['tokens']:,} tokens), {totals['reused']:,} reused, "
        f"{totals['dropped']:,} dropped in {seconds:,.1f} s"
    )


def print_rejections(reasons: Sequence[RejectedReason]) -> None:
    """Print what could not be read, by reason, with the first names and what to do; nothing if all could."""
    if not reasons:
        return
    total = sum(each.count for each in reasons)
    stdout.print(f"not read: {total:,} files or rows; 'embed-assets rejected' lists them with their reasons")
    for each in reasons:
        names = ", ".join(each.examples) + (", ..." if each.count > len(each.examples) else "")
        stdout.print(f"  {each.reason} ({each.count:,}): {names}", markup=False, soft_wrap=True)
        stdout.print(f"    {each.detail}", markup=False, soft_wrap=True, style="dim")


def print_unknown(counts: Mapping[str, tuple[int, int]], limit: float) -> None:
    """Warn of partitions of whose tokens more than `limit` percent are unknown to the model's tokenizer.

    `counts` are (unknown tokens, tokens) by partition.
    """
    shares = {key: 100 * unknown / tokens for key, (unknown, tokens) in counts.items() if tokens}
    high = sorted((key for key, share in shares.items() if share > limit), key=lambda key: -shares[key])
    if high:
        others = f" and {len(high) - 1:,} more partitions" if len(high) > 1 else ""
        stderr.print(
            f"{shares[high[0]]:.0f} % of the tokens of {high[0]!r}{others} are unknown to the model's tokenizer: such "
            "texts get nearly the same vector; choose a model for their language (EMBED_MODEL)",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def print_hidden(names: Sequence[str]) -> None:
    """Print the number and first names of files that were left out by name; nothing if there are none."""
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        stdout.print(
            f"left out: {len(names):,} files or folders whose names begin with a dot or match EMBED_IGNORE ({shown})",
            markup=False,
            soft_wrap=True,
        )


def print_spaces(found: Sequence[SpaceSummary], spaces: Spaces) -> None:
    """Print the spaces of a lake as a table, and what to do next if one waits to become active."""
    shown = _table("space", "state", "model", numbers=("rows", "coverage", "MB"))
    for each in found:
        numbers = (f"{each.rows:,}", f"{100 * each.coverage:.1f} %", f"{each.bytes / 1e6:,.1f}")
        shown.add_row(escape(each.space), each.state, escape(each.model), *numbers)
    stdout.print(shown)
    for each in found:
        if each.space == spaces.configured and each.state == "ready":
            stdout.print(f"{each.space} is complete: 'embed-assets promote' makes it active", markup=False)


def print_spaces_of_sync(
    kept: Mapping[str, Mapping[str, int]], promotion: Promotion | None, active: str | None, configured: str
) -> None:
    """Print what a sync did in other spaces than the configured one, and which one readers use if that is another."""
    for space, counts in kept.items():
        stdout.print(
            f"{space}: {counts['embedded']:,} chunks embedded as well, because it is still in use", markup=False
        )
    if promotion is not None:
        print_gates(promotion.gates)
    if active not in (None, configured):
        stdout.print(
            f"readers use {active}, until {configured} is promoted: see 'embed-assets spaces'",
            markup=False,
            soft_wrap=True,
        )


def print_gates(gates: Sequence[GateResult]) -> None:
    """Print what each gate found."""
    shown = _table("gate", "result", numbers=("value", "limit"))
    shown.add_column("")
    for gate in gates:
        result = "passed" if gate.passed else "[red]failed[/red]"
        shown.add_row(gate.name, result, _figure(gate.value), _figure(gate.limit), escape(gate.detail))
    if gates:
        stdout.print(shown)


def print_evaluation(found: Evaluation | None) -> None:
    """Print the metrics of each space, and how they differ from the first one's."""
    if found is None:
        stdout.print("no labelled queries: set EMBED_EVALUATION to compare spaces by them")
        return
    means = {space: scores.means for space, scores in found.scores.items()}
    shown = _table("space", numbers=means[found.baseline])
    for space, metrics in means.items():
        shown.add_row(escape(space), *(f"{value:.3f}" for value in metrics.values()))
    stdout.print(shown)
    for space, change in found.differences():
        stdout.print(
            f"{space}: {change.metric} {change.mean:+.3f} against {found.baseline} (95 % from {change.low:+.3f} to "
            f"{change.high:+.3f}); better for {change.wins:,} queries, worse for {change.losses:,}",
            markup=False,
            soft_wrap=True,
        )
    for note in found.labelled.notes:
        stderr.print(note, style="yellow", markup=False, soft_wrap=True)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.6g}"


def print_maintenance(done: Maintenance, dry_run: bool) -> None:
    """Print what `maintain` did, or would do with `dry_run`; errors and warnings go to stderr."""
    shown = _table("table", numbers=("small files", "of partitions", "to vacuum", "commits to checkpoint", "windows"))
    for work in done.tables:
        counts = (
            work.files_to_compact,
            work.partitions_to_compact,
            work.files_to_vacuum,
            work.commits_since_checkpoint,
            work.stale_windows,
        )
        shown.add_row(escape(work.table), *(f"{count:,}" for count in counts))
    stdout.print(shown)
    if done.abandoned_files:
        stdout.print(f"{len(done.abandoned_files)} unfinished files of killed processes", markup=False)
    for space in done.spaces:
        stdout.print(f"space {space.name}: {space.bytes / 1e6:,.1f} MB, {done.use_of(space)}", markup=False)
    status = "nothing was changed" if dry_run else "done"
    stdout.print(f"{status}; files of the last {done.retention_hours:,.0f} hours are kept", markup=False)
    for work in done.tables:
        if work.left_alone:
            stderr.print(
                f"warning: {work.table}: {work.left_alone} partitions were not compacted, other runs write to them"
            )
        if work.error:
            stderr.print(f"error: {work.error}", style="red", markup=False, soft_wrap=True)


def print_tuning(tuning: Tuning) -> None:
    """Print what fits the device's memory, each library's sweep of token budgets, and the sweet spot."""
    memory = _table(
        "library", numbers=("weights and the rest", "per token", "free", "batches at once", "fits (tokens)")
    )
    for library, need in tuning.memory.items():
        workers = tuning.workers[library]
        memory.add_row(
            library,
            _megabytes(need.base_bytes),
            f"{need.bytes_per_token / 1024:,.1f} KB",
            "not known" if tuning.free_bytes is None else _megabytes(tuning.free_bytes),
            str(workers),
            f"{need.fits(tuning.free_bytes, workers):,}",
        )
    stdout.print(memory)
    sweep = _table("library", numbers=("max_batch_tokens", "tokens/s", "padding"))
    sweep.add_column("")
    for library, points in tuning.points.items():
        for point in points:
            mark = "<- sweet spot" if library == tuning.library and point == tuning.spot else ""
            sweep.add_row(
                library,
                f"{point.max_batch_tokens:,}",
                f"{point.tokens_per_second:,.0f}",
                f"{point.padding_percent:.1f} %",
                mark,
            )
    stdout.print(sweep)


def print_benchmark(report: Report) -> None:
    """Print a benchmark report, with one table per set of texts."""
    stdout.print(f"{report.model} on {report.device}, medians of {report.rounds} interleaved rounds", markup=False)
    stdout.print(f"float32 matrix product: {report.ceiling_gflops:,.0f} GFLOP/s")
    numbers = ("tokens/s", "x encode", "x best encode", "least cosine", "mean cosine", "GFLOP/s", "of ceiling")
    for name, found in report.sets.items():
        shown = _table(f"{name}: {found.texts:,} texts, {found.tokens:,} tokens", numbers=numbers)
        for row in found.rows:
            shown.add_row(
                row.name,
                f"{row.tokens_per_second:,.0f}",
                f"{row.ratio_to_encode:.2f}",
                f"{row.ratio_to_best_encode:.2f}",
                f"{row.cosine_min:.6f}",
                f"{row.cosine_mean:.6f}",
                f"{row.gflops:,.0f}",
                f"{row.roofline_percent:.0f} %",
            )
        stdout.print()
        stdout.print(shown)
    for reason in report.left_out:
        stdout.print(f"not measured: {reason}", markup=False, soft_wrap=True)


def _megabytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MB"


def _table(*texts: str, numbers: Iterable[str] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in texts:
        table.add_column(name, overflow="fold", no_wrap=name == "state")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def print_names(label: str, names: Sequence[str]) -> None:
    """Print a line per name, for the first twenty."""
    for name in names[:20]:
        stdout.print(f"{label}: {name}", markup=False)
    if len(names) > 20:
        stdout.print(f"{label}: and {len(names) - 20} more")


def escape(text: str) -> str:
    """Escape text for output in which Rich interprets markup, and what a terminal would obey."""
    return visible(text).replace("[", r"\[")
