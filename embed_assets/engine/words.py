"""Tokenizes by looking words up, for tokenizers that look at every word on its own.

A text's words are mostly words seen before, and a new word's parts, cut at punctuation, are mostly parts seen before.
Only new parts are tokenized: a sixth of the CPU that the tokenizer needs for English Markdown. Ids and positions are
exactly the tokenizer's own, as property tests check.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MAX_WORDS = 400_000
"""Words remembered at a time; then all are forgotten. 2.5 million tokens of English Markdown have 107,000."""
_MAX_CHARACTERS = 1 << 24
"""Characters of the words remembered at a time: with the index, at most about 150 MB in all."""
_PARTS = re.compile(r"[!-/:-@\[-`{-~]|[^!-/:-@\[-`{-~]+")
"""Single ASCII punctuation marks, which BERT makes words of their own, and what is between them."""


@dataclass(frozen=True, slots=True)
class PlacedTokens:
    """Tokens of a text, without special tokens."""

    ids: np.ndarray
    """int32, shape (tokens,)."""
    spans: np.ndarray
    """int32, shape (tokens, 2): where each token's visible part starts and ends, in code points."""


def splits_at_whitespace(description: dict[str, Any]) -> bool:
    """Whether a text cut at whitespace has the same tokens as the whole, judged by the ``tokenizer.json``."""
    # BERT splits at whitespace and punctuation first.
    return bool((description.get("pre_tokenizer") or {}).get("type") == "BertPreTokenizer")


def word_cache(description: dict[str, Any], tokenize: Callable[[str], PlacedTokens]) -> WordCache | None:
    """A cache over `tokenize`; None if its ids and positions might differ from the tokenizer's own.

    That takes a tokenizer that splits at whitespace, a normalizer that looks at single characters, and added tokens
    that are found before normalization and take no whitespace along.
    """
    normalizer = (description.get("normalizer") or {}).get("type")
    added = description.get("added_tokens") or []
    is_safe = all(not any(token.get(flag) for flag in _UNSAFE_FLAGS) for token in added)
    names = [str(token.get("content")) for token in added]
    if not splits_at_whitespace(description) or normalizer not in (None, "BertNormalizer", "Lowercase"):
        return None
    if not is_safe or any(not name or len(name.split()) != 1 for name in names):
        return None
    return WordCache(tokenize, names)


_UNSAFE_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
"""Properties of an added token with which it depends on the text around it, or on normalization."""


