"""Where a text may be cut, and how gladly: headings, blocks, list items, sentences. Pure.

The costs are what keeps edits local. A cut at a heading is cheap, so chunks restart there; all others
carry a part that depends only on the few characters around the cut, so that the cheapest way through a
long stretch meets its old course again soon after an edit. They were tuned on Rust RFCs, see
`embed_assets_tests/benchmarks/bench_chunking.py`.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

_HEADING_COST = (0.2, 0.4, 0.8)
"""By depth: 1, 2, and 3 or deeper."""
_HEADING_NOISE = 1.0
BLOCK, ITEM, CODE_LINE, SENTENCE, WORD, CHARACTER = range(6)
_COST = (0.8, 0.8, 0.6, 1.7, 3.7, 5.7)
"""By kind of cut. One more chunk costs what its cut costs: a dearer cut is taken to save a cheaper one only."""
_NOISE = 7.0
_NOISE_POWER = 0.4
_CONTEXT_CHARACTERS = 6

BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]*_`]*\s+(?=[^\sa-z])|[。！？｡]+[」』”）]*\s*")
_LIST_ITEM = re.compile(r"(?m)^[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+(?=\S)|^[ \t]*\|")
_FENCE = re.compile(r"(?m)^[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*(`{3,}|~{3,})(.*)$")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(?:.*\n){0,200}?---[ \t]*$", re.MULTILINE)
_ATX_HEADING = re.compile(r"(?m)^ {0,3}(#{1,6})(?:[ \t](.*))?$")
_SETEXT_HEADING = re.compile(
    r"(?m)^ {0,3}(?![-*+][ \t]|\d{1,9}[.)][ \t]|#{1,6}[ \t]|[>|<]|(?:[-*_=][ \t]*)+$|\s)(\S.*)\n {0,3}(=+|-{2,})[ \t]*$"
)
_PUNCTUATION = r"[!-/:-@\[-`{-~]"
_RST_HEADING = re.compile(
    rf"(?m)^(?:({_PUNCTUATION})\1+[ \t]*\n[ \t]*(\S.*)\n(\1{{2,}})[ \t]*|(\S.*)\n(({_PUNCTUATION})\6*)[ \t]*)$"
)
_RST_NO_TITLE = re.compile(r"(?:[-*+]|\.\.|\d+[.)]|[|>:])[ \t]")
_RST_SURE_LENGTH = 4
"""An underline that long makes a heading even when it is shorter than the title (docutils only warns)."""
_MAX_TITLE_CHARACTERS = 200
"""A longer 'heading' is a paragraph in a heading's clothes; its beginning is title enough."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of the document."""

    start: int
    """Code point of its line's start."""
    depth: int
    """1 is outermost."""
    title: str


@dataclass(slots=True)
class Outline:
    """What the part of a long document before a section means for it."""

    path: list[Heading] = field(default_factory=list)
    """Headings that the section is under, outermost first."""
    styles: dict[tuple[str, bool], int] = field(default_factory=dict)
    """Depths of reStructuredText's headings by their style, which the document itself defines."""


@dataclass(frozen=True, slots=True)
class Structure:
    """Where a text may be cut."""

    cuts: np.ndarray
    """int64 code points, ascending, each the start of a line's or sentence's text; 0 and the end are not in it."""
    costs: np.ndarray
    """float64, what each cut costs."""
    fences: list[tuple[int, int]]
    """Half-open spans of code that should stay whole."""
    headings: list[Heading]
    outline: Outline
    """Of the document before this text; `heading_paths` brings it up to the text's end."""

    def heading_paths(self, positions: Sequence[int]) -> list[str]:
        """For each of the ascending positions, the headings above it, outermost first, joined by ' > '."""
        paths: list[str] = []
        path = self.outline.path
        following = deque(self.headings)

        def descend(until: int) -> None:
            while following and following[0].start <= until:
                while path and path[-1].depth >= following[0].depth:
                    path.pop()
                path.append(following.popleft())

        for position in positions:
            descend(position)
            paths.append(" > ".join(h.title for h in path if h.title))
        if following:
            descend(following[-1].start)
        return paths


def find_structure(text: str, media_type: str, outline: Outline | None = None) -> Structure:
    """The cuts of a text: Markdown and reStructuredText by their syntax, anything else by blank lines and sentences.

    `outline` is that of the document before the text, where the text is a section of a longer one.
    """
    outline = outline or Outline()
    fences = find_fences(text, media_type)
    headings = _headings(text, media_type, fences, outline)
    kinds: dict[int, int] = {}
    for pattern, kind in ((_SENTENCE_END, SENTENCE), (_LIST_ITEM, ITEM), (BLANK_LINES, BLOCK)):
        # Later kinds are better places for the same cut. List items are found by their start, the others by their end.
        kinds.update(dict.fromkeys((m.start() if kind == ITEM else m.end() for m in pattern.finditer(text)), kind))
    _cut_around_fences(text, kinds, fences)
    depths = {h.start: h.depth for h in headings}
    positions = sorted(p for p in kinds.keys() | depths.keys() if 0 < p < len(text))
    costs = [_cost(text, p, kinds.get(p, BLOCK), depths.get(p)) for p in positions]
    return Structure(np.array(positions, dtype=np.int64), np.array(costs), fences, headings, outline)


