"""Splits documents into chunks that fit the model, from a single tokenization of each document. Pure functions.

1. The text is tokenized once, in segments, to learn the code points where each token starts and ends.
2. `structure` says where the text may be cut. Where that leaves a piece over the limit, the starts of lines, then of
   words and then of tokens are added.
3. No chunk spans a heading, so that `heading_path` is that of all its text. In each section, a shortest path from start
   to end, whose steps hold at most the limit of tokens, chooses among the cuts. That keeps chunks few, cuts good and
   the effect of an edit local.
4. A chunk whose edges may have changed its tokens is tokenized again, and split while it is over the limit.

Property tests check these invariants: ``text[char_start:char_end] == chunk.text``; chunks are in order; only whitespace
is lost between them; none is empty; none exceeds the limit by the model's own tokenizer, nor 64 characters per token of
the limit. Documents of more than a million characters are cut into sections first, see `sections`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from embed_assets.corpus.sections import Section, iter_sections
from embed_assets.corpus.structure import CHARACTER, LINE, WORD, Structure, cut_cost, find_structure
from embed_assets.records import Chunk, hash_text

CHUNKER_VERSION = "3"
"""Bump it when the same text would give different chunks: the chunks of every partition are then materialized again."""

_SEGMENT_CHARACTERS = 20_000
"""Tokenized as one text. Shorter segments spread the work more evenly over cores, but have more edges to recount."""
_BATCH_CHARACTERS = 1 << 20
"""Given to the tokenizer at a time. More keeps cores busier, but all encodings of a batch are in memory at once."""
_MAX_CHARACTERS_PER_TOKEN = 64
"""A word that a tokenizer does not know can be a single token, however long; this bounds the chunk's text all the same.
Far above ordinary text, of which a token is about four characters."""
_MAX_INDENT = 100
"""Characters before a line's text within which its line end is looked for."""
_SAFE_SPACE = " \t\n\r"
"""Whitespace to Python and to every tokenizer: a cut next to it can't change the tokens on either side."""

_Span = tuple[int, int]
"""Half-open range of code points."""


class PlacedTokens(Protocol):
    """Tokens of a text, without special tokens."""

    @property
    def ids(self) -> np.ndarray:
        """int32, shape (tokens,)."""
        ...

    @property
    def spans(self) -> np.ndarray:
        """int32, shape (tokens, 2): the code points where each token's visible part starts and ends."""
        ...


