"""Documents to chunks that fit the model, from one tokenization of each document. Pure.

1. The text is tokenized once, in segments, for the code points where each token starts and ends.
2. `structure` says where it may be cut; where even that leaves pieces over the limit, words and then
   characters are added.
3. The cheapest way from start to end is taken (a shortest path whose steps hold at most the limit of
   tokens), which is what keeps the chunks few, the cuts good, and edits local.
4. Chunks whose edges may have changed their tokens are counted again, and split while over the limit.

The invariants, held by property tests: ``text[char_start:char_end] == chunk.text``; in order; nothing but
whitespace lost between chunks; none empty; none over the limit by the model's own tokenizer, nor over 64 characters
per token of it. Documents of more than a million characters are split in sections, see `sections`.
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

from embed_assets.corpus.sections import Section, sections_of
from embed_assets.corpus.structure import CHARACTER, WORD, Structure, cut_cost, find_structure
from embed_assets.records import Chunk, hash_text

CHUNKER_VERSION = "2"
"""Raise it when the same text would give other chunks: the chunks of every partition are made again."""

_SEGMENT_CHARACTERS = 20_000
_BATCH_CHARACTERS = 1 << 20
_MAX_CHARACTERS_PER_TOKEN = 64
"""A word that a tokenizer does not know can be one token, however long; a chunk must not."""
_SAFE_SPACE = " \t\n\r"
"""Whitespace for Python and for every tokenizer: a cut beside it can't change the tokens on either side."""


_Span = tuple[int, int]


