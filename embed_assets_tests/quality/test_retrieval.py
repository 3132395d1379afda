"""Metrics of rankings, by hand and against another implementation, and the comparison of two ways to rank."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_assets.quality.labels import LabelledQuery, LabelledSet
from embed_assets.quality.retrieval import METRICS, Ranking, Scores, compare, score_rankings


def labelled(**relevant: Mapping[str, int]) -> LabelledSet:
    return LabelledSet([LabelledQuery(key, "how to", grades) for key, grades in relevant.items()], "labels.jsonl")


def ranking(documents: str | list[str], score: float = 0.5) -> Ranking:
    """Documents in order, all with the same score."""
    return [(document, score) for document in documents]


def test_metrics_are_those_computed_by_hand() -> None:
    # Grades 3 and 1 on the second and third place, one of grade 2 missed.
    gained = 3 / math.log2(3) + 1 / math.log2(4)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    found = score_rankings(labelled(q={"x": 3, "y": 1, "z": 2}), {"q": ranking("axyb")})
    assert METRICS == ("ndcg@10", "recall@10", "mrr")
    assert found.means == pytest.approx({"ndcg@10": gained / ideal, "recall@10": 2 / 3, "mrr": 1 / 2})


def test_what_stands_below_the_tenth_place_counts_for_mrr_only() -> None:
    found = score_rankings(labelled(q={"k": 1}, r={"j": 1}), {"q": ranking("abcdefghijk"), "r": ranking("abcdefghij")})
    assert found.per_query == pytest.approx(np.array([[0, 0, 1 / 11], [1 / math.log2(11), 1, 1 / 10]]))


def test_queries_without_a_ranking_count_as_zero() -> None:
    found = score_rankings(labelled(q={"a": 1}, none={"a": 1}, empty={"a": 1}), {"q": ranking("a"), "empty": []})
    assert found.query_ids == ["q", "none", "empty"]
    assert found.per_query.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert found.means == pytest.approx(dict.fromkeys(METRICS, 1 / 3))
    assert score_rankings(labelled(q={"a": 1}), {}).means == dict.fromkeys(METRICS, 0)


@pytest.mark.parametrize("order", itertools.permutations("abc"))
def test_the_order_of_equal_scores_is_kept(order: tuple[str, ...]) -> None:
    for scores in ([0.5, 0.5, 0.5], [1.0, 2.0, 3.0], [0.5, 0.5 - 1e-12, 0.5 - 2e-12], [math.nan] * 3):
        found = score_rankings(labelled(q={"b": 1}), {"q": list(zip(order, scores, strict=True))})
        assert found.means["mrr"] == pytest.approx(1 / (1 + order.index("b")))


def test_a_document_counts_at_its_first_place() -> None:
    chunks = score_rankings(labelled(q={"b": 1, "c": 2}), {"q": ranking("aaabbacab")})
    assert chunks.means == score_rankings(labelled(q={"b": 1, "c": 2}), {"q": ranking("abc")}).means


@pytest.mark.parametrize("name", ["", " a b ", "é\u2028", "nul\0", "half \ud800", "7"])
def test_any_name_will_do(name: str) -> None:
    one = LabelledSet([LabelledQuery(name, "how to", {name: 1}), LabelledQuery("nul\0?", "how to", {"nul\0?": 1})], "")
    found = score_rankings(one, {name: ranking(["nul\0!", "0", name])})
    assert found.per_query == pytest.approx(np.array([[0.5, 1, 1 / 3], [0, 0, 0]]))


def test_rankings_of_other_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="of the labelled set, got 1 others: 'p'"):
        score_rankings(labelled(q={"a": 1}), {"q": ranking("a"), "p": ranking("a")})


@pytest.mark.long  # loading the other implementation takes most of the time
def test_metrics_are_those_of_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    chance = random.Random(0)
    documents = [f"part/{number}.md" for number in range(60)]
    relevant = {f"q{n}": set(chance.sample(documents, chance.choice([1, 3, 15]))) for n in range(250)}
    orders = {query_id: chance.sample(documents, chance.choice([3, 10, 40])) for query_id in relevant}
    queries: dict[str, Any] = dict.fromkeys(relevant, "how to")
    corpus: dict[str, Any] = dict.fromkeys(documents, "so")
    theirs = InformationRetrievalEvaluator(queries, corpus, relevant, mrr_at_k=[60]).compute_metrics(
        [
            [{"corpus_id": document, "score": -place} for place, document in enumerate(orders[query_id])]
            for query_id in relevant
        ]
    )
    ours = score_rankings(
        labelled(**{query_id: dict.fromkeys(found, 1) for query_id, found in relevant.items()}),
        {query_id: ranking(order) for query_id, order in orders.items()},
    ).means
    expected = {"ndcg@10": theirs["ndcg@k"][10], "recall@10": theirs["recall@k"][10], "mrr": theirs["mrr@k"][60]}
    assert 0.1 < expected["ndcg@10"] < 0.9
    assert ours == pytest.approx(expected, rel=1e-12)


DOCUMENTS = st.sampled_from([f"d{number}" for number in range(15)])
RANKINGS = st.lists(
    st.tuples(
        st.dictionaries(DOCUMENTS, st.integers(1, 1000), min_size=1),
        st.lists(st.tuples(DOCUMENTS, st.floats()), max_size=30),
    ),
    min_size=1,
    max_size=8,
)
"""Grades and ranking of some queries."""


def scored(queries: list[tuple[dict[str, int], list[tuple[str, float]]]], order: list[int]) -> Scores:
    relevant = {f"q{number}": queries[number][0] for number in order}
    return score_rankings(labelled(**relevant), {f"q{number}": queries[number][1] for number in order})


@given(RANKINGS, st.randoms(use_true_random=False))
def test_metrics_are_shares_and_the_order_of_queries_does_not_matter(
    queries: list[tuple[dict[str, int], list[tuple[str, float]]]], chance: random.Random
) -> None:
    order = list(range(len(queries)))
    found = scored(queries, order)
    assert found.per_query.shape == (len(queries), 3) and found.per_query.dtype == np.float64
    assert ((found.per_query >= 0) & (found.per_query <= 1)).all()
    chance.shuffle(order)
    shuffled = scored(queries, order)
    assert shuffled.per_query.tolist() == found.per_query[order].tolist()
    assert shuffled.means == pytest.approx(found.means, rel=1e-12)
    for place in order:
        alone = scored(queries, [place])
        assert alone.per_query[0].tolist() == found.per_query[place].tolist()


@given(st.dictionaries(DOCUMENTS, st.integers(1, 9), min_size=1), st.lists(DOCUMENTS, max_size=5))
def test_the_best_order_has_the_highest_ndcg(relevant: dict[str, int], others: list[str]) -> None:
    best = sorted(relevant, key=lambda document: -relevant[document])
    found = score_rankings(labelled(q=relevant), {"q": ranking(best + others)}).means
    assert found == pytest.approx({"ndcg@10": 1, "recall@10": min(1, 10 / len(relevant)), "mrr": 1})


def test_many_queries_are_scored_like_few() -> None:
    ids = [f"q{number}" for number in range(250)]
    sets = labelled(**{key: {str(number % 7): 1} for number, key in enumerate(ids)})
    found = score_rankings(sets, {key: ranking("0123456") for key in reversed(ids)})
    assert found.query_ids == ids
    assert found.per_query[:, 2] == pytest.approx(np.array([1 / (1 + number % 7) for number in range(250)]))


def scores(*per_query: list[float]) -> Scores:
    values = np.array(per_query, dtype=np.float64)
    return Scores([f"q{number}" for number in range(len(values))], values)


def test_differences_are_those_computed_by_hand() -> None:
    baseline = scores([0, 0.5, 1], [0, 0.5, 1], [0, 0.5, 1], [0, 0.5, 1])
    other = scores([1, 0.5, 0], [0, 0.75, 0], [0, 0, 0], [0, 0.5, 0])
    ndcg, recall, mrr = compare(baseline, other)
    assert (ndcg.metric, recall.metric, mrr.metric) == METRICS
    assert [d.mean for d in (ndcg, recall, mrr)] == [0.25, -0.0625, -1]
    assert [(d.wins, d.losses, d.ties) for d in (ndcg, recall, mrr)] == [(1, 0, 3), (1, 1, 2), (0, 4, 0)]
    # The one win is drawn 0 to 4 times: with chances 0.316, 0.422, 0.211, 0.047 and 0.004.
    assert (ndcg.low, ndcg.high) == (0, 0.75)
    assert (mrr.low, mrr.high) == (-1, -1)


def test_the_interval_is_that_of_the_mean() -> None:
    # Of many queries the mean is nearly normal: 1.96 standard errors to each side.
    chance = np.random.default_rng(1)
    baseline, other = chance.random((2, 2000, 3))
    for place, found in enumerate(compare(scores(*baseline), scores(*other))):
        error = (other - baseline)[:, place].std() / math.sqrt(2000)
        assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
        assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)


METRIC_VALUES = st.lists(st.floats(0, 1), min_size=3, max_size=3)


@settings(max_examples=25)
@given(st.lists(METRIC_VALUES, min_size=1, max_size=20))
def test_no_difference_is_none(values: list[list[float]]) -> None:
    for found in compare(scores(*values), scores(*values)):
        assert (found.mean, found.low, found.high) == (0, 0, 0)
        assert (found.wins, found.losses, found.ties) == (0, 0, len(values))


@settings(max_examples=25)
@given(st.lists(st.tuples(METRIC_VALUES, METRIC_VALUES), min_size=1, max_size=20))
def test_swapping_the_sides_changes_the_sign(pairs: list[tuple[list[float], list[float]]]) -> None:
    baseline, other = scores(*(a for a, _ in pairs)), scores(*(b for _, b in pairs))
    forth = compare(baseline, other)
    assert forth == compare(baseline, other)
    for there, back in zip(forth, compare(other, baseline), strict=True):
        assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low), abs=1e-12)
        assert (back.wins, back.losses, back.ties) == (there.losses, there.wins, there.ties)
        assert there.wins + there.losses + there.ties == len(pairs)
        assert -1 <= there.low <= there.high <= 1


def test_scores_of_different_queries_are_not_compared() -> None:
    one, two = scores([0, 0, 0]), scores([0, 0, 0], [0, 0, 0])
    with pytest.raises(ValueError, match="of the same queries, at least one, got 1 and 2"):
        compare(one, two)
    with pytest.raises(ValueError, match="of the same queries"):
        compare(one, Scores(["other"], one.per_query))
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        compare(Scores([], np.empty((0, 3))), Scores([], np.empty((0, 3))))


def test_the_library_is_asked_for_where_it_is_missing() -> None:
    code = (
        "import sys; sys.modules['pytrec_eval'] = None\n"
        "from embed_assets.errors import SettingsError\n"
        "from embed_assets.quality.labels import LabelledQuery, LabelledSet\n"
        "from embed_assets.quality.retrieval import score_rankings\n"
        "try: score_rankings(LabelledSet([LabelledQuery('q', 'how to', {'a': 1})], ''), {})\n"
        "except SettingsError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "which is not installed; run pip install 'embed-assets[evaluation]'" in done.stdout
