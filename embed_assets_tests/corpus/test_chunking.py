"""Invariants of the chunker on hostile and real text with real tokenizers, and examples of where it cuts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from embed_assets.corpus.chunking import ChunkOptions, PlacedTokens, split_document
from embed_assets.corpus.chunking import Tokenizer as ChunkTokenizer
from embed_assets.corpus.sections import MAX_SECTION_CHARACTERS
from embed_assets.corpus.structure import find_headings
from embed_assets.engine.tokenization import ModelTokenizer, word_tokenizer_json
from embed_assets.records import Chunk
from embed_assets_tests.conftest import SAMPLE_MODEL, resolve_space, topic

FAMILY = "\u200d".join("👩👩👧👦")
MARKDOWN, PLAIN, RST = "text/markdown", "text/plain", "text/x-rst"


@cache
def tokenizer(name: str) -> ModelTokenizer:
    """The sample model's WordPiece, a byte-level BPE or Unigram trained here, or one token per word."""
    if name == "wordpiece":
        return resolve_space(SAMPLE_MODEL).tokenizer
    if name == "words":
        return ModelTokenizer(word_tokenizer_json())
    corpus = [topic(t) for t in ("types", "try", "with", "specialnames")]
    if name == "bpe":
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    else:
        trained = Tokenizer(models.Unigram())
        trained.normalizer = normalizers.NFKC()
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    trained.train_from_iterator(corpus, trainer)
    ids = {t: trained.token_to_id(t) for t in ("<s>", "</s>")}
    trained.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=list(ids.items()))
    return ModelTokenizer(trained.to_str())


PIECES = [
    *("# Heading\n", "\n\n", "```\ncode line\n\nmore\n```\n", "~~~\nnever closed\n", "Title\n=====\n", "- item\n"),
    *("A sentence. Another one! And a third? ", "東京は日本の首都です。大きい。", "مرحبا بالعالم ", "e\u0301e\u0301"),
    *("\u200b", "\x00", "\x1c", "\x85", "\u2028", "\r", "ſ ﬁ İ ß", "x" * 300, "word " * 40, "| a | b |\n|---|---|\n"),
    FAMILY,
]
HOSTILE_TEXT = st.lists(
    st.one_of(st.text(max_size=60), st.text(alphabet="ab \n\t.#`-*|=1", max_size=80), st.sampled_from(PIECES)),
    max_size=25,
).map("".join)


def check(text: str, chunks: list[Chunk], by: ChunkTokenizer, options: ChunkOptions) -> None:
    """Assert the invariants that `embed_assets.corpus.chunking` promises."""
    ids = [ids.tolist() for ids in by.encode([chunk.text for chunk in chunks])]
    assert [chunk.token_ids.tolist() for chunk in chunks] == ids
    counts = [len(found) + by.special_tokens for found in ids]
    for i, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
        assert text[chunk.char_start : chunk.char_end] == chunk.text
        assert chunk.text.strip() == chunk.text != ""
        assert chunk.chunk_index == i
        assert chunk.token_count == count <= options.max_tokens
    for one, other in pairwise(chunks):
        assert one.char_start < other.char_start
        assert one.char_end < other.char_end
        assert options.overlap_tokens or one.char_end <= other.char_start
    covered = 0
    for chunk in chunks:
        assert not text[covered : chunk.char_start].strip()
        covered = max(covered, chunk.char_end)
    assert not text[covered:].strip()


@pytest.mark.parametrize("name", ["wordpiece", "bpe", "unigram", "words"])
@given(
    text=HOSTILE_TEXT,
    media_type=st.sampled_from([MARKDOWN, PLAIN, RST, "text/x-python", "text/x-c"]),
    max_tokens=st.integers(16, 80),
    overlap=st.integers(0, 7),
)
@example(text="a\x1cb " * 60, media_type=PLAIN, max_tokens=16, overlap=0)
@example(text="\u200b" * 50, media_type=PLAIN, max_tokens=16, overlap=0)
@example(text=FAMILY * 100, media_type=PLAIN, max_tokens=16, overlap=3)
@settings(max_examples=300, deadline=None)
def test_invariants(name: str, text: str, media_type: str, max_tokens: int, overlap: int) -> None:
    options = ChunkOptions(max_tokens, overlap)
    chunks = split_document(text, media_type, tokenizer(name), options)
    check(text, chunks, tokenizer(name), options)
    assert chunks == split_document(text, media_type, tokenizer(name), options)


