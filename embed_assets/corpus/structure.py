"""Finds where a text may be cut (at headings, blocks, list items, sentences) and what each cut costs. Pure functions.

The costs keep the effect of an edit local. A cut at a heading is cheap, so chunks restart there. Every cut also has
some noise that depends only on the few characters around it, so that the cheapest path through a long stretch soon
rejoins its old course after an edit. The constants were tuned on 600 Rust RFCs with
`embed_assets_tests/benchmarks/bench_chunking.py`, for few chunks changed by an inserted sentence.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np

from embed_assets.corpus.code import definitions, is_code
from embed_assets.corpus.markdown import find_fences, find_html, plain

_HEADING_COST = (0.2, 0.4, 0.8)
"""By depth: 1, 2, and 3 or deeper. Tuned."""
_HEADING_NOISE = 1.0
"""Weight of the noise at a heading: small, so that headings stay the cheapest cuts. Tuned."""
BLOCK, ITEM, CODE_LINE, SENTENCE, LINE, WORD, CHARACTER = range(7)
_COST = (0.8, 0.8, 0.6, 1.7, 2.7, 3.7, 5.7)
"""By kind of cut, in the order above. An additional chunk costs as much as its cut does. Tuned, but for LINE."""
_NOISE = 7.0
"""Weight of the noise: higher makes edits more local, but chunks smaller and cuts worse. Tuned."""
_NOISE_POWER = 0.4
"""Shapes the noise, which is uniform in [0, 1] raised to this power: below 1, cheap cuts are rare. Tuned."""
_CONTEXT_CHARACTERS = 6
"""On either side of a cut, to derive its noise from. With six, an edited word changes one chunk in 99 of 100 cases."""

BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
# Full stops of Hindi, Urdu, Arabic, Burmese, Khmer and Amharic among them.
_SENTENCE_END = re.compile(r"[.!?…।॥۔؟؛။។።፧][\"'”’»)\]*_`]*\s+(?=[^\sa-z])")
_ABBREVIATIONS = ("Dr", "Mr", "Ms", "St", "Mrs", "Fig", "Prof")
"""No sentence ends after them. Not part of the pattern: it would be tried at each character, at ten times the cost."""
_CJK_SENTENCE_END = re.compile(r"[。！？｡]+[」』”）]*\s*")
# Patterns that begin with a line end are for texts with one put in front of them: a match then starts where its line
# does in the text itself, and searching for a character is several times as fast as trying "^" at each.
_LINE_END = re.compile(r"\n")
_LIST_ITEM = re.compile(r"\n[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+(?=\S)|\|)")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(?:.*\n){0,200}?---[ \t]*$", re.MULTILINE)
_ATX_HEADING = re.compile(r"(?m)\n {0,3}(#{1,6})(?:[ \t](.*))?$")
_SETEXT_UNDERLINE = re.compile(r"\n {0,3}(?:=|--)")
_PARAGRAPH = r" {0,3}(?![-*+][ \t]|\d{1,9}[.)][ \t]|#{1,6}[ \t]|[>|<]|(?:[-*_=][ \t]*)+$|\s)(\S.*)"
_SETEXT_HEADING = re.compile(rf"(?m)^{_PARAGRAPH}\n {{0,3}}(=+|-{{2,}})[ \t]*$")
_LINE_OF_PARAGRAPH = re.compile(rf"{_PARAGRAPH}$")
_MAX_SETEXT_LINES = 3
_PUNCTUATION = r"[!-/:-@\[-`{-~]"
_RST_HEADING = re.compile(
    rf"(?m)^(?:({_PUNCTUATION})\1+[ \t]*\n[ \t]*(\S.*)\n(\1{{2,}})[ \t]*|(\S.*)\n(({_PUNCTUATION})\6*)[ \t]*)$"
)
_RST_NO_TITLE = re.compile(r"(?:[-*+]|\.\.|\d+[.)]|[|>:])[ \t]")
_RST_MIN_UNDERLINE = 4
"""An underline of at least this length may be shorter than its title; docutils accepts it too, with a warning."""
_LOOK_BACK_CHARACTERS = 200
"""How far back to check that a heading without overline follows a blank line; bounds the work per heading."""
_MAX_TITLE_CHARACTERS = 200
"""A longer 'heading' is really a paragraph; it is cut, as every chunk below repeats it in its heading path."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of the document."""

    start: int
    """Code point of its line's start."""
    depth: int
    """1 is outermost."""
    title: str
    end: int
    """Code point after its own lines."""


@dataclass(slots=True)
class Outline:
    """The state that a section of a long document inherits from the text before it."""

    path: list[Heading] = field(default_factory=list)
    """Headings above the section's start, outermost first."""
    styles: dict[tuple[str, bool], int] = field(default_factory=dict)
    """Depth of each reStructuredText heading style, (character, has overline), in the order the document uses them."""


