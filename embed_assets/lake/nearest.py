"""Exact nearest neighbours of many queries in one scan of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import TableSpec

_NONE = -np.inf


@dataclass(frozen=True, slots=True)
class Hit:
    """A row near a query."""

    score: float
    """Cosine similarity to the query, from -1 to 1."""
    row: Mapping[str, Any]
    """Its values by column."""


def nearest_chunks(
    tables: Snapshot, table: TableSpec, queries: np.ndarray, k: int, columns: Sequence[str]
) -> list[list[Hit]]:
    """The `k` chunks of a table nearest to each of the `queries`, as `nearest_rows`."""
    return nearest_rows(tables.rows(table, hit_columns([*columns, "embedding"])), queries, k, columns)


def hit_columns(columns: Sequence[str]) -> list[str]:
    """The columns of a hit's row: those asked for, and those that tell hits of the same score apart."""
    return list(dict.fromkeys(["chunk_id", "partition_key", *columns]))


def nearest_rows(
    batches: Iterable[pa.RecordBatch], queries: np.ndarray, k: int, columns: Sequence[str]
) -> list[list[Hit]]:
    """The `k` rows nearest to each of the unit-norm `queries`, shape (n, dimension), best first, with `columns`.

    `batches` have the `hit_columns` and `embedding`. Memory holds one batch, its scores, and the best rows so far.
    """
    names = hit_columns(columns)
    best = BestCandidates(len(queries), k)
    rows: dict[int, dict[str, Any]] = {}
    first = 0
    for batch in batches:
        numbers = np.arange(first, first + batch.num_rows)
        best.add(vectors_of(batch) @ queries.T, numbers)
        kept = best.kept()
        rows = {number: row for number, row in rows.items() if number in kept}
        new = sorted(number for number in kept if number >= first)
        found = batch.select(names).take(pa.array([number - first for number in new], pa.int64())).to_pylist()
        rows |= dict(zip(new, found, strict=True))
        first += batch.num_rows
    return [
        sorted(
            (Hit(score, rows[number]) for score, number in best.of(query)),
            key=lambda hit: (-hit.score, hit.row["chunk_id"], hit.row["partition_key"]),
        )
        for query in range(len(queries))
    ]


def nearest_documents(
    tables: Snapshot, table: TableSpec, queries: np.ndarray, depth: int
) -> list[list[tuple[str, float]]]:
    """The `depth` documents nearest to each of the `queries`, as `PARTITION_KEY/DOCUMENT_ID` and score, best first.

    A document's score is that of its best chunk. Memory holds one batch, its scores, and the best documents so far.
    """
    best = BestCandidates(len(queries), depth)
    names: dict[int, str] = {}
    for batch in tables.rows(table, ["partition_key", "document_id", "embedding"]):
        documents = pc.binary_join_element_wise(batch.column("partition_key"), batch.column("document_id"), "/")
        encoded = documents.dictionary_encode()
        found = encoded.dictionary.to_pylist()
        place = encoded.indices.to_numpy()
        order = np.argsort(place, kind="stable")
        starts = np.flatnonzero(np.diff(place[order], prepend=-1))
        scores = np.maximum.reduceat((vectors_of(batch) @ queries.T)[order], starts, axis=0)
        codes = np.fromiter(map(hash, found), np.int64, len(found))
        best.add_again(scores, codes)
        kept = best.kept()
        names = {code: name for code, name in names.items() if code in kept}
        names |= {code: name for code, name in zip(codes.tolist(), found, strict=True) if code in kept}
    return [
        sorted(((names[code], score) for score, code in best.of(query)), key=lambda hit: (-hit[1], hit[0]))
        for query in range(len(queries))
    ]


def vectors_of(batch: pa.RecordBatch) -> np.ndarray:
    """float32, shape (rows, dimension): the column `embedding` of a batch, whose vectors have one length."""
    flat = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(batch.num_rows, -1))


class BestCandidates:
    """The best `k` candidates of each query, by their numbers, as candidates come in."""

    def __init__(self, queries: int, k: int) -> None:
        self._k = k
        self._scores = np.empty((0, queries), np.float32)
        self._numbers = np.empty((0, queries), np.int64)

    def add(self, scores: np.ndarray, numbers: np.ndarray) -> None:
        """Add candidates that were not added before: scores of shape (candidates, queries) and their numbers."""
        if len(self._scores) == self._k:  # most can't be among the best of any query
            is_better = (scores > self._scores.min(axis=0)).any(axis=1)
            scores, numbers = scores[is_better], numbers[is_better]
        if len(scores) > self._k:
            top = np.argpartition(-scores, self._k - 1, axis=0)[: self._k]
            scores, numbers = np.take_along_axis(scores, top, axis=0), numbers[top]
        else:
            numbers = np.broadcast_to(numbers[:, None], scores.shape)
        scores, numbers = np.concatenate([self._scores, scores]), np.concatenate([self._numbers, numbers])
        if len(scores) > self._k:
            top = np.argpartition(-scores, self._k - 1, axis=0)[: self._k]
            scores, numbers = np.take_along_axis(scores, top, axis=0), np.take_along_axis(numbers, top, axis=0)
        self._scores, self._numbers = scores, numbers

    def add_again(self, scores: np.ndarray, numbers: np.ndarray) -> None:
        """As `add`, for candidates of which some were added before: each counts once, with its highest score."""
        scores = scores.copy()
        for i in np.flatnonzero(np.isin(numbers, self._numbers)):
            is_same = self._numbers == numbers[i]
            scores[i] = np.maximum(scores[i], np.where(is_same, self._scores, _NONE).max(axis=0))
            self._scores = np.where(is_same, _NONE, self._scores)
        self.add(scores, numbers)

    def kept(self) -> set[int]:
        """Numbers of all candidates that are among the best of a query."""
        return set(self._numbers[self._scores > _NONE].tolist())

    def of(self, query: int) -> list[tuple[float, int]]:
        """Score and number of the best candidates of one query, in no particular order."""
        column = zip(self._scores[:, query].tolist(), self._numbers[:, query].tolist(), strict=True)
        return [(score, number) for score, number in column if score > _NONE]