@pytest.mark.parametrize("name", ["wordpiece", "bpe", "unigram"])
@pytest.mark.parametrize("page", ["types", "specialnames", "try"])
def test_invariants_hold_on_real_pages(name: str, page: str) -> None:
    for overlap in (0, 30):
        options = ChunkOptions(128, overlap)
        check(topic(page), split_document(topic(page), RST, tokenizer(name), options), tokenizer(name), options)


def test_tokenizing_in_segments_breaks_no_invariant() -> None:
    text = "\n\n".join(f"Paragraph {i} has a few words. And a second sentence." for i in range(3000)) + "x" * 50_000
    options = ChunkOptions(256)
    check(text, split_document(text, PLAIN, tokenizer("wordpiece"), options), tokenizer("wordpiece"), options)


def split(text: str, media_type: str = MARKDOWN, max_tokens: int = 16, overlap: int = 0) -> list[Chunk]:
    return split_document(text, media_type, tokenizer("words"), ChunkOptions(max_tokens, overlap))


def test_a_short_document_is_one_chunk() -> None:
    assert [c.text for c in split("# Title\n\nSome text.\n")] == ["# Title\n\nSome text."]


def test_whitespace_has_no_chunks() -> None:
    assert split("") == split(" \n\t\n ") == []


def test_chunks_start_at_headings_where_possible() -> None:
    text = "# One\n\n" + "alpha beta gamma. " * 3 + "\n\n# Two\n\n" + "delta epsilon zeta. " * 3
    assert [c.text[:5] for c in split(text, max_tokens=20)] == ["# One", "# Two"]


def test_code_blocks_stay_whole_when_they_fit() -> None:
    code = "```python\nfirst = 1\n\nsecond = 2\n```"
    text = f"Some words before it all. More of them here.\n\n{code}\n\nSome words after it all. More of them here."
    assert any(code in c.text for c in split(text, max_tokens=22))


def test_code_blocks_over_the_limit_are_cut_at_lines() -> None:
    lines = [f"value_{i} = function({i})" for i in range(20)]
    text = "```\n" + "\n".join(lines) + "\n```"
    for chunk in split(text, max_tokens=24):
        assert all(line in ("```", *lines) for line in chunk.text.splitlines())


def test_overlap_stays_in_its_section() -> None:
    body = "Care is needed each month for all of them. " * 3
    text = "".join(f"## {name}\n\n{name} come first. {body}\n\n" for name in ("Pumps", "Valves", "Filters"))
    chunks = split("# Manual\n\n" + text, MARKDOWN, 24, 8)
    for name in ("Pumps", "Valves", "Filters"):
        [about] = [chunk for chunk in chunks if f"{name} come first" in chunk.text]
        assert about.heading_path == f"Manual > {name}"
    assert any(later.char_start < one.char_end for one, later in pairwise(chunks)), "they do overlap"


@pytest.mark.parametrize("line", ["2024-05-0{} 12:00:01 INFO worker started and waits for jobs", "la la la {} oh yes"])
def test_where_no_sentence_ends_lines_are_kept(line: str) -> None:
    text = "\n".join(line.format(i) for i in range(200))
    chunks = split(text, PLAIN, 40)
    assert len(chunks) > 10
    assert all(chunk.char_start == 0 or text[chunk.char_start - 1] == "\n" for chunk in chunks)


@pytest.mark.parametrize(
    "sentence",
    [
        "यह एक छोटा वाक्य है। ",
        "یہ ایک چھوٹا جملہ ہے۔ ",
        "هل هذه جملة قصيرة جدا؟ ",
        "ဒါ က စာကြောင်း တစ်ခု ပါ။ ",
        "ይህ አጭር ዓረፍተ ነገር ነው። ",
    ],
)
def test_sentences_of_other_scripts(sentence: str) -> None:
    chunks = split(sentence * 40, PLAIN, 20)
    assert len(chunks) > 5 and all(chunk.text.startswith(sentence.split()[0]) for chunk in chunks)


def test_a_title_does_not_end_a_sentence() -> None:
    text = "We asked Dr. Smith and Prof. Miller about it, see Fig. Seven. " * 30
    assert all(chunk.text.startswith("We") for chunk in split(text, PLAIN, 20))


def test_overlap_repeats_the_end_of_the_previous_chunk() -> None:
    chunks = split("one two three four. five six seven eight. nine ten eleven twelve. " * 4, PLAIN, 20, 6)
    assert len(chunks) > 2
    for one, other in pairwise(chunks):
        assert one.char_start < other.char_start < one.char_end


