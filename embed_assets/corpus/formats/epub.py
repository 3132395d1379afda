"""Reads EPUB books (EPUB 3.3) as Markdown: their chapters in reading order."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from embed_assets.corpus.encoding import Undecodable, decode
from embed_assets.corpus.formats.archive import Archive, resolved
from embed_assets.corpus.formats.html import html_to_markdown
from embed_assets.corpus.formats.parsed import Parsed, real_title
from embed_assets.corpus.items import BadRow

_PAGES = frozenset({"application/xhtml+xml", "text/html"})


def read_epub(data: bytes) -> Parsed:
    """The pages of the book's spine. Raises ``BadRow.Error`` or ``MissingExtra``."""
    archive = Archive(data, "EPUB book")
    if "META-INF/rights.xml" in archive.names:
        raise BadRow.Error("encrypted", "the book is protected (DRM)")
    container = archive.xml("META-INF/container.xml")
    package = _first(container, "rootfile")
    place = str(package.get("full-path", "")) if package is not None else ""
    root = archive.xml(place)
    if root is None:
        raise archive.broken(ValueError("it has no package document"))
    items = {e.get("id", ""): e for e in _every(root, "item")}
    spine = [items[e.get("idref", "")] for e in _every(root, "itemref") if e.get("idref", "") in items]
    pages = [_page(archive, place, item) for item in spine if item.get("media-type") in _PAGES]
    title = _first(root, "title")
    text = "\n\n".join(page for page in pages if page)
    return Parsed(text, real_title("".join(title.itertext())) if title is not None else "")


def _page(archive: Archive, package: str, item: Any) -> str:
    if "nav" in str(item.get("properties", "")).split():  # the table of contents
        return ""
    path = resolved(str(PurePosixPath(package).parent / unquote(str(item.get("href", "")))))
    try:
        return html_to_markdown(decode(archive.read(path) or b"", html=True)[0]).text.strip()
    except Undecodable as error:
        raise BadRow.Error("undecodable", f"{path}: {error}") from None


def _every(root: Any, name: str) -> list[Any]:
    """The elements below of a name, in any namespace."""
    return [e for e in root.iter() if isinstance(e.tag, str) and e.tag.rpartition("}")[2] == name]


def _first(root: Any, name: str) -> Any:
    found = _every(root, name) if root is not None else []
    return found[0] if found else None