def cut_cost(text: str, position: int, kind: int) -> float:
    """What a cut of that kind costs there: the kind's own cost, and a part that the characters around it decide."""
    return _cost(text, position, kind, None)


def _cost(text: str, position: int, kind: int, heading_depth: int | None) -> float:
    around = text[max(0, position - _CONTEXT_CHARACTERS) : position + _CONTEXT_CHARACTERS]
    fraction = zlib.crc32(around.encode("utf-8", "surrogatepass")) / 2**32
    noise = float(fraction**_NOISE_POWER)
    if heading_depth is not None:
        return _HEADING_COST[min(heading_depth, 3) - 1] + _HEADING_NOISE * noise
    return _COST[kind] + _NOISE * noise


def find_fences(text: str, media_type: str) -> list[tuple[int, int]]:
    """Spans of Markdown's fenced code, the fences' lines included. An unclosed fence runs to the end of the text."""
    if media_type != "text/markdown":
        return []
    fences: list[tuple[int, int]] = []
    opening: re.Match[str] | None = None
    for line in _FENCE.finditer(text):
        if opening is None:
            if line[1][0] == "~" or "`" not in line[2]:  # ```a``` on one line is no fence
                opening = line
        elif line[1].startswith(opening[1]) and not line[2].strip():
            fences.append((opening.start(), line.end()))
            opening = None
    if opening is not None:
        fences.append((opening.start(), len(text)))
    return fences


def _cut_around_fences(text: str, kinds: dict[int, int], fences: Sequence[tuple[int, int]]) -> None:
    """Inside code, lines are the places to cut; before it is a block's start."""
    if not fences:
        return
    starts = [start for start, _ in fences]
    for position in list(kinds):
        i = bisect_right(starts, position) - 1
        if i >= 0 and starts[i] < position < fences[i][1]:
            del kinds[position]
    for start, end in fences:
        kinds[start] = BLOCK
        line = text.find("\n", start, end) + 1
        while 0 < line < end:
            kinds[line] = CODE_LINE
            line = text.find("\n", line, end) + 1


def _headings(text: str, media_type: str, fences: Sequence[tuple[int, int]], outline: Outline) -> list[Heading]:
    if media_type == "text/x-rst":
        return _rst_headings(text, outline.styles)
    if media_type != "text/markdown":
        return []
    setext = [Heading(m.start(), 1 if m[2][0] == "=" else 2, _title(m[1])) for m in _SETEXT_HEADING.finditer(text)]
    atx = [Heading(m.start(), len(m[1]), _title(_without_marks(m[2] or ""))) for m in _ATX_HEADING.finditer(text)]
    front_matter = _FRONT_MATTER.match(text)
    hidden = [
        *fences,
        *([front_matter.span()] if front_matter else []),
        *_spans(text, "<!--", "-->"),
        *_spans(text, "<pre", "</pre>"),
    ]
    return sorted(_outside(hidden, [*atx, *setext]), key=lambda h: h.start)


def _outside(hidden: Sequence[tuple[int, int]], headings: Sequence[Heading]) -> Iterator[Heading]:
    """The headings that begin in none of the spans."""
    covered = sorted(hidden)
    starts = [start for start, _ in covered]
    ends = list(accumulate((end for _, end in covered), max))
    for heading in headings:
        i = bisect_right(starts, heading.start) - 1
        if i < 0 or heading.start >= ends[i]:
            yield heading


def _spans(text: str, opening: str, closing: str) -> Iterator[tuple[int, int]]:
    """Spans from each opening mark to its closing one."""
    end = 0
    while (start := text.find(opening, end)) >= 0:
        end = text.find(closing, start)
        if end < 0:
            return
        yield start, end


def _title(line: str) -> str:
    return " ".join(line[:_MAX_TITLE_CHARACTERS].split())


def _without_marks(rest: str) -> str:
    """A heading's text without its closing marks: 'Title ##' is 'Title', 'C#' stays."""
    title = rest.strip()
    unmarked = title.rstrip("#")
    return unmarked if unmarked != title and (not unmarked or unmarked[-1] in " \t") else title


def _rst_headings(text: str, styles: dict[tuple[str, bool], int]) -> list[Heading]:
    """Depth is the order in which a style (its character, and whether there is a line above) first appears."""
    found: list[Heading] = []
    end = 0
    for m in _RST_HEADING.finditer(text):
        title, line = (m[2] or m[4] or "").strip(), m[3] or m[5]
        follows_heading = bool(found) and m.start() == end + 1
        is_apart = (
            m[1] is not None
            or follows_heading
            or not text[max(0, m.start() - 200) : m.start()].rpartition("\n")[0][-1:].strip()
        )
        is_long = len(line) >= min(len(title), _RST_SURE_LENGTH)
        if is_apart and is_long and re.search(r"\w", title) and not _RST_NO_TITLE.match(title):
            depth = styles.setdefault((line[0], m[1] is not None), len(styles) + 1)
            found.append(Heading(m.start(), depth, _title(title)))
            end = m.end()
    return found
