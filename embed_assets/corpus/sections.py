"""Long documents in sections that are split on their own, so that none is worked on as a whole. Pure."""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from embed_assets.corpus.structure import BLANK_LINES, Outline, find_fences

MAX_SECTION_CHARACTERS = 1 << 20
"""Splitting takes up to 300 bytes of memory per character. Few documents are that long."""
_CONTEXT_CHARACTERS = 16
_LINE_ENDS = re.compile(r"\n")
_SPACES = re.compile(r"\s")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a document, in order."""

    text: str
    media_type: str
    start: int
    """Code point of the document."""
    outline: Outline
    """One for all sections of the document."""
    is_last: bool


def sections_of(text: str, media_type: str) -> Iterator[Section]:
    """The document in sections; most documents are one."""
    outline, start = Outline(), 0
    while len(text) - start > MAX_SECTION_CHARACTERS:
        end = start + _cut(text[start : start + MAX_SECTION_CHARACTERS], media_type)
        yield Section(text[start:end], media_type, start, outline, False)
        start = end
    yield Section(text[start:], media_type, start, outline, True)


def _cut(text: str, media_type: str) -> int:
    """Where to cut, in the second half of the text: after a blank line outside of code, else a line, else a space.

    Which one depends on the characters around it alone, so that an edit moves this cut and few of those after it.
    """
    fences = find_fences(text, media_type)
    starts = [start for start, _ in fences]

    def is_in_code(position: int) -> bool:
        i = bisect_right(starts, position) - 1
        return i >= 0 and fences[i][0] < position < fences[i][1]

    for pattern in (BLANK_LINES, _LINE_ENDS, _SPACES):
        places = [m.end() for m in pattern.finditer(text, len(text) // 2) if m.end() < len(text)]
        outside = [p for p in places if not is_in_code(p)] if pattern is BLANK_LINES else places
        if outside:
            return min(outside, key=lambda p: _fingerprint(text, p))
    return len(text)


def _fingerprint(text: str, position: int) -> int:
    around = text[position - _CONTEXT_CHARACTERS : position + _CONTEXT_CHARACTERS]
    return zlib.crc32(around.encode("utf-8", "surrogatepass"))
