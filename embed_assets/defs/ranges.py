"""Groups partitions into ranges: a run of Dagster's takes a range of partitions, in the order of their registration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

_MAX_FRESH_BETWEEN = 250
"""Fresh partitions that a run passes over between two due ones, at a millisecond each; another run takes 0.5 s.
If the run fails, they are recorded anew, at 30 ms each, because Dagster would show them as failed."""


def run_ranges(
    registered: Sequence[str], due: Collection[str], fresh: Collection[str]
) -> Iterator[tuple[str, str, list[str]]]:
    """Group the due keys into ranges in Dagster's order, one for each run: (first, last, due keys of the range).

    A range may include up to `_MAX_FRESH_BETWEEN` fresh partitions between two due ones, but no others.
    """
    due, found = set(due), list[str]()
    skipped = 0
    for key in registered:
        if key in due:
            found.append(key)
            skipped = 0
        elif found:
            skipped += 1
            if key not in fresh or skipped > _MAX_FRESH_BETWEEN:
                yield found[0], found[-1], found
                found, skipped = [], 0
    if found:
        yield found[0], found[-1], found
