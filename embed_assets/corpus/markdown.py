"""What Markdown hides from its outline (code, comments, raw HTML), and a heading's text without its marks.

Pure functions. The rules are those of CommonMark 0.31, as far as they decide where headings are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence

Span = tuple[int, int]
"""Half-open range of code points."""

# Patterns that begin with a line end are for texts with one put in front of them: a match then starts where its line
# does in the text itself, and searching for a character is several times as fast as trying "^" at each.
_FENCE = re.compile(r"(?m)\n([ \t]*)((?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(`{3,}|~{3,})(.*)$")
_LIST_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])(?: {1,4}(?=\S)|[ \t]|$)")
"""Up to where its text begins, which is where its further lines do."""
_CODE_INDENT = 4
"""Columns from which on a line is indented code, unless it continues a list item."""
_LOOK_BACK_LINES = 50
"""How far back the list item is looked for that an indented fence belongs to; bounds the work per fence."""
_HTML_BLOCK = re.compile(r"(?i)\n {0,3}<(!--|(?:pre|script|style|textarea)(?=[\s>]))")
_MAX_CHARACTERS = 1000
"""Of a heading that are looked at: some patterns take quadratic time, and what is longer is a paragraph."""
_CODE_SPAN = re.compile(r"(`+)(.+?)(?<!`)\1(?!`)")
_MARKS = (
    (re.compile(r"\s*\{[#.:][^{}]*\}\s*$"), ""),  # {#id .class}
    (re.compile(r"!\[([^\]]*)\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"\[([^\[\]]*)\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"</?[A-Za-z][^<>]*>"), ""),
    (re.compile(r"(?<![\w*])(\*{1,3})(?=\S)([^*]+?)(?<=\S)\1(?!\*)"), r"\2"),
    (re.compile(r"(?<![\w_])(_{1,3})(?=\S)([^_]+?)(?<=\S)\1(?![\w_])"), r"\2"),
    (re.compile(r"~~(.+?)~~"), r"\1"),
    (re.compile(r"\s*(?:¶|🔗|§)\s*$"), ""),  # the mark of a link to the heading itself
    (re.compile(r"\\([!-/:-@\[-`{-~])"), r"\1"),
)


def find_fences(text: str, open_fence: str = "") -> list[Span]:
    """Half-open spans of fenced code blocks, fences included. An unclosed one runs to the text's end.

    `open_fence` is the fence of the block that the text begins in, if it is a section of a longer one.
    """
    return _fences(text, open_fence)[0]


def fence_open_at_end(text: str, open_fence: str = "") -> str:
    """The fence of the code block that the text ends in; '' if it ends in none."""
    return _fences(text, open_fence)[1]


def _fences(text: str, open_fence: str) -> tuple[list[Span], str]:
    if "```" not in text and "~~~" not in text:
        return ([(0, len(text))] if open_fence else []), open_fence
    found: list[Span] = []
    start = 0
    for line in _FENCE.finditer("\n" + text):
        fence, info = line[3], line[4]
        if open_fence:
            if fence.startswith(open_fence) and not info.strip() and not line[2]:
                found.append((start, line.end() - 1))
                open_fence = ""
        elif (fence[0] == "~" or "`" not in info) and not _is_indented_code(text, line):
            open_fence, start = fence, line.start()
    if open_fence:
        found.append((start, len(text)))
    return found, open_fence


def _is_indented_code(text: str, line: re.Match[str]) -> bool:
    """Whether a line that looks like a fence is indented code, or goes on with a paragraph, in which it is none.

    What decides is how far it is indented within the list item that it belongs to, if any.
    """
    indent = below = _columns(line[1])
    if indent < _CODE_INDENT:
        return False
    end = line.start()
    for _ in range(_LOOK_BACK_LINES):
        if end <= 0:
            break
        start = text.rfind("\n", 0, end - 1) + 1
        above, end = text[start : end - 1], start
        columns = _columns(above[: len(above) - len(above.lstrip())])
        if not above.strip() or columns >= below:
            continue
        if (item := _LIST_ITEM.match(above)) and (inside := _columns(item[0])) <= indent:
            return indent - inside >= _CODE_INDENT
        if columns == 0:
            break
        below = columns
    return True


def _columns(start: str) -> int:
    """The columns that the start of a line takes."""
    return len(start.expandtabs(4))


_MARKUP = re.compile("[{\\[<*_~`\\\\¶🔗§\0]")
"""Without one of these, a title is plain already."""


def find_html(text: str, fences: Sequence[Span]) -> Iterator[Span]:
    """Half-open spans of comments and raw HTML (pre, script, style) that begin a line outside code."""
    starts, end = [start for start, _ in fences], 0
    unclosed: set[str] = set()
    for opening in _HTML_BLOCK.finditer("\n" + text):
        kind, start = opening[1].lower(), opening.start()
        i = bisect_right(starts, start) - 1
        if start < end or kind in unclosed or (i >= 0 and start < fences[i][1]):
            continue
        closing = re.compile("-->" if kind == "!--" else f"(?i)</{kind}>").search(text, start)
        if closing is None:
            unclosed.add(kind)  # and it is not searched for again, which would take quadratic time
        else:
            end = closing.end()
            yield start, end


def plain(title: str) -> str:
    """A heading's text without links, marks, tags and ids; code keeps its characters."""
    title = title[:_MAX_CHARACTERS]
    if not _MARKUP.search(title):
        return " ".join(title.split())
    spans: list[str] = []

    def keep(span: re.Match[str]) -> str:
        spans.append(span[2].strip())
        return f"\0{len(spans) - 1}\0"

    text = _CODE_SPAN.sub(keep, title.replace("\0", ""))
    for pattern, replacement in _MARKS:
        text = pattern.sub(replacement, text)
    return " ".join(re.sub("\0(\\d+)\0", lambda found: spans[int(found[1])], text).split())
