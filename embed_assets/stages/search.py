"""Searches a space for a text, with the model that made the space."""

from __future__ import annotations

from embed_assets.lake.search import SearchResult
from embed_assets.lake.search import search as search_table
from embed_assets.lake.snapshot import Snapshot
from embed_assets.quality.duplicates import DEFAULT_COSINE
from embed_assets.records import CopyKind
from embed_assets.stages.pipeline import Pipeline


def search(
    pipeline: Pipeline, query: str, k: int, using: CopyKind | None = None, distinct: bool = False
) -> list[SearchResult]:
    """The `k` chunks of the pipeline's space that are nearest to a text, best first.

    `using` and `distinct` are those of `lake.search`. Raises ``LakeError`` or ``ModelError``.
    """
    vector = pipeline.model.engine.embedder.embed_one(pipeline.model.space.query_prompt + query)
    least = DEFAULT_COSINE if distinct else None
    return search_table(Snapshot(pipeline.lake), pipeline.embeddings_table, vector, k, using, least)
