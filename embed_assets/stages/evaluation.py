"""Evaluates spaces by a user's own labelled queries: how well each finds their relevant documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from embed_assets.errors import EmbeddingError, SettingsError
from embed_assets.lake.nearest import nearest_documents
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import RAW
from embed_assets.quality.labels import LabelledSet, match_documents, read_labels
from embed_assets.quality.retrieval import Difference, Ranking, Scores, compare, require_library, score_rankings
from embed_assets.records import slices
from embed_assets.settings import Settings
from embed_assets.stages.pipeline import Pipeline

_DEPTH = 100
"""Documents that are ranked per query: a first relevant one below that counts as not found."""
_QUERIES_AT_ONCE = 1000
"""Queries per scan of a table. More take more memory, 4 bytes for each and each of a batch's 8,192 rows."""


def load_labels(settings: Settings, tables: Snapshot) -> LabelledSet | None:
    """The labelled set of the settings, with the corpus's documents; None if there is none.

    Raises ``SettingsError`` if it can't be read, or names no document of the corpus.
    """
    if settings.evaluation is None:
        return None
    require_library()
    matched = match_documents(read_labels(settings.evaluation), _documents(tables))
    if not matched.found:
        raise SettingsError(
            f"EMBED_EVALUATION must name documents of the corpus, none of the {matched.unknown.count:,} in "
            f"{settings.evaluation!r} is one ({', '.join(matched.unknown.examples)}); write them as "
            "PARTITION_KEY/DOCUMENT_ID, as 'embed-assets search --json' does"
        )
    return matched.labelled


def score_space(pipeline: Pipeline, tables: Snapshot, labelled: LabelledSet) -> Scores:
    """How well a space finds the relevant documents, by exact search.

    Embeds the queries with the space's model. Raises ``ModelError``, ``EmbeddingError`` or ``LakeError``.
    """
    rankings: dict[str, Ranking] = {}
    for queries in slices(labelled.queries, _QUERIES_AT_ONCE):
        vectors = embed_queries(pipeline, [query.text for query in queries])
        found = nearest_documents(tables, pipeline.embeddings_table, vectors, _DEPTH)
        rankings |= dict(zip((query.query_id for query in queries), found, strict=True))
    return score_rankings(labelled, rankings)


def embed_queries(pipeline: Pipeline, texts: Sequence[str]) -> np.ndarray:
    """float32, shape (texts, dimension): unit-norm vectors of queries. Raises ``ModelError`` or ``EmbeddingError``."""
    prompt = pipeline.model.space.query_prompt
    found = pipeline.model.engine.embedder.embed([prompt + text for text in texts])
    for row, reason in found.rejected.items():
        raise EmbeddingError(f"the query {texts[row][:80]!r} could not be embedded: {reason}; change it")
    return found.vectors


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Spaces compared by a labelled set."""

    labelled: LabelledSet
    scores: dict[str, Scores]
    """By space."""
    baseline: str
    """The space that others are compared with."""

    def differences(self) -> Iterator[tuple[str, Difference]]:
        """(space, how a metric of it differs from the baseline's), for all other spaces."""
        for space, scores in self.scores.items():
            if space != self.baseline:
                for difference in compare(self.scores[self.baseline], scores):
                    yield space, difference


def evaluate(pipelines: Sequence[Pipeline], tables: Snapshot, labelled: LabelledSet) -> Evaluation:
    """Score the spaces of pipelines; the first is the baseline. One model is loaded at a time."""
    scores = {p.model.space.name: score_space(p, tables, labelled) for p in pipelines}
    return Evaluation(labelled, scores, pipelines[0].model.space.name)


def _documents(tables: Snapshot) -> Iterator[tuple[str, str]]:
    for batch in tables.rows(RAW, ["partition_key", "document_id"]):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
