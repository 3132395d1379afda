"""What needs attention in an embedding lake, by its report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from embed_assets.report.data import Absent, Generation, Partition, Rejections, Report

_NAMED = 3
"""Items that a notice names; the page's sections have the others."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing that needs attention."""

    level: Literal["error", "warning"]
    """An error is a broken rule; a warning is worth a look."""
    text: str
    """A sentence: what was found, and where."""
    section: str
    """Field of the `Report` that has the details."""


def attention(report: Report) -> tuple[Notice, ...]:
    """All notices, errors first."""
    notices: list[Notice] = [
        *(() if isinstance(report.partitions, Absent) else _uncovered(report.partitions)),
        *(() if isinstance(report.generations, Absent) else _failed_gates(report.generations)),
        *(() if isinstance(report.rejections, Absent) else _rejected(report.rejections)),
        *_duplicates(report),
        *_norms(report),
        *_long_chunks(report),
        *_worse(report),
    ]
    return tuple(sorted(notices, key=lambda notice: notice.level))


def _uncovered(partitions: Sequence[Partition]) -> Iterator[Notice]:
    gaps = sorted((p for p in partitions if p.vectors < p.chunks), key=lambda p: p.vectors - p.chunks)
    if gaps:
        missing = sum(p.chunks - p.vectors for p in gaps)
        names = _some(f"{p.partition_key} ({p.chunks - p.vectors:,})" for p in gaps)
        what = f"{missing:,} chunks in {len(gaps):,} of {len(partitions):,} partitions have no vector: {names}."
        yield Notice("error", f"{what} Run 'embed-assets sync'.", "partitions")


def _failed_gates(generations: Sequence[Generation]) -> Iterator[Notice]:
    for generation in generations:
        failed = [gate.name for gate in generation.gates if not gate.passed]
        if failed and generation.state in ("active", "building", "ready"):
            which = f"{generation.space} ({generation.state}) fails {len(failed)} of {len(generation.gates)} gates"
            # One that is being built may still pass them.
            is_unfinished = generation.state == "building"
            yield Notice("warning" if is_unfinished else "error", f"{which}: {_some(failed)}.", "generations")


def _rejected(rejections: Rejections) -> Iterator[Notice]:
    count = sum(reason.count for reason in rejections.reasons)
    if not count:
        return
    percent = 100 * count / max(rejections.documents, count)
    limit = rejections.limit_percent
    is_over = limit is not None and percent > limit
    reasons = _some(f"{r.reason} ({r.count:,})" for r in sorted(rejections.reasons, key=lambda r: -r.count))
    what = f"{count:,} of {rejections.documents:,} documents were rejected, {_digits(percent)} %"
    allowed = f", and {limit:g} % may be" if is_over else ""
    yield Notice("error" if is_over else "warning", f"{what}{allowed}: {reasons}.", "rejections")


def _duplicates(report: Report) -> Iterator[Notice]:
    found = report.duplicates
    if isinstance(found, Absent) or found.limit_percent is None:
        return
    shares = {p.partition_key: 100 * p.repeated / p.chunks for p in found.partitions if p.chunks}
    over = sorted((key for key, share in shares.items() if share > found.limit_percent), key=lambda key: -shares[key])
    if over:
        names = _some(f"{key} ({shares[key]:.0f} %)" for key in over)
        what = f"More than {found.limit_percent:g} % of the chunks repeat another one in {_count(over, 'partition')}"
        yield Notice("error", f"{what}: {names}.", "duplicates")


def _norms(report: Report) -> Iterator[Notice]:
    norms = report.norms
    if isinstance(norms, Absent) or not norms.limits:
        return
    allowed = [limit.value for limit in norms.limits]
    if norms.smallest < min(allowed) or norms.largest > max(allowed):
        what = f"Vectors have norms from {norms.smallest:.4g} to {norms.largest:.4g}, and should have 1"
        yield Notice("error", f"{what}. Run 'embed-assets verify --repair'.", "norms")


def _long_chunks(report: Report) -> Iterator[Notice]:
    tokens = report.tokens
    if isinstance(tokens, Absent) or not tokens.limits:
        return
    limit = min(tokens.limits, key=lambda limit: limit.value)
    if tokens.largest > limit.value:
        what = f"The longest chunk has {tokens.largest:,.0f} tokens, {limit.label}"
        yield Notice("warning", f"{what}: the end of such a chunk is not in its vector.", "tokens")


def _worse(report: Report) -> Iterator[Notice]:
    evaluation = report.evaluation
    if isinstance(evaluation, Absent):
        return
    past = () if isinstance(report.generations, Absent) else report.generations
    given_up = {generation.space for generation in past if generation.state in ("previous", "retired")}
    for difference in evaluation.differences:
        if difference.high < 0 and difference.space not in given_up:
            what = f"{difference.space} is worse than {difference.baseline}: its {difference.measure} is lower by"
            yield Notice("warning", f"{what} {-difference.value:.3f} on {evaluation.queries:,} queries.", "evaluation")


def _count(items: Sequence[str], noun: str) -> str:
    return f"{len(items):,} {noun}{'' if len(items) == 1 else 's'}"


def _digits(percent: float) -> str:
    return f"{percent:.2g}" if percent < 10 else f"{percent:.0f}"


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many others there are."""
    listed = list(names)
    others = len(listed) - _NAMED
    return ", ".join(listed[:_NAMED]) + (f" and {others:,} more" if others > 0 else "")
