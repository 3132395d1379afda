"""Reads PowerPoint presentations (PresentationML, ECMA-376 part 1, chapter 19) as Markdown, a heading per slide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from embed_assets.corpus.formats.archive import Archive
from embed_assets.corpus.formats.equations import linear
from embed_assets.corpus.formats.parsed import Parsed, real_title, table, without_soft_hyphens

_DRAWING = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_SLIDE = "{http://schemas.openxmlformats.org/presentationml/2006/main}"
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"
_COMPATIBILITY = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}oMath"
_TITLES = frozenset({"title", "ctrTitle"})
_NO_TEXT = frozenset({"sldNum", "dt", "ftr", "hdr"})
"""Placeholders of what is on every slide: its number, the date, footer and header."""


def read_slides(data: bytes) -> Parsed:
    """The slides in order, hidden ones left out: title as heading, texts, tables row by row, then the notes.

    Raises ``BadRow.Error`` or ``MissingExtra``.
    """
    archive = Archive(data, "PowerPoint presentation")
    main = archive.main("ppt/presentation.xml")
    root = archive.xml(main)
    if root is None:
        raise archive.broken(ValueError(f"it has no {main}"))
    names = archive.targets(main)
    slides = [names.get(e.get(_RELATION, ""), "") for e in root.iter(f"{_SLIDE}sldId")]
    try:
        blocks = [block for name in slides for block in _slide(archive, name)]
    except RecursionError as error:
        raise archive.broken(error) from error
    text = without_soft_hyphens("\n\n".join(block for block in blocks if block.strip()))
    return Parsed(text, real_title(archive.title()), metadata={"slides": len(slides)}, properties=archive.properties())


def _slide(archive: Archive, name: str) -> Iterator[str]:
    root = archive.xml(name) if name else None
    if root is None or root.get("show") in ("0", "false"):
        return
    shapes = list(_shapes(root))
    for shape in shapes:
        if _placeholder(shape) in _TITLES and (title := " ".join(_text(shape).split())):
            yield f"# {title}"
    for shape in shapes:
        if _placeholder(shape) not in _TITLES | _NO_TEXT:
            yield _text(shape)
    for notes in archive.related(name).get("notesSlide", ()):
        found = (_text(s) for s in _shapes(archive.xml(notes)) if _placeholder(s) == "body")
        if said := "\n\n".join(text for text in found if text.strip()):
            yield f"Notes: {said}"


def _shapes(parent: Any) -> Iterator[Any]:
    """Shapes with text and tables, in order, also those in groups."""
    for element in parent if parent is not None else ():
        if element.tag in (f"{_SLIDE}sp", f"{_DRAWING}tbl"):
            yield element
        elif element.tag == f"{_COMPATIBILITY}AlternateContent":  # one branch counts
            yield from _shapes(next(iter(element), None))
        elif isinstance(element.tag, str):
            yield from _shapes(element)


def _placeholder(shape: Any) -> str:
    """The kind of placeholder that a shape is; '' if it is none."""
    found = next(shape.iter(f"{_SLIDE}ph"), None) if shape.tag == f"{_SLIDE}sp" else None
    return "" if found is None else str(found.get("type", "body"))


def _text(shape: Any) -> str:
    if shape.tag == f"{_DRAWING}tbl":
        rows = (
            [" ".join(_text_of(c).split()) for c in row.iter(f"{_DRAWING}tc")] for row in shape.iter(f"{_DRAWING}tr")
        )
        return table(rows)
    return _text_of(shape)


def _text_of(shape: Any) -> str:
    """The paragraphs of a shape, those of a lower level indented as list items."""
    found = []
    for paragraph in shape.iter(f"{_DRAWING}p"):
        text = "".join(_inline(e) for e in paragraph).strip()
        properties = paragraph.find(f"{_DRAWING}pPr")
        level = properties.get("lvl", "0") if properties is not None else "0"
        if text:
            found.append(f"{'  ' * (int(level) - 1)}- {text}" if level.isdecimal() and level != "0" else text)
    return "\n".join(found)


def _inline(element: Any) -> str:
    if element.tag == f"{_DRAWING}br":
        return "\n"
    if element.tag in (f"{_DRAWING}r", f"{_DRAWING}fld"):
        return element.findtext(f"{_DRAWING}t") or ""
    return "".join(map(linear, element.iter(_MATH))) if isinstance(element.tag, str) else ""
