"""Summarises what a person should know of: what could not be read, by reason, and what the model can't read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa

from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, MOST_VALUES, REJECTED, is_one_of, quoted

EXAMPLES = 3
"""Names that a summary has of each reason: enough to recognise what it is about."""


@dataclass(frozen=True, slots=True)
class RejectedReason:
    """All rejections of one reason."""

    reason: str
    count: int
    examples: list[str]
    """The first names, as '<partition>/<document id>'."""
    detail: str
    """What was found in the first of them, and how to fix it."""


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """One row of rejected_documents."""

    partition_key: str
    document_id: str
    reason: str
    detail: str


def iter_rejections(tables: Snapshot, reason: str | None = None) -> Iterator[RejectedRow]:
    """The rejected documents, or those of one reason, in no particular order. Raises ``LakeError``."""
    columns = ("partition_key", "document_id", "reason", "detail")
    where = None if reason is None else f"reason = {quoted(reason)}"
    for batch in tables.rows(REJECTED, columns, where):
        for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield RejectedRow(*values)


def rejections_by_reason(tables: Snapshot) -> list[RejectedReason]:
    """The rejected documents by reason, the most frequent first. Raises ``LakeError``."""
    counts: Counter[str] = Counter()
    first: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in iter_rejections(tables):
        counts[row.reason] += 1
        named = (f"{row.partition_key}/{row.document_id}", row.detail)
        first[row.reason] = sorted([*first[row.reason], named])[:EXAMPLES]
    return [
        RejectedReason(reason, count, [name for name, _ in first[reason]], first[reason][0][1])
        for reason, count in sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    ]


def unknown_tokens(tables: Snapshot, keys: Collection[str]) -> dict[str, tuple[int, int]]:
    """(tokens unknown to the model's tokenizer, all tokens) of each of these partitions. Raises ``LakeError``."""
    found: dict[str, tuple[int, int]] = {}
    columns = ["partition_key", "token_count", "unknown_tokens"]
    # Naming the partitions limits the read to their files.
    where = is_one_of("partition_key", sorted(keys)) if 0 < len(keys) <= MOST_VALUES else None
    for batch in tables.rows(CHUNK_TABLE, columns, where) if keys else ():
        sums = pa.table(batch).group_by("partition_key").aggregate([("token_count", "sum"), ("unknown_tokens", "sum")])
        for key, tokens, unknown in zip(*(sums.column(name).to_pylist() for name in sums.column_names), strict=True):
            if key in keys:
                before = found.get(key, (0, 0))
                found[key] = (before[0] + (unknown or 0), before[1] + tokens)
    return found
