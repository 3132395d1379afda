"""Searches a space for texts, with the model that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embed_assets.lake.copies import Copy
from embed_assets.lake.filters import filter_of
from embed_assets.lake.row_source import MappedRows, StoredRows
from embed_assets.lake.search import Search, SearchResult
from embed_assets.lake.search import search as search_rows
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.widening import Width, widened
from embed_assets.quality.duplicates import DEFAULT_COSINE
from embed_assets.records import CopyKind
from embed_assets.stages.evaluation import embed_queries
from embed_assets.stages.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search."""

    k: int = 10
    """Most results per query."""
    where: str = ""
    """Condition on rows, as in ``year >= 2020 and partition_key = 'a'``; empty: all."""
    groups: Sequence[str] | None = None
    """Search only what one of these groups may see, as the documents' field `acl` says; None: everything."""
    using: CopyKind | None = None
    """The copy to find candidates in; None: an exact search."""
    distinct: bool = False
    """Whether to leave out chunks that repeat a better one, or nearly so."""
    context: Width | None = None
    """How far to widen results: by so many chunks, or to the section; None: not at all."""


def search(
    pipeline: Pipeline, queries: Sequence[str], options: SearchOptions, mapped: MappedRows | None = None
) -> list[list[SearchResult]]:
    """Of each query the nearest chunks of the pipeline's space, best first.

    With `mapped`, rows are read from copies of the partitions, which are brought up to date. Raises ``SettingsError``
    for a wrong filter, ``LakeError``, ``ModelError`` or ``EmbeddingError``.
    """
    table = pipeline.lake.full(pipeline.embeddings_table)
    keep = filter_of(options.where, options.groups, table.schema)
    described = [column.name for column in pipeline.lake.metadata]
    wanted = Search(options.k, keep, DEFAULT_COSINE if options.distinct else None, described)
    with Snapshot(pipeline.lake) as tables:
        source = StoredRows(tables, table) if mapped is None else mapped.of(tables, table)
        copy = None if options.using is None else Copy(tables, table.space, options.using)
        found = search_rows(source, embed_queries(pipeline, queries), wanted, copy)
        return found if options.context is None else widened(source, tables, found, options.context)
