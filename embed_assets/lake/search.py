"""Nearest-neighbour search: exact, or exact among the candidates of a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from embed_assets.lake.copies import search_copy
from embed_assets.lake.nearest import Hit, nearest_chunks
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import TableSpec, is_one_of
from embed_assets.records import CopyKind

_COLUMNS = ("partition_key", "document_id", "chunk_id", "uri", "heading_path", "text")


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One chunk that matches the query."""

    score: float
    """Cosine similarity to the query, from -1 to 1."""
    partition_key: str
    document_id: str
    chunk_id: str
    uri: str
    heading_path: str
    text: str


def search(
    tables: Snapshot,
    table: TableSpec,
    query: np.ndarray,
    k: int,
    using: CopyKind | None = None,
    distinct: float | None = None,
) -> list[SearchResult]:
    """The `k` chunks nearest to the unit-norm vector `query`, shape (dimension,), best first.

    With `using`, candidates are found in that copy of the space. With `distinct`, chunks are left out that have the
    text of a better one, or at least this cosine to it. One pass reads ids and vectors; texts are then fetched for the
    results only, from the same version of the table. Ties are ordered by chunk id. Returns an empty list if the space
    has no table. Raises ``LakeError`` if a table can't be read, or there is no such copy.
    """

    def nearest(count: int, columns: Sequence[str]) -> list[Hit]:
        if using is None:
            return nearest_chunks(tables, table, query[None], count, columns)[0]
        return search_copy(tables, table.space, using, query, count, columns)

    hits = nearest(k, []) if distinct is None else _distinct(nearest, k, distinct)
    if not hits:
        return []
    places = [(str(hit.row["partition_key"]), str(hit.row["chunk_id"])) for hit in hits]
    # Naming the partitions limits the second read to their files.
    keys, ids = (sorted({place[i] for place in places}) for i in (0, 1))
    wanted = f"{is_one_of('partition_key', keys)} AND {is_one_of('chunk_id', ids)}"
    found = (row for batch in tables.rows(table, _COLUMNS, wanted) for row in batch.to_pylist())
    rows = {(row["partition_key"], row["chunk_id"]): row for row in found}
    return [SearchResult(hit.score, **rows[place]) for hit, place in zip(hits, places, strict=True)]


def _distinct(nearest: Callable[[int, Sequence[str]], list[Hit]], k: int, cosine: float) -> list[Hit]:
    """The best `k` of the hits that don't repeat a better one, however many do."""
    count = k
    while True:
        hits = nearest(count, ["input_hash", "embedding"])
        kept: list[Hit] = []
        for hit in hits:
            if len(kept) < k and not any(_repeats(hit, better, cosine) for better in kept):
                kept.append(hit)
        if len(kept) == k or len(hits) < count:
            return kept
        count *= 4


def _repeats(hit: Hit, better: Hit, cosine: float) -> bool:
    if hit.row["input_hash"] == better.row["input_hash"]:
        return True
    return float(np.dot(hit.row["embedding"], better.row["embedding"])) >= cosine