class Tokenizer(Protocol):
    """What chunking needs of the model's tokenizer."""

    @property
    def special_tokens(self) -> int:
        """Tokens added to every text."""
        ...

    @property
    def splits_at_whitespace(self) -> bool:
        """A text cut at whitespace gives exactly the tokens that the pieces give."""
        ...

    def spans(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Per text an int32 array of shape (tokens, 2): code points where each token's visible part starts and ends."""
        ...

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens per text, special tokens included, nothing truncated."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """The settings that decide what the chunks are."""

    max_tokens: int
    """Largest chunk, special tokens included."""
    overlap_tokens: int = 0

    def version(self, tokenizer_hash: str) -> str:
        """Code version of chunks: changes when the same documents would give other chunks."""
        return hash_text(f"{CHUNKER_VERSION}/{self.max_tokens}/{self.overlap_tokens}/{tokenizer_hash}")[:12]


def split_document(text: str, media_type: str, tokenizer: Tokenizer, options: ChunkOptions) -> list[Chunk]:
    """The chunks of one document, in order; none for a text of only whitespace."""
    return next(split_documents([(text, media_type)], tokenizer, options))


def split_documents(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, options: ChunkOptions
) -> Iterator[list[Chunk]]:
    """The chunks of each (text, media type), in order.

    Documents are tokenized about a million characters at a time, which is what keeps all cores busy.
    """
    found: list[Chunk] = []
    for section, chunks in _split_sections(
        (s for document in documents for s in sections_of(*document)), tokenizer, options
    ):
        found += [_moved(chunk, len(found) + i, section.start) for i, chunk in enumerate(chunks)]
        if section.is_last:
            yield found
            found = []


def _moved(chunk: Chunk, index: int, by: int) -> Chunk:
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
        structure = find_structure(section.text, section.media_type, section.outline)
        yield section, _Splitter(section.text, structure, tokens, tokenizer, options).chunks()


def _tokenize(pieces: Iterable[tuple[str, tuple[int, int]]], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Token spans of each piece; encodings of at most about a million characters are alive at a time."""
    texts: list[str] = []
    size = 0
    for text, (start, end) in pieces:
        texts.append(text[start:end])
        size += end - start
        if size >= _BATCH_CHARACTERS:
            yield from tokenizer.spans(texts)
            texts, size = [], 0
    yield from tokenizer.spans(texts)


def _segments(text: str) -> list[tuple[int, int]]:
    """Consecutive spans of bounded length, cut at blank lines, line ends or spaces where there are any."""
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
    """Where a text's tokens are."""

    starts: np.ndarray
    """int64, code point of each token's first visible character, ascending."""
    ends_before: np.ndarray
    """int64, one longer: where the token before each one ends, 0 for the first, and where the last one ends."""
    doubtful: list[int]
    """Ends of segments cut where the tokenizer would not have: counts across them may be off by a little."""

    @classmethod
    def join(cls, text: str, segments: Sequence[tuple[int, int]], spans: Sequence[np.ndarray]) -> _Tokens:
        """The tokens of all segments."""
        joined = np.concatenate([s + start for (start, _), s in zip(segments, spans, strict=True)]).astype(np.int64)
        starts, ends = joined[:, 0], joined[:, 1]
        doubtful = [end for _, end in segments[:-1] if text[end - 1] not in _SAFE_SPACE]
        # Tokens of one character share its span; a space-only token is empty. Both keep the order.
        return cls(np.maximum.accumulate(starts), np.concatenate([[0], ends]), doubtful)

    def index(self, positions: np.ndarray) -> np.ndarray:
        """How many tokens start before each position."""
        return np.searchsorted(self.starts, positions)


class _Splitter:
    """Splits one document."""

    def __init__(
        self, text: str, structure: Structure, tokens: _Tokens, tokenizer: Tokenizer, options: ChunkOptions
    ) -> None:
        self._text, self._structure, self._tokens, self._tokenizer = text, structure, tokens, tokenizer
        self._limit = options.max_tokens - tokenizer.special_tokens
        self._overlap = options.overlap_tokens
        self._max_characters = options.max_tokens * _MAX_CHARACTERS_PER_TOKEN
        self._special = tokenizer.special_tokens

    def chunks(self) -> list[Chunk]:
        if not self._text.strip():
            return []
        bounds = self._cheapest(*self._cuts())
        cores = [s for s in (_strip(self._text, *span) for span in pairwise(bounds)) if s[0] < s[1]]
        counted = self._with_overlap(self._fitting(cores))
        paths = self._structure.heading_paths([start for (start, _), _ in counted])
        return [
            Chunk(i, self._text[start:end], path, start, end, count)
            for i, (((start, end), count), path) in enumerate(zip(counted, paths, strict=True))
        ]

    def _cuts(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and costs of all cuts to choose from: enough of them that no piece is over the limit."""
        positions, costs = self._usable(self._structure.cuts, self._structure.costs)
        limit = self._limit - self._overlap
        for kind, candidates in ((WORD, self._word_starts), (CHARACTER, self._token_starts)):
            more = [p for start, end in self._oversize(positions, limit) for p in candidates(start, end)]
            if more:
                positions = np.concatenate([positions, np.array(more, dtype=np.int64)])
                costs = np.concatenate([costs, [cut_cost(self._text, p, kind) for p in more]])
                order = np.argsort(positions, kind="stable")
                positions, costs = positions[order], costs[order]
        return positions, costs

    def _usable(self, positions: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Without cuts inside a token, and inside code that fits a chunk."""
        before = self._tokens.index(positions)
        keep = self._tokens.ends_before[before] <= positions
        for start, end in self._structure.fences:
            first, last = self._tokens.index(np.array([start, end]))
            if last - first <= self._limit - self._overlap:
                low, high = np.searchsorted(positions, [start + 1, end])
                keep[low:high] = False
        return positions[keep], costs[keep]

    def _oversize(self, positions: np.ndarray, limit: int) -> list[tuple[int, int]]:
        """Pieces between consecutive cuts that hold more than `limit` tokens."""
        bounds = np.concatenate([[0], positions, [len(self._text)]])
        counts = np.diff(self._tokens.index(bounds))
        return [(int(bounds[i]), int(bounds[i + 1])) for i in np.flatnonzero(counts > limit)]

    def _word_starts(self, start: int, end: int) -> list[int]:
        """Token starts in the piece that follow whitespace."""
        return [p for p in self._token_starts(start, end) if self._text[p - 1] in _SAFE_SPACE]

    def _token_starts(self, start: int, end: int) -> list[int]:
        """Token starts strictly inside the piece that are not inside an earlier token."""
        low, high = self._tokens.index(np.array([start + 1, end]))
        starts, ends = self._tokens.starts[low:high], self._tokens.ends_before[low:high]
        usable = starts[ends <= starts]
        return list(usable[np.diff(usable, prepend=-1) > 0].tolist())

    def _cheapest(self, cuts: np.ndarray, costs: np.ndarray) -> list[int]:
        """Bounds of the chunks, 0 and the end included: a shortest path over the cuts.

        A step is a chunk and holds at most the limit of tokens (or is the one piece that can't be cut);
        its price is that of the cut it ends at.
        """
        limit = self._limit - self._overlap
        bounds = [0, *cuts.tolist(), len(self._text)]
        before = self._tokens.index(np.array(bounds)).tolist()
        prices = [0.0, *costs.tolist(), 1.0]
        best = [0.0] * len(bounds)
        previous = [0] * len(bounds)
        # Where a chunk that ends at i can begin and be cheapest: earlier and dearer cuts are dropped.
        candidates: deque[int] = deque()
        for i in range(1, len(bounds)):
            while candidates and best[candidates[-1]] > best[i - 1]:
                candidates.pop()
            candidates.append(i - 1)
            while before[i] - before[candidates[0]] > limit and candidates[0] < i - 1:
                candidates.popleft()
            previous[i] = candidates[0]
            best[i] = best[candidates[0]] + prices[i]
        path = [len(bounds) - 1]
        while path[-1] > 0:
            path.append(previous[path[-1]])
        return [bounds[i] for i in reversed(path)]

    def _fitting(self, spans: list[_Span]) -> list[tuple[_Span, int]]:
        """The spans with their exact token counts; those that turn out to be over the limit are split."""
        result: list[tuple[_Span, int]] = []
        for span, count in zip(spans, self._exact_counts(spans), strict=True):
            is_long = count > self._limit + self._special or span[1] - span[0] > self._max_characters
            halves = self._halve(*span) if is_long else [span]
            # One character can be more tokens than a very small limit; there is nothing left to cut then.
            result.extend([(span, count)] if halves == [span] else self._fitting(halves))
        return result

    def _with_overlap(self, cores: list[tuple[_Span, int]]) -> list[tuple[_Span, int]]:
        """The chunks with the end of the one before in front; without it where that would be too much."""
        if not self._overlap:
            return cores
        widened = [_strip(self._text, *self._widen(one[0], *core)) for (one, _), (core, _) in pairwise(cores)]
        counts = self._exact_counts(widened)
        fits = (count <= self._limit + self._special for count in counts)
        chosen = zip(cores[1:], zip(widened, counts, strict=True), fits, strict=True)
        return [*cores[:1], *(wide if is_fitting else core for core, wide, is_fitting in chosen)]

    def _widen(self, before: int, start: int, end: int) -> _Span:
        """The chunk with up to the overlap's tokens of the one at `before` in front, from a sentence or word on."""
        first = int(self._tokens.index(np.array([start]))[0])
        earliest = max(before + 1, int(self._tokens.starts[max(0, first - self._overlap)])) if first else start
        sentence = int(np.searchsorted(self._structure.cuts, earliest))
        if sentence < len(self._structure.cuts) and self._structure.cuts[sentence] < start:
            return int(self._structure.cuts[sentence]), end
        words = self._word_starts(earliest - 1, start)
        return (words[0] if words else start), end

    def _exact_counts(self, spans: list[_Span]) -> list[int]:
        """Tokens of each span by itself, special tokens included; counted anew only where its edges leave doubt."""
        bounds = self._tokens.index(np.array(spans, dtype=np.int64).reshape(-1, 2))
        counts = [int(n) for n in bounds[:, 1] - bounds[:, 0] + self._special]
        doubtful = [i for i, span in enumerate(spans) if not self._is_certain(*span)]
        texts = [self._text[slice(*spans[i])] for i in doubtful]
        for i, count in zip(doubtful, self._tokenizer.count(texts), strict=True):
            counts[i] = count
        return counts

    def _halve(self, start: int, end: int) -> list[_Span]:
        """Two spans of a chunk that turned out too long: cut at the space nearest its middle, else in the middle."""
        middle = (start + end) // 2
        spaces = [m.end() for m in re.finditer(r"\s+", self._text[start:end])]
        inner = [start + s for s in spaces if 0 < s < end - start]
        cut = min(inner, key=lambda p: abs(p - middle)) if inner else middle
        return [s for s in (_strip(self._text, start, cut), _strip(self._text, cut, end)) if s[0] < s[1]]

    def _is_certain(self, start: int, end: int) -> bool:
        """The chunk's own tokens are those that the whole text has there."""
        text = self._text
        if not self._tokenizer.splits_at_whitespace:
            return False
        if start > 0 and text[start - 1] not in _SAFE_SPACE:
            return False
        if end < len(text) and text[end] not in _SAFE_SPACE:
            return False
        i = bisect_right(self._tokens.doubtful, start)
        return not (i < len(self._tokens.doubtful) and self._tokens.doubtful[i] < end)


def _strip(text: str, start: int, end: int) -> _Span:
    """The span without whitespace at its ends."""
    piece = text[start:end]
    left = len(piece) - len(piece.lstrip())
    return (start + left, start + left + len(piece.strip()))
