"""Exact nearest neighbours: a scan over the vectors in batches that keeps the best so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embed_assets.lake.reader import read_rows, scan
from embed_assets.lake.tables import Lake, TableSpec


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One chunk that is near the query."""

    score: float
    """Cosine similarity."""
    partition_key: str
    document_id: str
    chunk_id: str
    uri: str
    heading_path: str
    text: str


def search(lake: Lake, table: TableSpec, query: np.ndarray, k: int) -> list[SearchResult]:
    """The `k` chunks whose unit-norm vectors are nearest to the query's, shape (dimension,), best first.

    One pass over (chunk_id, embedding); the texts are fetched for the winners only. Equal scores are ordered by id.
    None when the space has no table.
    """
    best: list[tuple[float, str, str]] = []
    for batch in scan(lake, table, ["chunk_id", "partition_key", "embedding"]):
        vectors = batch.column("embedding").flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, -1)
        scores = vectors @ query
        top = np.argpartition(-scores, k - 1)[:k] if len(scores) > k else np.arange(len(scores))
        ids, keys = batch.column("chunk_id"), batch.column("partition_key")
        best += [(float(scores[i]), ids[int(i)].as_py(), keys[int(i)].as_py()) for i in top]
        best = sorted(best, key=lambda hit: (-hit[0], hit[1], hit[2]))[:k]
    columns = ["chunk_id", "partition_key", "document_id", "uri", "heading_path", "text"]
    found = read_rows(lake, table, "chunk_id", sorted({chunk_id for _, chunk_id, _ in best}), columns)
    rows = {(row["chunk_id"], row["partition_key"]): row for row in found.to_pylist()}
    return [_result(score, rows[chunk_id, key]) for score, chunk_id, key in best]


def _result(score: float, row: dict[str, str]) -> SearchResult:
    return SearchResult(
        score, row["partition_key"], row["document_id"], row["chunk_id"], row["uri"], row["heading_path"], row["text"]
    )