def test_an_overlap_of_zero_repeats_nothing() -> None:
    for one, other in pairwise(split("one two three four. " * 20, PLAIN, 20)):
        assert one.char_end <= other.char_start


@pytest.mark.parametrize(
    ("text", "media_type", "expected"),
    [
        ("# A\n\ntext\n\n## B\n\ntext\n\n# C #\n\nlast", MARKDOWN, "C"),
        ("# A\n\ntext\n\n## B\n\ntext\n\n### C#\n\nlast", MARKDOWN, "A > B > C#"),
        ("A\n===\n\ntext\n\nB\n---\n\nlast", MARKDOWN, "A > B"),
        ("```\n# no heading\n```\n\nlast", MARKDOWN, ""),
        ("=====\nTitle\n=====\n\nOne\n---\n\ntext\n\nTwo\n---\n\nlast", RST, "Title > Two"),
        ("Title\n*****\n\nSub\n=====\n\nlast", RST, "Title > Sub"),
        ("# no heading\n\nlast", PLAIN, ""),
        ("## Title\n---\n\nlast", MARKDOWN, "Title"),
        ("---\ntitle: Foo\ndate: 2020\n---\n\n# Real\n\nlast", MARKDOWN, "Real"),
        ("# Real\n\n1. foo\n---\n\n> quote\n---\n\n***\n---\n\nlast", MARKDOWN, "Real"),
        ("- ```\n  # no\n  ```\n\n# yes\n\nlast", MARKDOWN, "yes"),
        ("# Real\n\n<!--\n# no\n-->\n\nlast", MARKDOWN, "Real"),
        ("v1\n--\n\nlast", RST, "v1"),
        ("Title\n!!!!!\n\nlast", RST, "Title"),
        ("A longer title\n----\n\nlast", RST, "A longer title"),
        ("Real\n====\n\npara one\npara two\n--------\n\nlast", RST, "Real"),
        ("Real\n====\n\n* item\n------\n\nlast", RST, "Real"),
    ],
)
def test_heading_path(text: str, media_type: str, expected: str) -> None:
    padded = text.replace("last", "last " * 20)
    assert split(padded, media_type, 18)[-1].heading_path == expected