@dataclass(frozen=True)
class Structure:
    """The possible cuts of a text, and its headings."""

    text: str = field(repr=False)
    fences: list[tuple[int, int]]
    """Half-open spans of code blocks, which should stay whole."""
    headings: list[Heading]
    """In order of their start."""
    outline: Outline
    """Inherited from the document before this text; `heading_paths` advances it to the text's end."""
    is_code: bool = False
    """Whether the text is source code, which has lines in place of sentences."""

    @property
    def cuts(self) -> np.ndarray:
        """int64 (cuts,): code points in ascending order, each the start of a line or sentence; not 0, nor the end."""
        return self._cuts_and_costs[0]

    @property
    def costs(self) -> np.ndarray:
        """float64 (cuts,): the cost of each cut."""
        return self._cuts_and_costs[1]

    @cached_property
    def section_starts(self) -> list[int]:
        """Code points, in ascending order, where a heading, or several without text between, begin; not 0."""
        firsts = {0, *(last + 1 for last in self._last_of_runs)}
        starts = [heading.start for i, heading in enumerate(self.headings) if i in firsts]
        return starts[1:] if starts and not self.text[: starts[0]].strip() else starts

    @cached_property
    def _last_of_runs(self) -> list[int]:
        """For each heading, the index of the last one that follows without text between."""
        last = list(range(len(self.headings)))
        for i in reversed(range(len(last) - 1)):
            if not self.text[self.headings[i].end : self.headings[i + 1].start].strip():
                last[i] = last[i + 1]
        return last

    @cached_property
    def _cuts_and_costs(self) -> tuple[np.ndarray, np.ndarray]:
        """Found only when they are asked for: a text that fits into one chunk needs none."""
        text = self.text
        # Later kinds take precedence at the same position. An item is cut at its start, the others after their end.
        if self.is_code:
            kinds = {m.end(): CODE_LINE for m in _LINE_END.finditer(text)}
        else:
            kinds = {m.end(): SENTENCE for m in _SENTENCE_END.finditer(text) if not _is_abbreviated(text, m.start())}
            kinds |= {m.end(): SENTENCE for m in _CJK_SENTENCE_END.finditer(text)}
            kinds |= {m.start(): ITEM for m in _LIST_ITEM.finditer("\n" + text)}
        kinds |= {m.end(): BLOCK for m in BLANK_LINES.finditer(text)}
        _apply_fences(text, kinds, self.fences)
        depths = {h.start: h.depth for h in self.headings}
        positions = sorted(p for p in kinds.keys() | depths.keys() if 0 < p < len(text))
        costs = [_cost(text, p, kinds.get(p, BLOCK), depths.get(p)) for p in positions]
        return np.array(positions, dtype=np.int64), np.array(costs)

    def heading_paths(self, positions: Sequence[int]) -> list[str]:
        """For each position, the headings above it, outermost first, joined by ' > '.

        Headings that follow one another, without text between, are above a position at the first of them. Positions
        must ascend. Works once: it advances `outline` past the last heading.
        """
        paths: list[str] = []
        path = self.outline.path
        following = deque(self.headings)
        last_of_run = {h.start: self.headings[i].start for h, i in zip(self.headings, self._last_of_runs, strict=True)}

        here: int | None = None

        def descend(until: int) -> None:
            nonlocal here
            while following and following[0].start <= until:
                while path and path[-1].depth >= following[0].depth:
                    path.pop()
                here = following[0].start
                path.append(following.popleft())

        for position in positions:
            descend(position)
            if here is not None and not self.text[here:position].strip():  # it begins with a heading, or several
                descend(last_of_run[here])
            paths.append(" > ".join(h.title for h in path if h.title))
        if following:
            descend(following[-1].start)
        return paths


def find_structure(text: str, media_type: str, outline: Outline | None = None, open_fence: str = "") -> Structure:
    """The cuts and headings of a text: by Markdown or reStructuredText syntax, else by blank lines and sentences.

    `outline` is what the text inherits if it is a section of a longer document; it is updated in place. `open_fence` is
    the fence of the code block that the text begins in.
    """
    outline = outline or Outline()
    fences = find_fences(text, open_fence) if media_type == "text/markdown" else []
    return Structure(text, fences, _headings(text, media_type, fences, outline), outline, is_code(media_type))


def find_headings(text: str, media_type: str) -> list[Heading]:
    """The headings of a text, in order of their start."""
    return _headings(text, media_type, find_fences(text) if media_type == "text/markdown" else [], Outline())


def cut_cost(text: str, position: int, kind: int) -> float:
    """Cost of a cut: the base cost of its kind, plus noise derived from the characters around `position`."""
    return _cost(text, position, kind, None)


