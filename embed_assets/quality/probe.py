"""A retrieval probe that needs no judgements: queries made from chunks, each of which should find where it came from.

The queries are headings that chunks begin with and, where there are too few, sentences from the middle of chunks. What
a query finds is told by its place in the document, so that spaces that cut documents differently can be compared.

How far the mean reciprocal rank of 200 queries is below that of all-MiniLM-L6-v2, in percent, over the Python
reference, where 96 of them are sentences, and 30 Rust RFCs. Single figures are over half of the reference:

| vectors | loss | | vectors | loss |
|---|---|---|---|---|
| int8 | 0, 0 | | CLS pooling | 20, 40 |
| first 256 dimensions | 1, 0 | | max pooling | 26, 28 |
| first 128 dimensions | 4, 9 | | last token's | 41, 51 |
| first 64 dimensions | 14, 24 | | token ids off by one | 11 |
| signs only | 7, 15 | | weights of the first or last layer shuffled | 77 or 53 |
| wordllama, a static model | 6, 3 | | all weights shuffled | 82, 90 |
| multilingual-e5-small | -8 | | random weights | 68 |
| mean over padding too, of batches sorted by length | 1, 2 | | the same, all texts padded to 256 | 74 |
| prompt 'passage: ' before chunks | -1 | | random vectors | 100, 100 |

Headings tell most. By the first sentence of each chunk, max pooling loses 12 and 9 %, hardly more than signs only with
11 and 7 %; by unique headings alone 26 and 29 %, CLS pooling 14 and 37 %, signs only 7 and 14 %.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from embed_assets.records import hash_text

QUERIES = 200
"""Queries in a probe."""
LEAST_QUERIES = 50
"""Queries that a probe must have to tell anything. With 50 of 200, the loss's interval is 23 to 34 points wide, and CLS
or max pooling loses over 10 % in 98 of 100 draws, wordllama in 12 to 30; with 150, 13 to 19 points, in 100 and in 1."""
TOP = 10
"""Hits of a query that are looked at."""
_CANDIDATES_PER_QUERY = 10
"""Kept while choosing: repeated texts, which are no queries, take some of the places."""
_LEAST_HEADING_BYTES = 12
"""Of its letters in UTF-8, where a Chinese character, which says more than a Latin one, has three. Shorter headings
tell less: by those of one word, over the Python reference, signs only lose 18 % and CLS pooling 15 %."""
_LEAST_SENTENCE_BYTES = 30
"""As of a heading: about five words."""
_LONGEST_SENTENCE = 300
"""Characters."""
_LEAST_LETTERS = 0.75
"""Share of a sentence's characters that are letters or spaces: fewer are code, tables or links."""
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|[。！？]|\n\s*\n")
_RESAMPLES = 1000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Passage:
    """What a query is made from: a chunk."""

    partition_key: str
    document_id: str
    char_start: int
    """Where it starts in its document, in code points."""
    heading_path: str
    """Headings above it, outermost first, joined by ' > '."""
    text: str


@dataclass(frozen=True, slots=True)
class ProbeQuery:
    """A query and the place that it came from."""

    text: str
    partition_key: str
    document_id: str
    position: int
    """Code point of the document."""

    def is_from(self, partition_key: str, document_id: str, char_start: int, char_end: int) -> bool:
        """Whether the query came from this half-open span of this document."""
        same_document = (partition_key, document_id) == (self.partition_key, self.document_id)
        return same_document and char_start <= self.position < char_end


@dataclass(frozen=True, slots=True)
class ProbeLoss:
    """How much less one space finds than another, by the same queries."""

    percent: float
    """Of the mean reciprocal rank; negative if it finds more."""
    low: float
    high: float
    """Limits of the 95 % interval of `percent`, were other queries drawn."""


