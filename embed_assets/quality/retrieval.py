"""Measures of rankings against labelled queries, and whether two ways to rank differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embed_assets.errors import SettingsError
from embed_assets.quality.labels import LabelledQuery, LabelledSet
from embed_assets.records import slices

if TYPE_CHECKING:
    from pytrec_eval import RelevanceEvaluator

Ranking = Sequence[tuple[str, float]]
"""Documents by name with their scores, best first. Its order counts, not the scores."""
_MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "mrr": "recip_rank"}
"""trec_eval's name of each metric."""
METRICS = tuple(_MEASURES)
_QUERIES_AT_ONCE = 100
"""Queries that trec_eval has copies of: 2 MB with 100 documents each. 1,000 take 13 MB and no less time."""
_RESAMPLES = 10_000
_DRAWN_AT_ONCE = 1 << 16
"""Queries drawn per step of the bootstrap, which stay in a core's cache: 2^18 take 2.4 times as long, 2^14 as long."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How good the rankings of a labelled set are."""

    query_ids: Sequence[str]
    per_query: np.ndarray
    """float64, shape (queries, metrics), from 0 to 1: each query's metrics, in the order of `METRICS`."""

    @property
    def means(self) -> dict[str, float]:
        """Mean over all queries, by metric."""
        return dict(zip(METRICS, self.per_query.mean(axis=0).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Difference:
    """How a metric differs between two ways to rank the same queries."""

    metric: str
    mean: float
    """Mean over the queries of the other's metric minus the baseline's."""
    low: float
    """Lower end of the mean's 95 % interval."""
    high: float
    """Upper end of the mean's 95 % interval. Where it does not include 0, the difference is unlikely to be chance."""
    wins: int
    """Queries for which the other is better."""
    losses: int
    """Queries for which the baseline is better."""
    ties: int


def require_library() -> type[RelevanceEvaluator]:
    """trec_eval's measures. Raises ``SettingsError`` where they are not installed."""
    try:
        from pytrec_eval import RelevanceEvaluator
    except ImportError as error:
        raise SettingsError(
            "EMBED_EVALUATION needs pytrec_eval, which is not installed; run pip install 'embed-assets[evaluation]' "
            "or unset it"
        ) from error
    return RelevanceEvaluator


def score_rankings(labelled: LabelledSet, rankings: Mapping[str, Ranking]) -> Scores:
    """The metrics of each query's ranking, by query id, as trec_eval computes them.

    nDCG uses the grades as gains; recall and reciprocal rank count documents of every grade. A query without a
    ranking has 0. A document counts at the first place where it stands, so that a ranking of chunks is one of their
    documents. Raises ``ValueError`` for a ranking of a query that is not in the set, ``SettingsError`` where the
    library is not installed.
    """
    unknown = rankings.keys() - {query.query_id for query in labelled.queries}
    if unknown:
        raise ValueError(
            f"rankings must be of queries of the labelled set, got {len(unknown)} others: {min(unknown)!r}"
        )
    evaluator = require_library()
    parts = [_score(evaluator, queries, rankings) for queries in slices(labelled.queries, _QUERIES_AT_ONCE)]
    return Scores([query.query_id for query in labelled.queries], np.concatenate(parts))


def _score(
    evaluator: type[RelevanceEvaluator], queries: Sequence[LabelledQuery], rankings: Mapping[str, Ranking]
) -> np.ndarray:
    """float64, shape (queries, metrics)."""
    judged: dict[str, dict[str, int]] = {}
    ranked: dict[str, dict[str, float]] = {}
    for number, query in enumerate(queries):
        places = _numbered(document for document, _ in rankings.get(query.query_id, ()))
        # trec_eval sorts by score and then by name: only different scores keep the order.
        ranked[str(number)] = {str(place): -float(place) for place in places.values()}
        # It ends the process at some names, such as those with a NUL: it gets numbers instead.
        names = _numbered([*places, *query.relevant])
        judged[str(number)] = {str(names[document]): grade for document, grade in query.relevant.items()}
    found = evaluator(judged, set(_MEASURES.values())).evaluate(ranked)
    return np.array([[found[str(n)][name] for name in _MEASURES.values()] for n in range(len(queries))])


def _numbered(documents: Iterable[str]) -> dict[str, int]:
    """Each document's place among the different ones, from 0."""
    return {document: place for place, document in enumerate(dict.fromkeys(documents))}


def compare(baseline: Scores, other: Scores) -> tuple[Difference, ...]:
    """How the other's metrics differ from the baseline's, one `Difference` per metric, in the order of `METRICS`.

    The interval is that of a paired bootstrap with 10,000 resamples of the queries, always the same ones. For
    10,000 queries it takes 2 s and 4 MB, for 100,000 18 s and 7 MB. Raises ``ValueError`` if the queries differ or
    there are none.
    """
    if list(baseline.query_ids) != list(other.query_ids) or not baseline.query_ids:
        raise ValueError(
            f"scores must be of the same queries, at least one, got {len(baseline.query_ids)} and "
            f"{len(other.query_ids)}; score both with the same labelled set"
        )
    differences = other.per_query - baseline.per_query
    low, high = np.quantile(_resampled_means(differences), [0.025, 0.975], axis=0)
    wins, losses = (differences > 0).sum(axis=0), (differences < 0).sum(axis=0)
    ties = len(differences) - wins - losses
    columns = (column.tolist() for column in (differences.mean(axis=0), low, high, wins, losses, ties))
    return tuple(Difference(*row) for row in zip(METRICS, *columns, strict=True))


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """Means of resamples of the rows, shape (resamples, columns), for values of shape (rows, columns)."""
    generator = np.random.default_rng(0)
    count = len(values)
    means = []
    for batch in slices(range(_RESAMPLES), max(1, _DRAWN_AT_ONCE // count)):
        # How often each row is drawn, for all resamples of the batch at once.
        drawn = generator.integers(count, size=(len(batch), count)) + np.arange(len(batch))[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        means.append(times @ values / count)
    return np.concatenate(means)
