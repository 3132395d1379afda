"""Very long texts: only their beginning is tokenized, and the tokens are those of the whole text."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from embed_assets.engine.space import EmbeddingSpace
from embed_assets.engine.tokenization import ModelTokenizer
from embed_assets.engine.words import PlacedTokens, WordCache
from embed_assets_tests.conftest import SAMPLE_MODEL, resolve_space, topic


@cache
def trained(kind: str) -> ModelTokenizer:
    corpus = [topic("types"), topic("try"), topic("with")]
    if kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer = normalizers.BertNormalizer()
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.train_from_iterator(
            corpus, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "<s>", "</s>"])
        )
    elif kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.normalizer = normalizers.NFKC()
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        raw.decoder = decoders.Metaspace()
        raw.train_from_iterator(
            corpus, trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"])
        )
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(
            corpus, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
        )
    start, end = raw.token_to_id("<s>"), raw.token_to_id("</s>")
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    return ModelTokenizer(raw.to_str())


@cache
def sample_tokenizer() -> ModelTokenizer:
    return resolve_space(SAMPLE_MODEL).tokenizer


def tokens_of_the_whole(tokenizer: ModelTokenizer, text: str, max_length: int) -> list[int]:
    raw = Tokenizer.from_str(tokenizer._description)
    raw.enable_truncation(max_length)
    return list(raw.encode(text).ids)


words = st.sampled_from(
    ["a", "word", "longer-word", "naïve", "e\u0301", "東京", "🙂", "x" * 200, "1.5", "\n\n", "  ", "\u00a0", "\u200b"]
)


@given(
    st.lists(words, min_size=1, max_size=40),
    st.integers(1, 60),
    st.sampled_from(["wordpiece", "unigram", "bytes"]),
    st.integers(4, 16),
)
@settings(deadline=None, max_examples=300)
def test_the_beginning_has_the_tokens_of_the_whole_text(
    parts: list[str], times: int, kind: str, max_length: int
) -> None:
    text = " ".join(parts * times)
    tokenizer = trained(kind)
    found = tokenizer.tokenize([text, "short"], max_length)
    expected = tokens_of_the_whole(tokenizer, text, max_length)
    assert found.ids[: found.offsets[1]].tolist() == expected
    assert bool(found.is_truncated[0]) == (tokenizer.count([text])[0] > max_length)


ODD_CHARACTERS = " \n\t\r\x00\x0b\x0c\x1c\x85\u00a0\u2028\u3000\u200b\u0301\u0338\u05bfaAzÉßİΣ.,;!'\"-_[]()#1٢東京한🙂ﬁ"
strange = st.text(st.one_of(st.sampled_from(ODD_CHARACTERS), st.characters(exclude_categories=["Cs"])), max_size=60)
added = st.sampled_from(["[SEP]", "x[CLS]y", "[MASK", "[SEP].", "don't", "e.g."])
pieces = st.lists(st.one_of(strange, words, added), max_size=8)


@pytest.mark.parametrize("kind", ["sample", "wordpiece"])
@given(texts=st.lists(pieces.map("".join), min_size=1, max_size=6))
@settings(deadline=None, max_examples=300)
def test_looked_up_words_have_the_tokenizers_own_tokens_and_places(kind: str, texts: list[str]) -> None:
    tokenizer = sample_tokenizer() if kind == "sample" else trained(kind)
    assert tokenizer._words is not None
    raw = Tokenizer.from_str(tokenizer._description)
    raw.no_padding()
    raw.no_truncation()
    for _ in range(2):  # first the words are new, then known
        for text, found in zip(texts, tokenizer.tokens(texts), strict=True):
            expected = raw.encode(text, add_special_tokens=False)
            assert found.ids.tolist() == expected.ids
            assert [tuple(span) for span in found.spans.tolist()] == expected.offsets


def test_forgotten_words_are_learned_again(sample_space: EmbeddingSpace) -> None:
    words = sample_space.tokenizer.copy()._words
    assert words is not None
    first = words.tokens([topic("try"), topic("with")])
    words._words.rows.characters = words._parts.rows.characters = 1 << 40
    for again in (words.tokens([topic("try"), topic("with")]), words.tokens([topic("try"), topic("with")])):
        for one, other in zip(first, again, strict=True):
            assert (one.ids == other.ids).all() and (one.spans == other.spans).all()


def test_only_tokenizers_that_split_at_whitespace_look_words_up() -> None:
    assert trained("unigram")._words is None and trained("bytes")._words is None
    described = json.loads(trained("wordpiece")._description)
    described["added_tokens"][0]["lstrip"] = True
    assert ModelTokenizer(json.dumps(described))._words is None


def test_special_tokens_surround_a_texts_own(sample_space: EmbeddingSpace) -> None:
    for tokenizer in (sample_space.tokenizer, trained("unigram"), trained("bytes")):
        before, after = tokenizer.added_ids
        [own] = tokenizer.encode(["one two"])
        assert [*before, *own, *after] == tokenizer.tokenize(["one two"], 64).ids.tolist()


def test_most_of_a_very_long_text_is_not_tokenized(sample_space: EmbeddingSpace) -> None:
    text = "many words " * 100_000
    tokenizer = sample_space.tokenizer.copy()
    tokenizer.tokenize(["warm"], 256)
    assert len(tokenizer._beginning(text)) < 256 * 25
    found = tokenizer.tokenize([text], 256)
    assert found.lengths.tolist() == [256] and found.is_truncated.tolist() == [True]


def test_spaces_alone_do_not_fill_the_models_window(sample_space: EmbeddingSpace) -> None:
    """20 characters per token are not enough here, so the whole text is tokenized after all."""
    text = "a b" + " " * 20_000 + "c d " * 2000
    found = sample_space.tokenizer.copy().tokenize([text], 256)
    assert found.ids.tolist() == tokens_of_the_whole(sample_space.tokenizer, text, 256)


def test_ids_are_flat_and_small(sample_space: EmbeddingSpace) -> None:
    texts = [topic("try"), "", "one"] * 1000
    found = sample_space.tokenizer.copy().tokenize(texts, 64)
    assert (found.ids.dtype, found.offsets.dtype, found.ids.ndim) == (np.int32, np.int64, 1)
    assert found.lengths.tolist() == [64, 2, 3] * 1000


@pytest.mark.parametrize("make", [ModelTokenizer.copy])
def test_copies_can_be_used_concurrently(
    sample_space: EmbeddingSpace, make: Callable[[ModelTokenizer], ModelTokenizer]
) -> None:
    """The library's tokenizers raise "Already borrowed" when their truncation is changed while they are in use."""
    errors: list[BaseException] = []

    def work(max_length: int) -> None:
        try:
            tokenizer = make(sample_space.tokenizer)
            for _ in range(10):
                assert tokenizer.tokenize([topic("try")] * 20, max_length).lengths.max() == max_length
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(length,)) for length in (16, 32, 64, 128)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_failure_while_words_are_learned_leaves_no_trace(sample_space: EmbeddingSpace) -> None:
    tokenizer = sample_space.tokenizer.copy()
    assert tokenizer._words is not None
    fails = [False]

    def tokenize(text: str) -> PlacedTokens:
        if fails[0]:
            raise MemoryError
        return tokenizer._placed([text])[0]

    words = WordCache(tokenize, [])
    words.tokens(["some words"])
    fails[0] = True
    with pytest.raises(MemoryError):
        words.tokens(["others come"])
    fails[0] = False
    for text in ("some others come", "words, others; more"):
        [found], [expected] = words.tokens([text]), tokenizer._placed([text])
        assert found.ids.tolist() == expected.ids.tolist() and found.spans.tolist() == expected.spans.tolist()