@pytest.mark.parametrize("page", ["types", "specialnames"])
def test_an_inserted_sentence_changes_few_chunks(page: str) -> None:
    text = topic(page)
    before = {c.text for c in split_document(text, RST, tokenizer("wordpiece"), ChunkOptions(256))}
    changes = []
    for i in range(1, 20):
        place = text.index(" ", len(text) * i // 20)
        edited = text[:place] + " This sentence was not here before." + text[place:]
        after = split_document(edited, RST, tokenizer("wordpiece"), ChunkOptions(256))
        changes.append(sum(c.text not in before for c in after))
    assert sum(changes) / len(changes) <= 2.5
    assert min(changes) >= 1


def test_an_edited_word_changes_its_own_chunk() -> None:
    text = topic("types")
    before = {c.text for c in split_document(text, RST, tokenizer("wordpiece"), ChunkOptions(256))}
    changes = []
    for i in range(1, 60):
        place = text.index(" the ", len(text) * i // 61)
        edited = text[:place] + " its " + text[place + 5 :]
        after = split_document(edited, RST, tokenizer("wordpiece"), ChunkOptions(256))
        changes.append(sum(c.text not in before for c in after))
    assert min(changes) == 1
    assert sum(changes) / len(changes) <= 1.1


@pytest.mark.parametrize("name", ["wordpiece", "words"])
@pytest.mark.parametrize(("page", "overlap"), [("types", 0), ("specialnames", 0), ("try", 20)])
def test_no_chunk_spans_a_heading(name: str, page: str, overlap: int) -> None:
    text = topic(page)
    headings = find_headings(text, RST)
    assert headings
    for chunk in split_document(text, RST, tokenizer(name), ChunkOptions(200, overlap)):
        inside = [h for h in headings if chunk.char_start < h.start < chunk.char_end]
        # Only several headings without text between begin a chunk together.
        run = [h for h in headings if chunk.char_start <= h.start < chunk.char_end]
        assert not inside or not text[run[0].end : inside[0].start].strip()
        above = [h.title for h in headings if h.start <= (run[-1].start if run else chunk.char_start)]
        assert not above or chunk.heading_path.split(" > ")[-1] == above[-1]


def test_small_sections_have_chunks_of_their_own() -> None:
    text = "Before.\n\n# One\n\nFirst.\n\n# Two\n\n## Deeper\n\nSecond.\n\n# Three\n"
    found = [(c.text, c.heading_path) for c in split_document(text, MARKDOWN, tokenizer("words"), ChunkOptions(100))]
    assert found == [
        ("Before.", ""),
        ("# One\n\nFirst.", "One"),
        ("# Two\n\n## Deeper\n\nSecond.", "Two > Deeper"),
        ("# Three", "Three"),
    ]


def test_a_paragraph_marked_as_heading_does_not_bloat_heading_paths() -> None:
    chunks = split("# " + "word " * 4000, max_tokens=64)
    assert sum(len(c.heading_path) for c in chunks) <= 200 * len(chunks)


def test_tokens_that_include_their_spaces_hide_no_cuts() -> None:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([topic("types")], trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet))
    text = "x" * 300 + "\n\n" + "A sentence of several words stands here. " * 100
    for chunk in split_document(text, PLAIN, ModelTokenizer(raw.to_str()), ChunkOptions(40))[-20:]:
        assert text[chunk.char_start - 1].isspace()


def test_a_character_with_more_tokens_than_the_limit_stays_whole() -> None:
    text = "\ufdfa" * 3
    chunks = split_document(text, PLAIN, tokenizer("unigram"), ChunkOptions(16))
    assert "".join(c.text for c in chunks) == text


@pytest.mark.parametrize("piece", ["\u200b\n\n", "#", "漢字仮名交じり文", "a. ", "\x00 ", "- x\n"])
def test_large_limits_and_pieces_without_tokens_take_linear_time(piece: str) -> None:
    """Comparing all cuts within the limit took ten seconds or more for each of these."""
    text = piece * (60_000 // len(piece))
    for limit in (256, 32_768):
        check(
            text,
            split_document(text, MARKDOWN, tokenizer("wordpiece"), ChunkOptions(limit)),
            tokenizer("wordpiece"),
            ChunkOptions(limit),
        )


def test_each_character_is_tokenized_about_once() -> None:
    """Counts the characters given to the tokenizer rather than seconds."""

    class Recording:
        special_tokens = 2
        splits_at_whitespace = True
        characters = 0

        def tokens(self, texts: list[str]) -> Sequence[PlacedTokens]:
            self.characters += sum(map(len, texts))
            return tokenizer("wordpiece").tokens(texts)

        def encode(self, texts: list[str]) -> list[np.ndarray]:
            self.characters += sum(map(len, texts))
            return tokenizer("wordpiece").encode(texts)

    text = topic("types") * 3
    recording = Recording()
    split_document(text, RST, recording, ChunkOptions(256))  # type: ignore[arg-type]
    assert recording.characters <= 1.1 * len(text)


LONG = "\n\n".join(
    f"# Part {i}\n\n" * (i % 500 == 0)
    + f"Paragraph {i} of a long report, with {i * 7919 % 1000} of something. It goes on."
    for i in range(20_000)
)


def test_a_long_document_is_chunked_like_a_short_one() -> None:
    """Text, order, heading paths and the effect of an edit, with words as tokens because that is fast."""
    options, words = ChunkOptions(64), tokenizer("words")
    assert len(LONG) > MAX_SECTION_CHARACTERS
    chunks = split_document(LONG, MARKDOWN, words, options)
    check(LONG, chunks, words, options)
    for chunk in chunks[:: len(chunks) // 50]:
        first = int(chunk.text.split("Paragraph ")[1].split()[0])
        assert chunk.heading_path == f"Part {first // 500 * 500}"
    edited = LONG.replace("Paragraph 100 ", "Paragraph one hundred and something ", 1)
    before, after = ({c.text for c in split_document(t, MARKDOWN, words, options)} for t in (LONG, edited))
    assert len(before - after) <= 4


@pytest.mark.parametrize("media_type", [MARKDOWN, RST, PLAIN])
def test_long_documents_with_nowhere_good_to_cut(media_type: str) -> None:
    for text in ("x" * (MAX_SECTION_CHARACTERS + 5), "```\n" + "code\n" * 300_000, "\n" * 1_500_000 + "end"):
        options = ChunkOptions(64)
        check(text, split_document(text, media_type, tokenizer("words"), options), tokenizer("words"), options)


def test_a_long_word_that_is_one_token_is_split() -> None:
    text = "ab" * 100_000
    chunks = split_document(text, PLAIN, tokenizer("wordpiece"), ChunkOptions(64))
    assert max(len(chunk.text) for chunk in chunks) <= 64 * 64
    assert "".join(chunk.text for chunk in chunks) == text
