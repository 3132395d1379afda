"""Nearest-neighbour search among the rows that a filter keeps: exact, or exact among the candidates of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embed_assets.lake.copies import Copy
from embed_assets.lake.filters import Filter, all_of, one_of
from embed_assets.lake.nearest import Hit, hit_columns, nearest_rows
from embed_assets.lake.row_source import RowSource
from embed_assets.metadata import PREFIX

PLACE = ("partition_key", "document_id", "chunk_id")
"""Columns that tell a chunk from all others of a space."""
_TEXTS = ("uri", "title", "heading_path", "char_start", "char_end", "page_start", "page_end", "text")


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One chunk that matches the query."""

    score: float
    """Cosine similarity to the query, from -1 to 1."""
    partition_key: str
    document_id: str
    chunk_id: str
    uri: str
    title: str
    heading_path: str
    char_start: int
    """Where the chunk starts in its document, in code points."""
    char_end: int
    """Where it ends, exclusive."""
    page_start: int | None
    """The page that it begins on, from 1; None for documents without pages."""
    page_end: int | None
    text: str
    metadata: Mapping[str, Any]
    """By field of EMBED_METADATA the document's value; None where it has none."""
    context: str | None = None
    """The text around the chunk, with the chunk; None if it was not asked for."""


@dataclass(frozen=True, slots=True)
class Search:
    """What to find."""

    k: int = 10
    """Most results per query."""
    keep: Filter | None = None
    """The rows to search."""
    distinct: float | None = None
    """Leave out chunks that have the text of a better one, or at least this cosine to it."""
    metadata: Sequence[str] = ()
    """Columns of metadata to read."""


def search(
    source: RowSource, queries: np.ndarray, wanted: Search, using: Copy | None = None
) -> list[list[SearchResult]]:
    """The chunks nearest to each of the unit-norm vectors `queries`, shape (n, dimension), best first.

    With `using`, candidates are found in that copy of the space. One pass reads ids and vectors; texts are then fetched
    for the results only. Ties are ordered by chunk id. Raises ``LakeError`` if a table can't be read, or there is no
    such copy.
    """

    def nearest(vectors: np.ndarray, count: int, columns: Sequence[str]) -> list[list[Hit]]:
        if using is not None:
            return [using.nearest(source, vector, count, columns, wanted.keep) for vector in vectors]
        names = hit_columns([*columns, "embedding"])
        return nearest_rows(source.read(names, wanted.keep), vectors, count, columns)

    if wanted.distinct is None:
        found = nearest(queries, wanted.k, PLACE)
    else:
        found = [_distinct(nearest, query[None], wanted.k, wanted.distinct) for query in queries]
    return _with_texts(source, found, wanted.metadata)


def _with_texts(
    source: RowSource, found: Sequence[Sequence[Hit]], described: Sequence[str]
) -> list[list[SearchResult]]:
    places = {_place(hit.row) for hits in found for hit in hits}
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for batch in read_places(source, [*PLACE, *_TEXTS, *described], places):
        for row in batch.to_pylist():
            if _place(row) in places:
                metadata = {name.removeprefix(PREFIX): row.pop(name) for name in described}
                rows[_place(row)] = row | {"metadata": metadata}
    return [[SearchResult(score=hit.score, **rows[_place(hit.row)]) for hit in hits] for hits in found]


def read_places(source: RowSource, columns: Sequence[str], places: set[tuple[str, ...]]) -> Iterator[pa.RecordBatch]:
    """Batches with the rows of some chunks, and perhaps of others, given as the values of `PLACE` or its first two."""
    if places:
        # Naming partitions, documents and chunks limits what is read to a few row groups.
        names = list(zip(*places, strict=True))
        yield from source.read(columns, all_of(*map(one_of, PLACE, names)))


def _place(row: Any) -> tuple[str, ...]:
    return tuple(row[name] for name in PLACE)


def _distinct(
    nearest: Callable[[np.ndarray, int, Sequence[str]], list[list[Hit]]], query: np.ndarray, k: int, cosine: float
) -> list[Hit]:
    """The best `k` of the hits that don't repeat a better one, however many do."""
    count = k
    while True:
        [hits] = nearest(query, count, [*PLACE, "input_hash", "embedding"])
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