class _Table:
    """Tokens of numbered strings, end to end."""

    def __init__(self) -> None:
        self.rows = _Index()
        self._counts = np.zeros(1, np.int64)
        self._firsts = np.zeros(1, np.int64)
        self._ids = np.empty(0, np.int32)
        self._spans = np.empty((0, 2), np.int32)

    def get(self, rows: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, PlacedTokens]:
        """(index into `rows` of each token, tokens) of the strings with these numbers, which start at `starts`."""
        counts = self._counts[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        source = np.repeat(self._firsts[rows] - (np.cumsum(counts) - counts), counts) + np.arange(len(owner))
        spans = (self._spans[source] + starts[owner][:, None]).astype(np.int32)
        return owner, PlacedTokens(self._ids[source], spans)

    def add(self, count: int, owner: np.ndarray, ids: np.ndarray, spans: np.ndarray) -> None:
        """Add the tokens of `count` new strings, in the order of their numbers. `spans` are relative to the strings."""
        counts = np.bincount(owner, minlength=count).astype(np.int64)
        self._firsts = np.concatenate([self._firsts, len(self._ids) + np.cumsum(counts) - counts])
        self._counts = np.concatenate([self._counts, counts])
        self._ids = np.concatenate([self._ids, ids])
        self._spans = np.concatenate([self._spans, spans.astype(np.int32)])


class _Index(dict[str, int]):
    """Numbers strings in the order in which they are first looked up; '' is 0 and has no tokens."""

    def __init__(self) -> None:
        super().__init__({"": 0})
        self.new: list[str] = []
        """Strings numbered since the last `take_new`."""
        self.characters = 0

    def __missing__(self, item: str) -> int:
        self[item] = row = len(self)
        self.new.append(item)
        return row

    def numbers(self, items: Sequence[str]) -> np.ndarray:
        """int64: the number of each string."""
        return np.fromiter(map(self.__getitem__, items), np.int64, len(items))

    def take_new(self) -> list[str]:
        """The strings that were numbered since the last call."""
        new, self.new = self.new, []
        self.characters += sum(map(len, new))
        return new

    @property
    def is_full(self) -> bool:
        """Whether the strings take more memory than they may."""
        return len(self) > _MAX_WORDS or self.characters > _MAX_CHARACTERS


class WordCache:
    """Tokens of words seen before. Threads take turns."""

    def __init__(self, tokenize: Callable[[str], PlacedTokens], added_tokens: Sequence[str]) -> None:
        self._tokenize = tokenize
        self._has_added = re.compile("|".join(map(re.escape, added_tokens)) or "(?!)").search
        self._words, self._parts = _Table(), _Table()
        self._lock = threading.Lock()

    def tokens(self, texts: Sequence[str]) -> list[PlacedTokens]:
        """The tokens of each text."""
        with self._lock:
            try:
                return self._look_up(texts)
            except BaseException:  # words may have been numbered whose tokens were not added
                self._words, self._parts = _Table(), _Table()
                raise

    def _look_up(self, texts: Sequence[str]) -> list[PlacedTokens]:
        # As one long text: a space between two texts separates their words, and splitting all at once is fastest.
        joined = " ".join(texts).replace("\n", " ").replace("\t", " ").replace("\r", " ")
        words = pc.split_pattern(pa.array([joined], pa.large_string()), " ").flatten()
        distinct = words.dictionary_encode()
        rows = self._words.rows.numbers(distinct.dictionary.to_pylist())[distinct.indices.to_numpy()]
        self._learn_words()
        lengths = pc.utf8_length(words).to_numpy().astype(np.int64) + 1
        starts = np.cumsum(lengths) - lengths
        owner, found = self._words.get(rows, starts)
        if self._words.rows.is_full or self._parts.rows.is_full:
            self._words, self._parts = _Table(), _Table()
        text_starts = _starts(texts, gap=1)
        first_words = np.append(np.searchsorted(starts, text_starts), len(words))
        bounds = pairwise(np.searchsorted(owner, first_words).tolist())
        return [
            PlacedTokens(found.ids[first:last], found.spans[first:last] - np.int32(start))
            for (first, last), start in zip(bounds, text_starts.tolist(), strict=True)
        ]

    def _learn_words(self) -> None:
        """Add the words that were just looked up for the first time, by their parts."""
        words = self._words.rows.take_new()
        if not words:
            return
        # Added tokens such as [SEP] are found across punctuation, so a word with one is not cut.
        cut = [[word] if self._has_added(word) else _PARTS.findall(word) for word in words]
        parts = [part for found in cut for part in found]
        rows = self._parts.rows.numbers(parts)
        self._learn_parts()
        owner, found = self._parts.get(rows, _starts(parts, gap=0))
        word_of_part = np.repeat(np.arange(len(words)), np.fromiter(map(len, cut), np.int64, len(cut)))
        word = word_of_part[owner]
        self._words.add(len(words), word, found.ids, found.spans - _starts(words, gap=0)[word][:, None])

    def _learn_parts(self) -> None:
        """Add the parts that were just looked up for the first time, by tokenizing them."""
        parts = self._parts.rows.take_new()
        if not parts:
            return
        found, starts = self._tokenize(" ".join(parts)), _starts(parts, gap=1)
        part = np.searchsorted(starts, found.spans[:, 0], side="right") - 1
        self._parts.add(len(parts), part, found.ids, found.spans - starts[part][:, None])


def _starts(items: Sequence[str], gap: int) -> np.ndarray:
    """int64: where each string starts when they are joined by `gap` characters."""
    lengths = np.fromiter(map(len, items), np.int64, len(items)) + gap
    return np.cumsum(lengths) - lengths
