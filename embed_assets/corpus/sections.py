"""Cuts long documents into sections that are chunked one by one, which bounds memory. Pure functions."""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embed_assets.corpus.markdown import fence_open_at_end, find_fences
from embed_assets.corpus.structure import BLANK_LINES, Heading, Outline

MAX_SECTION_CHARACTERS = 1 << 20
"""Longest section. Chunking takes up to 300 bytes of memory per character; few documents are longer than this."""
_CONTEXT_CHARACTERS = 16
"""On either side of a cut, to choose it by. More make ties rarer, but let an edit near a cut move it more often."""
_LINE_ENDS = re.compile(r"\n")
_SPACES = re.compile(r"\s")


@dataclass(frozen=True, slots=True)
class Section:
    """A consecutive part of a document."""

    text: str
    media_type: str
    start: int
    """Its first code point in the document."""
    outline: Outline
    """Shared by all sections of the document, and updated as they are chunked in order."""
    is_last: bool
    """Whether the document ends with it."""
    open_fence: str = ""
    """The fence of the code block that it begins in."""


def iter_sections(text: str, media_type: str, root: str = "") -> Iterator[Section]:
    """The sections of a document, in order. Most documents are a single one. `root` is above all its headings."""
    outline, start, fence = Outline([Heading(0, 0, root, 0)] if root else []), 0, ""
    has_fences = media_type == "text/markdown"
    while len(text) - start > MAX_SECTION_CHARACTERS:
        part = text[start : start + MAX_SECTION_CHARACTERS]
        part = part[: _cut(part, find_fences(part, fence) if has_fences else [])]
        yield Section(part, media_type, start, outline, False, fence)
        start += len(part)
        fence = fence_open_at_end(part, fence) if has_fences else ""
    yield Section(text[start:], media_type, start, outline, True, fence)


def _cut(text: str, fences: Sequence[tuple[int, int]]) -> int:
    """Where to cut, in the second half of the text: after a blank line outside code, else a line end, else a space.

    The choice among them depends only on the characters around each, so that an edit moves few cuts.
    """
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
    """A hash of the characters around a position."""
    around = text[position - _CONTEXT_CHARACTERS : position + _CONTEXT_CHARACTERS]
    return zlib.crc32(around.encode("utf-8", "surrogatepass"))
