"""Asks spaces what their own chunks answer, and compares what they find."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from embed_assets.lake.nearest import nearest_chunks
from embed_assets.lake.snapshot import Snapshot
from embed_assets.quality.probe import TOP, Passage, ProbeQuery, choose_queries, reciprocal_rank
from embed_assets.stages.evaluation import embed_queries
from embed_assets.stages.pipeline import Pipeline

_COLUMNS = ("partition_key", "document_id", "char_start", "heading_path", "text")
_SPAN = ("partition_key", "document_id", "char_start", "char_end")


def queries_of(pipeline: Pipeline, tables: Snapshot) -> list[ProbeQuery]:
    """Queries made from a space's chunks, the same ones each time. Raises ``LakeError`` if they can't be read."""
    return choose_queries(_passages(pipeline, tables))


def reciprocal_ranks(pipeline: Pipeline, tables: Snapshot, queries: Sequence[ProbeQuery]) -> np.ndarray:
    """float64, shape (queries,): 1 / the place of the chunk that a query came from among the nearest; 0 if it is none.

    Embeds the queries with the space's model. Raises ``ModelError``, ``EmbeddingError`` or ``LakeError``.
    """
    vectors = embed_queries(pipeline, [query.text for query in queries])
    hits = nearest_chunks(tables, pipeline.embeddings_table, vectors, TOP, _SPAN)
    found = (
        [query.is_from(*(hit.row[name] for name in _SPAN)) for hit in near]
        for query, near in zip(queries, hits, strict=True)
    )
    return np.array([reciprocal_rank(each) for each in found])


def _passages(pipeline: Pipeline, tables: Snapshot) -> Iterator[Passage]:
    for batch in tables.rows(pipeline.embeddings_table, _COLUMNS):
        yield from map(Passage, *(column.to_pylist() for column in batch.columns))
