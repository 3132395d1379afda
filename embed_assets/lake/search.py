"""Exact nearest-neighbour search: scan all vectors in batches and keep the best `k`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import TableSpec, is_one_of


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


def search(tables: Snapshot, table: TableSpec, query: np.ndarray, k: int) -> list[SearchResult]:
    """The `k` chunks nearest to the unit-norm vector `query`, shape (dimension,), best first.

    One pass reads ids and vectors; texts are then fetched for the results only, from the same version of the table.
    Ties are ordered by chunk id. Returns an empty list if the space has no table.
    """
    best: list[tuple[float, str, str]] = []
    for batch in tables.rows(table, ["chunk_id", "partition_key", "embedding"]):
        vectors = batch.column("embedding").flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, -1)
        scores = vectors @ query
        top = np.argpartition(-scores, k - 1)[:k] if len(scores) > k else np.arange(len(scores))
        ids, keys = batch.column("chunk_id"), batch.column("partition_key")
        best += [(float(scores[i]), ids[int(i)].as_py(), keys[int(i)].as_py()) for i in top]
        best = sorted(best, key=lambda hit: (-hit[0], hit[1], hit[2]))[:k]
    if not best:
        return []
    # Naming the partitions limits the second read to their files.
    keys_of_best, ids_of_best = {key for _, _, key in best}, {chunk_id for _, chunk_id, _ in best}
    wanted = f"{is_one_of('partition_key', sorted(keys_of_best))} AND {is_one_of('chunk_id', sorted(ids_of_best))}"
    columns = ["chunk_id", "partition_key", "document_id", "uri", "heading_path", "text"]
    found = (row for batch in tables.rows(table, columns, wanted) for row in batch.to_pylist())
    rows = {(row["chunk_id"], row["partition_key"]): row for row in found}
    return [_result(score, rows[chunk_id, key]) for score, chunk_id, key in best]


def _result(score: float, row: dict[str, str]) -> SearchResult:
    return SearchResult(
        score, row["partition_key"], row["document_id"], row["chunk_id"], row["uri"], row["heading_path"], row["text"]
    )