def _cost(text: str, position: int, kind: int, heading_depth: int | None) -> float:
    around = text[max(0, position - _CONTEXT_CHARACTERS) : position + _CONTEXT_CHARACTERS]
    fraction = zlib.crc32(around.encode("utf-8", "surrogatepass")) / 2**32
    noise = float(fraction**_NOISE_POWER)
    if heading_depth is not None:
        return _HEADING_COST[min(heading_depth, 3) - 1] + _HEADING_NOISE * noise
    return _COST[kind] + _NOISE * noise


def _is_abbreviated(text: str, stop: int) -> bool:
    """Whether the full stop at this place is that of an abbreviation, such as 'Dr.'."""
    if not text.endswith(_ABBREVIATIONS, max(0, stop - 4), stop):
        return False
    word = next(a for a in _ABBREVIATIONS if text.endswith(a, max(0, stop - 4), stop))
    before = text[stop - len(word) - 1 : stop - len(word)] if stop > len(word) else ""
    return not (before.isalnum() or before == "_")


def _apply_fences(text: str, kinds: dict[int, int], fences: Sequence[tuple[int, int]]) -> None:
    """Allow cuts in code only at line starts, and make the start of each code block a cut. Changes `kinds` in place."""
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
    """Headings in order of their start, without what only looks like one in code, front matter and comments."""
    if media_type == "text/x-rst":
        return _rst_headings(text, outline.styles)
    if is_code(media_type):
        return [Heading(d.start, d.depth, _title(d.name), d.body) for d in definitions(text, media_type)]
    if media_type != "text/markdown":
        return []
    found = _SETEXT_HEADING.finditer(text) if _SETEXT_UNDERLINE.search(text) else ()
    setext = [heading for m in found if (heading := _setext_heading(text, m)) is not None]
    atx = [
        Heading(m.start(), len(m[1]), _title(plain(_strip_closing_hashes(m[2] or ""))), m.end() - 1)
        for m in _ATX_HEADING.finditer("\n" + text)
    ]
    front_matter = _FRONT_MATTER.match(text)
    hidden = [
        *fences,
        *([front_matter.span()] if front_matter else []),
        *find_html(text, fences),
    ]
    return sorted(_outside(hidden, [*atx, *setext]), key=lambda h: h.start)


def _setext_heading(text: str, match: re.Match[str]) -> Heading | None:
    """The heading of an underlined line and the lines above it, which belong to it (CommonMark 4.3).

    None if they are so many that they are a paragraph above a rule.
    """
    start, lines = match.start(), [match[1]]
    while start and (above := _LINE_OF_PARAGRAPH.match(text, text.rfind("\n", 0, start - 1) + 1, start - 1)):
        start = above.start()
        lines.insert(0, above[1])
        if len(lines) > _MAX_SETEXT_LINES:
            return None
    return Heading(start, 1 if match[2][0] == "=" else 2, _title(plain(" ".join(lines))), match.end())


def _outside(hidden: Sequence[tuple[int, int]], headings: Sequence[Heading]) -> Iterator[Heading]:
    """The headings that start in none of the hidden spans."""
    covered = sorted(hidden)
    starts = [start for start, _ in covered]
    ends = list(accumulate((end for _, end in covered), max))
    for heading in headings:
        i = bisect_right(starts, heading.start) - 1
        if i < 0 or heading.start >= ends[i]:
            yield heading


def _title(line: str) -> str:
    return " ".join(line[:_MAX_TITLE_CHARACTERS].split())


def _strip_closing_hashes(rest: str) -> str:
    """Title of an ATX heading without its closing hashes: 'Title ##' becomes 'Title', and 'C#' stays."""
    title = rest.strip()
    stripped = title.rstrip("#")
    return stripped if stripped != title and (not stripped or stripped[-1] in " \t") else title


def _rst_headings(text: str, styles: dict[tuple[str, bool], int]) -> list[Heading]:
    """reStructuredText headings. Depth is the order in which heading styles first appear; see `Outline.styles`."""
    found: list[Heading] = []
    end = 0
    for m in _RST_HEADING.finditer(text):
        title, line = (m[2] or m[4] or "").strip(), m[3] or m[5]
        follows_heading = bool(found) and m.start() == end + 1
        stands_alone = (
            m[1] is not None
            or follows_heading
            or not text[max(0, m.start() - _LOOK_BACK_CHARACTERS) : m.start()].rpartition("\n")[0][-1:].strip()
        )
        is_long = len(line) >= min(len(title), _RST_MIN_UNDERLINE)
        if stands_alone and is_long and re.search(r"\w", title) and not _RST_NO_TITLE.match(title):
            depth = styles.setdefault((line[0], m[1] is not None), len(styles) + 1)
            found.append(Heading(m.start(), depth, _title(title), m.end()))
            end = m.end()
    return found
