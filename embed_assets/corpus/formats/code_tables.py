"""Takes code out of the tables that set line numbers beside it (Rouge, Pygments, GitHub, highlight.js). Pure functions.

A Markdown cell is one line, so that code in it would lose its lines and indentation.
"""

from __future__ import annotations

import re

_TAG = re.compile(r"<(/?)(table|thead|tbody|tfoot|tr|td|th|colgroup|col|caption|pre)\b([^>]*)>", re.IGNORECASE)
_NUMBERS = re.compile(
    r"data-line-number|class\s*=\s*[\"']?[^\"'>]*\b(?:gutter|lineno|linenos|line-numbers?|blob-num|hljs-ln-numbers)\b",
    re.IGNORECASE,
)
"""In the tag of a cell: it holds only line numbers."""
_CODE = re.compile(r"class\s*=\s*[\"']?[^\"'>]*\b(?:blob-code|hljs-ln-code|js-file-line)\b", re.IGNORECASE)
"""In the tag of a cell: it holds one line of code."""


def unfold_code_tables(html: str) -> str:
    """The page with each table that holds code in place of its cells as blocks, without the line numbers."""
    tags = list(_TAG.finditer(html))
    kept: list[str] = []
    at = 0
    for first, last in _tables(tags):
        inner = tags[first : last + 1]
        if not any(_is_code(tag) for tag in inner):
            continue
        kept += [html[at : tags[first].start()], _unfold(html, inner)]
        at = tags[last].end()
    return "".join([*kept, html[at:]])


def _tables(tags: list[re.Match[str]]) -> list[tuple[int, int]]:
    """The (first, last) tag of each outermost table."""
    found, opened = [], []
    for i, tag in enumerate(tags):
        if tag[2].lower() != "table":
            continue
        if not tag[1]:
            opened.append(i)
        elif opened:
            first = opened.pop()
            if not opened:
                found.append((first, i))
    return found


def _is_code(tag: re.Match[str]) -> bool:
    return not tag[1] and (tag[2].lower() == "pre" or bool(_CODE.search(tag[3])))


def _unfold(html: str, tags: list[re.Match[str]]) -> str:
    """A table as a block of its lines, or as the blocks that its cells hold."""
    has_lines = not any(tag[2].lower() == "pre" for tag in tags)
    kept = ["<pre>" if has_lines else "<div>"]
    at, numbers_end = tags[0].end(), -1
    for i, tag in enumerate(tags):
        name = tag[2].lower()
        if tag.start() < numbers_end:
            continue
        kept.append(html[at : tag.start()].strip("\r\n") if has_lines else html[at : tag.start()])
        at = tag.end()
        if name == "pre":
            kept.append(tag[0])
        elif name in ("td", "th") and not tag[1] and _NUMBERS.search(tag[3]):
            at = numbers_end = next((t.start() for t in tags[i + 1 :] if t[1] and t[2].lower() == name), tag.end())
        elif has_lines:
            kept.append("\n" if name == "tr" and tag[1] else "")
        else:
            kept.append("</div>" if tag[1] else "<div>" if name not in ("col", "colgroup") else "")
    return "".join([*kept, "</pre>" if has_lines else "</div>"])
