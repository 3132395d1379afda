"""Summarises what a person should know of: what could not be read, by reason, and what the model can't read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, REJECTED, quoted

EXAMPLES = 3
"""Names that a summary has of each reason: enough to recognise what it is about."""


@dataclass(slots=True)
class RejectedReason:
    """All rejections of one reason."""

    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first names, as '<partition>/<document id>'."""
    detail: str = ""
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
    found: dict[str, RejectedReason] = {}
    first: dict[str, list[tuple[str, str]]] = {}
    for row in iter_rejections(tables):
        summary = found.setdefault(row.reason, RejectedReason(row.reason))
        summary.count += 1
        names = first.setdefault(row.reason, [])
        if len(names) < EXAMPLES or (f"{row.partition_key}/{row.document_id}", "") < names[-1]:
            names[:] = sorted([*names, (f"{row.partition_key}/{row.document_id}", row.detail)])[:EXAMPLES]
    for reason, summary in found.items():
        summary.examples = [name for name, _ in first[reason]]
        summary.detail = first[reason][0][1]
    return sorted(found.values(), key=lambda summary: (-summary.count, summary.reason))


def unknown_tokens(tables: Snapshot, keys: Collection[str]) -> dict[str, tuple[int, int]]:
    """(tokens unknown to the model's tokenizer, all tokens) of each of these partitions. Raises ``LakeError``."""
    found: dict[str, tuple[int, int]] = {}
    columns = ["partition_key", "token_count", "unknown_tokens"]
    for batch in tables.rows(CHUNK_TABLE, columns) if keys else ():
        sums = pa.table(batch).group_by("partition_key").aggregate([("token_count", "sum"), ("unknown_tokens", "sum")])
        for key, tokens, unknown in zip(*(sums.column(name).to_pylist() for name in sums.column_names), strict=True):
            if key in keys:
                before = found.get(key, (0, 0))
                found[key] = (before[0] + (unknown or 0), before[1] + tokens)
    return found