class Tokenizer(Protocol):
    """The part of the model's tokenizer that chunking needs."""

    @property
    def special_tokens(self) -> int:
        """Number of tokens that are added to every text."""
        ...

    @property
    def splits_at_whitespace(self) -> bool:
        """Whether a text has exactly the tokens of its pieces when it is cut at whitespace."""
        ...

    def tokens(self, texts: Sequence[str]) -> Sequence[PlacedTokens]:
        """The tokens of each text, with their places."""
        ...

    def encode(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """int32 ids of each text, without special tokens and truncation."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """The settings that determine how documents are chunked."""

    max_tokens: int
    """Tokens of the largest chunk, special tokens included."""
    overlap_tokens: int = 0
    """At most this many tokens at the end of a chunk are repeated at the start of the next."""

    def version(self, tokenizer_hash: str) -> str:
        """Code version of chunks: changes when the same documents would give different chunks."""
        return hash_text(f"{CHUNKER_VERSION}/{self.max_tokens}/{self.overlap_tokens}/{tokenizer_hash}")[:12]


def split_document(text: str, media_type: str, tokenizer: Tokenizer, options: ChunkOptions) -> list[Chunk]:
    """The chunks of one document, in order. A text of only whitespace has none."""
    return next(split_documents([(text, media_type)], tokenizer, options))


def split_documents(
    documents: Iterable[tuple[str, str] | tuple[str, str, str]], tokenizer: Tokenizer, options: ChunkOptions
) -> Iterator[list[Chunk]]:
    """The chunks of each document, given as (text, media type) or also with what is above all its headings, in order.

    Documents are tokenized about a million characters at a time, which keeps all cores busy.
    """
    found: list[Chunk] = []
    for section, chunks in _split_sections(
        (s for document in documents for s in iter_sections(*document)), tokenizer, options
    ):
        found += [_shifted(chunk, len(found) + i, section.start) for i, chunk in enumerate(chunks)]
        if section.is_last:
            yield found
            found = []


def _shifted(chunk: Chunk, index: int, by: int) -> Chunk:
    """A chunk of a section as a chunk of the whole document: `by` is the section's start."""
    if by == 0:
        return chunk
    return replace(chunk, chunk_index=index, char_start=chunk.char_start + by, char_end=chunk.char_end + by)


def _split_sections(
    sections: Iterable[Section], tokenizer: Tokenizer, options: ChunkOptions
) -> Iterator[tuple[Section, list[Chunk]]]:
    batch: list[Section] = []
    size = 0
    for section in sections:
        batch.append(section)
        size += len(section.text)
        if size >= _BATCH_CHARACTERS:
            yield from _split_batch(batch, tokenizer, options)
            batch, size = [], 0
    if batch:
        yield from _split_batch(batch, tokenizer, options)


def _split_batch(
    batch: Sequence[Section], tokenizer: Tokenizer, options: ChunkOptions
) -> Iterator[tuple[Section, list[Chunk]]]:
    segments = [_segments(section.text) for section in batch]
    pieces = ((s.text, span) for s, spans in zip(batch, segments, strict=True) for span in spans)
    found = _tokenize(pieces, tokenizer)
    for section, spans in zip(batch, segments, strict=True):
        tokens = _Tokens.join(section.text, spans, [next(found) for _ in spans])
        structure = find_structure(section.text, section.media_type, section.outline, section.open_fence)
        yield section, _Splitter(section.text, structure, tokens, tokenizer, options).chunks()


def _tokenize(pieces: Iterable[tuple[str, tuple[int, int]]], tokenizer: Tokenizer) -> Iterator[PlacedTokens]:
    """The tokens of each piece; about a million characters are tokenized at a time."""
    texts: list[str] = []
    size = 0
    for text, (start, end) in pieces:
        texts.append(text[start:end])
        size += end - start
        if size >= _BATCH_CHARACTERS:
            yield from tokenizer.tokens(texts)
            texts, size = [], 0
    yield from tokenizer.tokens(texts)


def _segments(text: str) -> list[tuple[int, int]]:
    """Consecutive spans of bounded length that cover the text, cut at blank lines, line ends or spaces if possible."""
    spans: list[tuple[int, int]] = []
    start = 0
    while len(text) - start > _SEGMENT_CHARACTERS:
        limit = start + _SEGMENT_CHARACTERS
        for separator in ("\n\n", "\n", " "):
            end = text.rfind(separator, start + _SEGMENT_CHARACTERS // 2, limit) + len(separator)
            if end > start + len(separator):
                break
        else:
            end = limit
        spans.append((start, end))
        start = end
    spans.append((start, len(text)))
    return spans


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Positions of a text's tokens."""

    starts: np.ndarray
    """int64 (tokens,): code point of each token's first visible character, ascending."""
    ends_before: np.ndarray
    """int64 (tokens + 1,): element i is where token i - 1 ends; element 0 is 0."""
    ids: np.ndarray
    """int32 (tokens,)."""
    unsafe_ends: list[int]
    """Ends of segments that may be cut inside a token: token counts across them may be slightly off."""

    @classmethod
    def join(cls, text: str, segments: Sequence[tuple[int, int]], found: Sequence[PlacedTokens]) -> _Tokens:
        """The tokens of a text, from those of its segments."""
        pairs = list(zip(segments, found, strict=True))
        joined = np.concatenate([tokens.spans + np.int64(start) for (start, _), tokens in pairs])
        starts, ends = joined[:, 0], joined[:, 1]
        ids = np.concatenate([tokens.ids for tokens in found])
        unsafe_ends = [end for _, end in segments[:-1] if text[end - 1] not in _SAFE_SPACE]
        # Tokens of one character share its span, and a token of only spaces is empty: starts must still ascend.
        return cls(np.maximum.accumulate(starts), np.concatenate([[0], ends]), ids, unsafe_ends)

    def index(self, positions: np.ndarray) -> np.ndarray:
        """Number of tokens that start before each position, in the positions' shape."""
        return np.searchsorted(self.starts, positions)


class _Splitter:
    """Splits one section."""

    def __init__(
        self, text: str, structure: Structure, tokens: _Tokens, tokenizer: Tokenizer, options: ChunkOptions
    ) -> None:
        self._text, self._structure, self._tokens, self._tokenizer = text, structure, tokens, tokenizer
        self._limit = options.max_tokens - tokenizer.special_tokens
        self._overlap = options.overlap_tokens
        self._max_characters = options.max_tokens * _MAX_CHARACTERS_PER_TOKEN
        self._special = tokenizer.special_tokens

    def chunks(self) -> list[Chunk]:
        """The section's chunks, in order; positions are relative to the section."""
        if not self._text.strip():
            return []
        bounds = [0, *self._structure.section_starts, len(self._text)]
        # With room for all of a section, the cheapest path is a single step: every cut has a cost.
        if np.diff(self._tokens.index(np.array(bounds))).max() > self._limit - self._overlap:
            bounds = self._cheapest_path(*self._cuts(), frozenset(bounds))
        cores = [s for s in (_strip(self._text, *span) for span in pairwise(bounds)) if s[0] < s[1]]
        found = self._with_overlap(self._split_oversize(cores))
        paths = self._structure.heading_paths([start for (start, _), _ in found])
        return [
            Chunk(i, self._text[start:end], path, start, end, len(ids) + self._special, ids)
            for i, (((start, end), ids), path) in enumerate(zip(found, paths, strict=True))
        ]

    def _cuts(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions, costs) of the cuts to choose from, so many that no piece between them is over the limit."""
        positions, costs = self._allowed(self._structure.cuts, self._structure.costs)
        limit = self._limit - self._overlap
        levels = ((LINE, self._line_starts), (WORD, self._word_starts), (CHARACTER, self._token_starts))
        for kind, candidates in levels:
            more = [p for start, end in self._oversize_pieces(positions, limit) for p in candidates(start, end)]
            if more:
                positions = np.concatenate([positions, np.array(more, dtype=np.int64)])
                costs = np.concatenate([costs, [cut_cost(self._text, p, kind) for p in more]])
                order = np.argsort(positions, kind="stable")
                positions, costs = positions[order], costs[order]
        return positions, costs

    def _allowed(self, positions: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(positions, costs) without the cuts inside a token, or inside a code block that fits into a chunk."""
        before = self._tokens.index(positions)
        keep = self._tokens.ends_before[before] <= positions
        for start, end in self._structure.fences:
            first, last = self._tokens.index(np.array([start, end]))
            if last - first <= self._limit - self._overlap:
                low, high = np.searchsorted(positions, [start + 1, end])
                keep[low:high] = False
        return positions[keep], costs[keep]

    def _oversize_pieces(self, positions: np.ndarray, limit: int) -> list[tuple[int, int]]:
        """Spans between consecutive cuts that have more than `limit` tokens."""
        bounds = np.concatenate([[0], positions, [len(self._text)]])
        counts = np.diff(self._tokens.index(bounds))
        return [(int(bounds[i]), int(bounds[i + 1])) for i in np.flatnonzero(counts > limit)]

    def _line_starts(self, start: int, end: int) -> list[int]:
        """Code points inside the span where a token starts that begins a line."""
        return [p for p in self._token_starts(start, end) if "\n" in _space_before(self._text, p)]

    def _word_starts(self, start: int, end: int) -> list[int]:
        """Code points inside the span where a token starts right after whitespace."""
        return [p for p in self._token_starts(start, end) if self._text[p - 1] in _SAFE_SPACE]

    def _token_starts(self, start: int, end: int) -> list[int]:
        """Code points strictly inside the span where a token starts and no earlier token reaches further."""
        low, high = self._tokens.index(np.array([start + 1, end]))
        starts, ends = self._tokens.starts[low:high], self._tokens.ends_before[low:high]
        usable = starts[ends <= starts]
        return list(usable[np.diff(usable, prepend=-1) > 0].tolist())

    def _cheapest_path(self, cuts: np.ndarray, costs: np.ndarray, needed: frozenset[int]) -> list[int]:
        """Bounds of the chunks, with 0 and the end: a shortest path over the cuts, by way of those that are needed.

        A step is a chunk, has at most the limit of tokens (or is a single piece that can't be cut), and costs what
        the cut at its end costs. Takes linear time.
        """
        limit = self._limit - self._overlap
        bounds = [0, *cuts.tolist(), len(self._text)]
        before = self._tokens.index(np.array(bounds)).tolist()
        step_costs = [0.0, *costs.tolist(), 1.0]
        best = [0.0] * len(bounds)
        previous = [0] * len(bounds)
        # Starts to consider for a chunk that ends at i, cheapest first: a start is dropped when a later one is cheaper.
        candidates: deque[int] = deque()
        for i in range(1, len(bounds)):
            while candidates and best[candidates[-1]] > best[i - 1]:
                candidates.pop()
            candidates.append(i - 1)
            while before[i] - before[candidates[0]] > limit and candidates[0] < i - 1:
                candidates.popleft()
            previous[i] = candidates[0]
            best[i] = best[candidates[0]] + step_costs[i]
            if bounds[i] in needed:
                candidates.clear()
        path = [len(bounds) - 1]
        while path[-1] > 0:
            path.append(previous[path[-1]])
        return [bounds[i] for i in reversed(path)]

    def _split_oversize(self, spans: list[_Span]) -> list[tuple[_Span, np.ndarray]]:
        """The spans with their exact tokens; those that turn out to be over a limit are halved until they fit."""
        result: list[tuple[_Span, np.ndarray]] = []
        for span, ids in zip(spans, self._exact_tokens(spans), strict=True):
            is_long = len(ids) > self._limit or span[1] - span[0] > self._max_characters
            halves = self._halve(*span) if is_long else [span]
            # A single character can have more tokens than a very small limit. It can't be cut, so it stays.
            result.extend([(span, ids)] if halves == [span] else self._split_oversize(halves))
        return result

    def _with_overlap(self, cores: list[tuple[_Span, np.ndarray]]) -> list[tuple[_Span, np.ndarray]]:
        """The spans and tokens, each span extended back over the end of the previous one where that fits the limit."""
        if not self._overlap:
            return cores
        extended = [_strip(self._text, *self._extend_back(one[0], *core)) for (one, _), (core, _) in pairwise(cores)]
        longer = zip(extended, self._exact_tokens(extended), strict=True)
        pairs = zip(cores[1:], longer, strict=True)
        return [*cores[:1], *(long if len(long[1]) <= self._limit else core for core, long in pairs)]

    def _extend_back(self, before: int, start: int, end: int) -> _Span:
        """The span extended back by at most the overlap, to the start of a sentence or word.

        It always starts after `before`, where the previous chunk starts, and in the section that it is in.
        """
        first = int(self._tokens.index(np.array([start]))[0])
        earliest = max(before + 1, int(self._tokens.starts[max(0, first - self._overlap)])) if first else start
        heading = bisect_right(self._structure.headings, start, key=lambda heading: heading.start) - 1
        if heading >= 0:
            earliest = min(start, max(earliest, self._structure.headings[heading].start))
        sentence = int(np.searchsorted(self._structure.cuts, earliest))
        if sentence < len(self._structure.cuts) and self._structure.cuts[sentence] < start:
            return int(self._structure.cuts[sentence]), end
        words = self._word_starts(earliest - 1, start)
        return (words[0] if words else start), end

    def _exact_tokens(self, spans: list[_Span]) -> list[np.ndarray]:
        """int32 ids of the tokens of each span by itself. Only spans with uncertain edges are tokenized again."""
        bounds = self._tokens.index(np.array(spans, dtype=np.int64).reshape(-1, 2)).tolist()
        found = [self._tokens.ids[first:last] for first, last in bounds]
        uncertain = [i for i, span in enumerate(spans) if not self._has_tokens_of_text(*span)]
        texts = [self._text[slice(*spans[i])] for i in uncertain]
        for i, ids in zip(uncertain, self._tokenizer.encode(texts), strict=True):
            found[i] = ids
        return found

    def _halve(self, start: int, end: int) -> list[_Span]:
        """A span's two parts, cut at the whitespace nearest its middle, else in the middle; one if it can't be cut."""
        middle = (start + end) // 2
        spaces = [m.end() for m in re.finditer(r"\s+", self._text[start:end])]
        inner = [start + s for s in spaces if 0 < s < end - start]
        cut = min(inner, key=lambda p: abs(p - middle)) if inner else middle
        return [s for s in (_strip(self._text, start, cut), _strip(self._text, cut, end)) if s[0] < s[1]]

    def _has_tokens_of_text(self, start: int, end: int) -> bool:
        """Whether the span is certain to have the same tokens by itself as within the whole text."""
        text = self._text
        if not self._tokenizer.splits_at_whitespace:
            return False
        if start > 0 and text[start - 1] not in _SAFE_SPACE:
            return False
        if end < len(text) and text[end] not in _SAFE_SPACE:
            return False
        unsafe_ends = self._tokens.unsafe_ends
        i = bisect_right(unsafe_ends, start)
        return not (i < len(unsafe_ends) and unsafe_ends[i] < end)


def _space_before(text: str, position: int) -> str:
    """The whitespace before a position, if it is not very long."""
    before = text[max(0, position - _MAX_INDENT) : position]
    return before[len(before.rstrip()) :]


def _strip(text: str, start: int, end: int) -> _Span:
    """The span without the whitespace at its ends."""
    piece = text[start:end]
    left = len(piece) - len(piece.lstrip())
    return (start + left, start + left + len(piece.strip()))
