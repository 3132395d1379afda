"""Queries made from chunks, and what they find in spaces that cut documents in different ways."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embed_assets.corpus.chunking import ChunkOptions, split_document
from embed_assets.engine.tokenization import ModelTokenizer, word_tokenizer_json
from embed_assets.quality.probe import (
    TOP,
    Passage,
    ProbeQuery,
    choose_queries,
    loss,
    recall,
    reciprocal_rank,
)
from embed_assets_tests.conftest import topic

SENTENCE = "The borrow checker accepts this program, as nothing else borrows it."


def passage(text: str, heading_path: str = "", document_id: str = "a.md", start: int = 0) -> Passage:
    return Passage("p", document_id, start, heading_path, text)


def chunks_of(name: str, tokens: int, overlap: int = 0) -> list[Passage]:
    """A topic of the Python reference, cut into chunks of at most so many words."""
    text, tokenizer = topic(name), ModelTokenizer(word_tokenizer_json())
    chunks = split_document(text, "text/x-rst", tokenizer, ChunkOptions(tokens, overlap))
    return [Passage("p", name, chunk.char_start, chunk.heading_path, chunk.text) for chunk in chunks]


@pytest.mark.parametrize(
    ("text", "heading_path", "query", "offset"),
    [
        ("## Lifetime elision\n\nThe rules are three.", "Design > Lifetime elision", "Lifetime elision", 3),
        ("Slice objects\n=============\n\nUsed for slices.", "Types > Slice objects", "Slice objects", 0),
        ("*****\nTypes of calls\n*****\n\nText.", "Types of calls", "Types of calls", 6),
        ("# Design\n\n## Lifetime elision\n\nText.", "Design > Lifetime elision", "Lifetime elision", 13),
        ("### 関数定義\n\n本文。", "関数定義", "関数定義", 4),
        (f"It goes on here. {SENTENCE} And so it ends.", "Design > Lifetime elision", SENTENCE, 17),
        (f"## API\n\n{SENTENCE}", "Design > API", SENTENCE, 8),
        (f"x = [1, 2, 3]; y = {{4: 5, 6: 7}}; z = 8\n\n  {SENTENCE}", "", SENTENCE, 42),
        ("短い。これはすべての値の型を決める規則である。短い。", "", "これはすべての値の型を決める規則である。", 3),
    ],
)
def test_a_chunk_asks_for_the_heading_it_begins_with_or_else_a_sentence_of_it(
    text: str, heading_path: str, query: str, offset: int
) -> None:
    assert text[offset:].startswith(query)
    assert choose_queries([passage(text, heading_path, start=100)])[0] == ProbeQuery(query, "p", "a.md", 100 + offset)


@pytest.mark.parametrize("text", ["", "Short. Too. Yes.", "| 1 | 2 |\n|---|---|\n| 3 | 4 |\n", "= " * 50, "word " * 90])
def test_a_chunk_without_sentences_asks_for_nothing(text: str) -> None:
    assert choose_queries([passage(text, "FAQ")]) == []


def test_a_text_that_comes_from_several_places_is_no_query() -> None:
    licence = "Permission is hereby granted to use this file for any purpose."
    passages = [
        passage("## Motivation of it\n\nOne.", "Motivation of it", "a.md"),
        passage("##  motivation OF it\n\nTwo.", "motivation OF it", "b.md"),
        passage(licence, "", "a.md", 500),
        passage(licence, "", "a.md", 900),
        passage("## Lifetime elision\n\nThree.", "Lifetime elision", "b.md", 50),
    ]
    assert [query.text for query in choose_queries(passages)] == ["Lifetime elision"]


def test_a_text_in_two_chunks_that_overlap_is_a_query() -> None:
    one = passage(f"Before it. {SENTENCE}", start=10)
    other = passage(f"{SENTENCE} And after it.", start=21)
    assert choose_queries([one, other]) == [ProbeQuery(SENTENCE, "p", "a.md", 21)]


def test_sentences_fill_up_what_headings_leave() -> None:
    passages = chunks_of("types", 100)
    headings = {passage.heading_path.split(" > ")[-1] for passage in passages}
    queries = choose_queries(passages, 60)
    kinds = [query.text in headings for query in queries]
    assert len(queries) == 60
    assert 0 < sum(kinds) < 60
    assert kinds == sorted(kinds, reverse=True)
    assert choose_queries(passages, sum(kinds) - 1) == queries[: sum(kinds) - 1]


TEXTS = st.lists(st.sampled_from([f"Sentence number {n} is in this text only." for n in range(30)]), max_size=60)


@given(TEXTS, st.integers(1, 3), st.integers(0, 5))
def test_the_same_passages_in_any_order_give_the_same_queries(texts: list[str], count: int, seed: int) -> None:
    passages = [passage(text, start=100 * i) for i, text in enumerate(texts)]
    queries = choose_queries(passages, count)
    assert len(queries) <= count
    assert all(texts.count(query.text) == 1 for query in queries)
    assert [q.position for q in queries] == [100 * texts.index(q.text) for q in queries]
    random.Random(seed).shuffle(passages)
    assert choose_queries(passages, count) == queries


@given(TEXTS, st.lists(st.integers(0, 40), max_size=5))
def test_more_passages_take_away_only_queries_that_are_beaten_or_repeated(texts: list[str], more: list[int]) -> None:
    passages = [passage(text, start=100 * i) for i, text in enumerate(texts)]
    added = [passage(f"Another sentence, of number {n}, is added here.", start=9000 + 100 * n) for n in more]
    before, after = choose_queries(passages, 1000), choose_queries([*passages, *added], 1000)
    assert [query for query in after if query.text in texts] == before


@pytest.mark.parametrize("name", ["types", "specialnames", "strings"])
def test_queries_are_found_at_their_place_however_the_document_is_cut(name: str) -> None:
    text = topic(name)
    queries = choose_queries(chunks_of(name, 100))
    assert queries
    for query in queries:
        assert " ".join(text[query.position :].split()).startswith(query.text)
    for cut in (chunks_of(name, 30), chunks_of(name, 250), chunks_of(name, 60, overlap=20)):
        for query in queries:
            found = [c for c in cut if query.is_from("p", name, c.char_start, c.char_start + len(c.text))]
            assert found
            assert all(query.text.split()[0] in chunk.text for chunk in found)


def test_a_query_is_from_a_half_open_span_of_its_document() -> None:
    query = ProbeQuery("q", "p", "d", 10)
    spans = [(0, 10), (0, 11), (10, 20), (11, 20)]
    assert [query.is_from("p", "d", *span) for span in spans] == [False, True, True, False]
    assert not query.is_from("other", "d", 0, 20)
    assert not query.is_from("p", "other", 0, 20)


@given(st.lists(st.booleans(), max_size=2 * TOP))
def test_the_reciprocal_rank_is_that_of_the_first_right_hit_near_the_top(found: list[bool]) -> None:
    expected = 1 / (found.index(True) + 1) if True in found[:TOP] else 0
    assert reciprocal_rank(found) == expected


RANKS = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=50).map(np.array)


@given(RANKS)
def test_a_space_loses_nothing_to_itself_and_all_to_nothing(ranks: np.ndarray) -> None:
    same, all_of_it = loss(ranks, ranks), loss(ranks, np.zeros_like(ranks))
    assert (same.percent, same.low, same.high) == (0, 0, 0)
    assert all_of_it.percent == pytest.approx(100 if ranks.any() else 0)
    assert recall(ranks) == np.count_nonzero(ranks) / len(ranks)


@given(RANKS, st.integers(0, 10))
def test_the_loss_is_of_the_mean_and_in_its_interval(before: np.ndarray, seed: int) -> None:
    after = np.random.default_rng(seed).permutation(before) / 2
    found = loss(before, after)
    assert found.percent == pytest.approx(50 if before.any() else 0)
    assert found.low - 1e-9 <= found.high


def test_the_interval_is_narrower_with_more_queries_and_tells_a_large_loss_from_none() -> None:
    generator = np.random.default_rng(0)
    before = 1 / generator.integers(1, 5, 200)
    worse, other = before * generator.integers(0, 2, 200), generator.permutation(before)
    assert loss(before, worse).low > 30
    few, many = loss(before[:50], other[:50]), loss(before, other)
    assert many.low < 0 < many.high
    assert many.high - many.low < few.high - few.low