def choose_queries(passages: Iterable[Passage], count: int = QUERIES) -> list[ProbeQuery]:
    """At most `count` queries, those with the smallest hashes; the same ones for the passages in any order.

    A text that comes from several places has several answers and is left out. Memory holds 20 candidates per query.
    """
    headings, sentences = _Sample(_CANDIDATES_PER_QUERY * count), _Sample(_CANDIDATES_PER_QUERY * count)
    for passage in passages:
        for sample, found in ((headings, _own_heading(passage)), (sentences, _middle_sentence(passage.text))):
            if found is not None:
                text, offset = found
                place = passage.partition_key, passage.document_id, passage.char_start + offset
                sample.add(ProbeQuery(text, *place))
    return [*headings.queries(), *sentences.queries()][:count]


def reciprocal_rank(found: Sequence[bool]) -> float:
    """1 / the place, from 1, of the first of a query's hits that it came from; 0 if that is none of the first `TOP`."""
    return next((1 / place for place, is_found in enumerate(found[:TOP], start=1) if is_found), 0.0)


def recall(reciprocal_ranks: np.ndarray) -> float:
    """Share of queries, from 0 to 1, that are answered among the first `TOP` hits."""
    return float(np.mean(reciprocal_ranks > 0))


def loss(before: np.ndarray, after: np.ndarray) -> ProbeLoss:
    """How much the reciprocal ranks `after` are below those `before` of the same queries, both of shape (queries,).

    The interval is a paired bootstrap over the queries, at least one. There is no loss if `before` finds nothing.
    """
    rows = np.random.default_rng(_SEED).integers(len(before), size=(_RESAMPLES, len(before)))
    low, high = np.percentile(_loss(before[rows].mean(axis=1), after[rows].mean(axis=1)), [2.5, 97.5])
    return ProbeLoss(float(_loss(before.mean(), after.mean())), float(low), float(high))


def _loss(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Percent that each of `after` is below that of `before`; 0 where that is 0."""
    return np.where(before > 0, 100 * (before - after) / np.where(before > 0, before, 1), 0.0)


class _Sample:
    """The queries with the smallest hashes of their texts.

    The bar only falls, so a text that is among them at the end was so whenever it was met: no repetition is missed.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._negated: list[int] = []
        """A heap of the hashes, the largest first."""
        self._kept: dict[int, ProbeQuery | None] = {}
        """By hash; None for a text that was met at several places."""

    def add(self, query: ProbeQuery) -> None:
        """Consider a query. The same text from the same place, as of chunks that overlap, is one query."""
        key = int(hash_text(" ".join(query.text.casefold().split())), 16)
        if key in self._kept:
            if self._kept[key] != query:
                self._kept[key] = None
        elif len(self._kept) < self._size:
            heapq.heappush(self._negated, -key)
            self._kept[key] = query
        elif key < -self._negated[0]:
            del self._kept[-heapq.heapreplace(self._negated, -key)]
            self._kept[key] = query

    def queries(self) -> list[ProbeQuery]:
        """Those from a single place, in the order of their hashes."""
        return [query for _, query in sorted(self._kept.items(), key=lambda item: item[0]) if query is not None]


def _own_heading(passage: Passage) -> tuple[str, int] | None:
    """The last heading of a chunk and its offset in the text, if the text begins with it but for markup."""
    *above, heading = passage.heading_path.split(" > ")
    if _size("".join(filter(str.isalpha, heading))) < _LEAST_HEADING_BYTES:
        return None
    offset = passage.text.find(heading)
    before = passage.text[: max(offset, 0)]
    for other in above:  # a heading right above it, with no text between
        before = before.replace(other, "")
    return None if offset < 0 or any(map(str.isalnum, before)) else (heading, offset)


def _middle_sentence(text: str) -> tuple[str, int] | None:
    """The usable sentence nearest to the middle of a text, on one line, and its offset; None if it has none."""
    ends = [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    spans = list(zip([0, *ends], ends, strict=False))
    for start, end in sorted(spans, key=lambda span: abs(span[0] + span[1] - len(text))):
        sentence = " ".join(text[start:end].split())
        if len(sentence) <= _LONGEST_SENTENCE and _size(sentence) >= _LEAST_SENTENCE_BYTES:
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if letters >= _LEAST_LETTERS * len(sentence):
                return sentence, end - len(text[start:end].lstrip())
    return None


def _size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))
