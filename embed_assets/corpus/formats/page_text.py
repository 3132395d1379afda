"""Joins the lines of a document's pages into one text. Pure functions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_EDGE_LINES = 2
"""At the top and the bottom of a page that may be its running header or footer."""
_MIN_REPEATS = 3
"""Pages that a line must stand on the edge of to be a header or footer."""
_NUMBER = re.compile(r"\d+|\b[ivxlc]+\b")
_ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}
_PAGE_NUMBER = re.compile(r"[-–— |]*(?:(?:page|seite|p\.|s\.) *)?#(?: *(?:of|von|de|sur|/) *#)?[-–— |]*", re.IGNORECASE)
_LINE_HYPHEN = "\ufffe"
"""What pdfium writes in place of a hyphen at the end of a line and of that line's end."""
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_BROKEN_WORD = re.compile(f"([^\\W\\d_]+){_LINE_HYPHEN}([^\\W\\d_]+)")
_LEADER = re.compile(r"(?: ?\.){5,}")
"""Dots that lead the eye to a page number: each would be a token."""
_LIGATURES = {
    0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st",
    0x2028: "\n", 0x2029: "\n", 0xAD: "",
}  # fmt: skip
"""And line separators, and soft hyphens, which are invisible."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a page."""

    text: str
    """'' between paragraphs."""
    is_large: bool = False
    """Whether it is set larger than most of its page, as headings are and running headers are not."""


def joined_pages(pages: Sequence[Sequence[Line]]) -> tuple[str, tuple[int, ...]]:
    """(text, the code point where each page starts), with a blank line between pages.

    A running header or footer stays where it stands first, page numbers nowhere. Words that a line end broke are whole
    again, and ligatures are letters.
    """
    running = _running_lines(pages)
    seen: set[str] = set()
    bodies = [_body(page, lines, seen) for page, lines in zip(pages, running, strict=True)]
    if not any(bodies):  # numbers are all there is
        bodies = [_body(page, {}, seen) for page in pages]
    has_broken = any(_LINE_HYPHEN in body for body in bodies)
    words = {word.lower() for body in bodies for word in _WORD.findall(body)} if has_broken else set()
    parts: list[str] = []
    starts: list[int] = []
    length = 0
    for body in bodies:
        whole = _BROKEN_WORD.sub(lambda m: _unbroken(m[1], m[2], words), body).replace(_LINE_HYPHEN, "-")
        if length and whole:
            parts.append("\n\n")
            length += 2
        starts.append(length)
        parts.append(whole)
        length += len(whole)
    return "".join(parts), tuple(starts)


def page_ranges(pages: Sequence[int]) -> str:
    """Ascending page numbers as ranges, such as '2-10, 12'."""
    ranges: list[list[int]] = []
    for page in pages:
        if ranges and page == ranges[-1][1] + 1:
            ranges[-1][1] = page
        else:
            ranges.append([page, page])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _running_lines(pages: Sequence[Sequence[Line]]) -> list[dict[int, str]]:
    """Per page, the lines that are part of a header or footer: by index, the shape that they share with other pages."""
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, page in enumerate(pages):
        for i in _edges(page):
            text = " ".join(page[i].text.split())
            places[text].append((number, i))
            if not page[i].is_large:
                for shape in _numbered_shapes(text, number):
                    places[shape].append((number, i))
    found: list[dict[int, str]] = [{} for _ in pages]
    for shape, at in places.items():
        if len({number for number, _ in at}) >= _MIN_REPEATS:
            for number, i in at:
                found[number][i] = shape
    return found


def _edges(page: Sequence[Line]) -> list[int]:
    """Indexes of the lines at the top and bottom of a page."""
    full = [i for i, line in enumerate(page) if line.text.strip()]
    return sorted({*full[:_EDGE_LINES], *full[-_EDGE_LINES:]})


def _numbered_shapes(text: str, page: int) -> list[str]:
    """The line with '#' for its numbers, with how far its first and its last one are from the page's number.

    One of these is equal on all pages if that number counts pages.
    """
    numbers = [_value(match[0]) for match in _NUMBER.finditer(text)]
    shape = _NUMBER.sub("#", text)
    return [f"{shape} first {numbers[0] - page}", f"{shape} last {numbers[-1] - page}"] if numbers else []


def _value(number: str) -> int:
    if number.isdecimal():
        return int(number[:9])
    digits = [_ROMAN[c] for c in number]
    return sum(-d if d < max(digits[i:]) else d for i, d in enumerate(digits))


def _body(page: Sequence[Line], running: dict[int, str], seen: set[str]) -> str:
    """The page's text without its number, and without the headers and footers that were `seen` before."""
    kept = []
    for i, line in enumerate(page):
        if shape := running.get(i, ""):
            is_number = _PAGE_NUMBER.fullmatch(_NUMBER.sub("#", " ".join(line.text.split()))) is not None
            if is_number or shape in seen:
                continue
            seen.add(shape)
        kept.append(line.text)
    return _LEADER.sub(" ...", "\n".join(kept).strip("\n").translate(_LIGATURES))


def _unbroken(start: str, end: str, words: Iterable[str]) -> str:
    """A word that was broken at its hyphen, which stays if the document has the word with it elsewhere only."""
    whole, hyphenated = start + end, f"{start}-{end}"
    return hyphenated if hyphenated.lower() in words and whole.lower() not in words else whole
