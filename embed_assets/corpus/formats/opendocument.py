"""Reads OpenDocument texts and presentations (ODF 1.3, part 3) as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from embed_assets.corpus.formats.archive import Archive
from embed_assets.corpus.formats.parsed import Parsed, one_line, real_title, table, without_soft_hyphens
from embed_assets.corpus.formats.properties import open_document_properties
from embed_assets.corpus.items import BadRow

_OASIS = "urn:oasis:names:tc:opendocument:xmlns"
_TEXT, _TABLE, _OFFICE, _DRAW = (f"{{{_OASIS}:{name}:1.0}}" for name in ("text", "table", "office", "drawing"))
_TITLE = "{http://purl.org/dc/elements/1.1/}title"
_NO_TEXT = frozenset(
    {
        f"{_TEXT}tracked-changes",
        f"{_OFFICE}annotation",
        f"{_OFFICE}annotation-end",
        f"{_TEXT}sequence-decls",
        f"{_TEXT}alphabetical-index-mark",
        f"{_TEXT}note-citation",
        f"{_OFFICE}forms",
    }
)
"""Elements whose text is not the document's: what was deleted, comments, declarations."""


def read_opendocument(data: bytes) -> Parsed:
    """The body: headings, lists, tables row by row, notes below their paragraph.

    Raises ``BadRow.Error`` or ``MissingExtra``.
    """
    archive = Archive(data, "OpenDocument file")
    manifest = archive.read("META-INF/manifest.xml") or b""
    if b"encryption-data" in manifest or "encrypted-package" in archive.names:
        raise BadRow.Error("encrypted", "the OpenDocument file has a password; save a copy without it")
    root = archive.xml("content.xml")
    body = root.find(f"{_OFFICE}body") if root is not None else None
    if body is None:
        raise archive.broken(ValueError("it has no content.xml with a body"))
    meta = archive.xml("meta.xml")
    title = next(meta.iter(_TITLE), None) if meta is not None else None
    try:
        text = "\n\n".join(block for block in _blocks(body) if block.strip())
    except RecursionError as error:
        raise archive.broken(error) from error
    properties = open_document_properties(meta)
    return Parsed(
        without_soft_hyphens(text), real_title(title.text if title is not None else ""), properties=properties
    )


def _blocks(parent: Any) -> Iterator[str]:
    for element in parent:
        if element.tag in _NO_TEXT:
            continue
        if element.tag in (f"{_TEXT}h", f"{_TEXT}p"):
            yield from _paragraph(element)
        elif element.tag == f"{_TEXT}list" and next(element.iter(f"{_TEXT}h"), None) is None:
            yield "\n".join(_items(element))
        elif element.tag == f"{_TABLE}table":
            yield from _table(element)
        elif isinstance(element.tag, str):
            yield from _blocks(element)


def _paragraph(element: Any) -> Iterator[str]:
    """A heading or paragraph, then the text boxes and notes in it."""
    below: list[tuple[str, Any]] = []
    text = _inline(element, below).strip()
    level = element.get(f"{_TEXT}outline-level", "1") if element.tag == f"{_TEXT}h" else ""
    if text:
        yield f"{'#' * min(6, int(level))} {' '.join(text.split())}" if level.isdecimal() else text
    for mark, inside in below:
        yield mark + "\n\n".join(_blocks(inside))


def _items(listing: Any, indent: int = 0) -> Iterator[str]:
    for item in listing:
        if item.tag not in (f"{_TEXT}list-item", f"{_TEXT}list-header"):
            continue
        for element in item:
            if element.tag == f"{_TEXT}list":
                yield from _items(element, indent + 1)
            elif texts := [t for t in _blocks([element]) if t.strip()]:
                yield f"{'  ' * indent}- {' '.join(texts)}"


def _table(element: Any) -> Iterator[str]:
    """A line for each row; of a table with one column, which only frames its content, that content."""
    rows = [[c for c in row if c.tag == f"{_TABLE}table-cell"] for row in _rows(element)]
    if all(len(row) <= 1 for row in rows):
        for row in rows:
            for cell in row:
                yield from _blocks(cell)
        return
    if text := table([one_line(_blocks(cell)) for cell in row] for row in rows):
        yield text


def _rows(parent: Any) -> Iterator[Any]:
    """The rows of a table, also those in groups, but not those of tables inside it."""
    for element in parent:
        if element.tag == f"{_TABLE}table-row":
            yield element
        elif element.tag in (f"{_TABLE}table-rows", f"{_TABLE}table-header-rows", f"{_TABLE}table-row-group"):
            yield from _rows(element)


def _inline(element: Any, below: list[tuple[str, Any]]) -> str:
    found = [element.text or ""]
    for child in element:
        if child.tag == f"{_TEXT}s":
            count = child.get(f"{_TEXT}c", "1")
            found.append(" " * (min(int(count), 100) if count.isdecimal() else 1))
        elif child.tag == f"{_TEXT}tab":
            found.append("\t")
        elif child.tag == f"{_TEXT}line-break":
            found.append("\n")
        elif child.tag == f"{_TEXT}note":
            mark = f"[^{child.findtext(f'{_TEXT}note-citation') or len(below) + 1}]"
            found.append(mark)
            below += [(f"{mark}: ", part) for part in child.iterchildren(f"{_TEXT}note-body")]
        elif child.tag == f"{_TEXT}ruby":
            base, reading = (child.findtext(f"{_TEXT}ruby-{part}") or "" for part in ("base", "text"))
            found.append(f"{base}({reading})")
        elif isinstance(child.tag, str) and child.tag.startswith(_DRAW):
            below.append(("", child))
        elif isinstance(child.tag, str) and child.tag not in _NO_TEXT:
            found.append(_inline(child, below))
        found.append(child.tail or "")
    return "".join(found)
