"""Formats that are no plain text: HTML, PDF, Word. Each returns (text, title).

HTML and Word become Markdown, so that their headings, lists and code reach the chunker. The libraries
raise all sorts of exceptions on broken files, so whatever they raise is a broken file.
"""

from __future__ import annotations

import html as html_entities
import io
import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from embed_assets.corpus.encoding import Undecodable, decode
from embed_assets.corpus.items import BadRow

_MAX_XML_BYTES = 32 << 20
"""Of a Word document's parts when unzipped: some five million elements, or three thousand pages."""
_MAX_PAGES = 20_000
_OLE_MAGIC = bytes.fromhex("d0cf11e0a1b11ae1")
"""A Word document with a password is no zip but an OLE file."""
_HTML_TITLE = re.compile(r"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"


class MissingExtra(Exception):
    """An optional package is not installed."""

    def __init__(self, ending: str) -> None:
        super().__init__(f"reading {ending} needs the extra 'documents': pip install 'embed-assets[documents]'")


def html_to_markdown(html: str) -> tuple[str, str]:
    """Markdown of the page's content, without scripts, styles and navigation."""
    from html_to_markdown import ConversionOptions, convert

    options = ConversionOptions(extract_metadata=False, skip_images=True, code_block_style="backticks")
    try:
        result = convert(html, options)
    except Exception as error:
        raise BadRow.Error("broken_file", f"no HTML that could be parsed: {error}") from error
    for warning in result.warnings:
        if str(warning.kind) == "depth_limit_exceeded":
            raise BadRow.Error("broken_file", f"HTML nested too deeply: {warning.message}")
    title = _HTML_TITLE.search(html[: 1 << 16])
    return result.content or "", " ".join(html_entities.unescape(title[1]).split()) if title else ""


def pdf_to_text(data: bytes) -> tuple[str, str]:
    """The text of a PDF's pages, separated by blank lines."""
    try:
        from pypdf import PdfReader
    except ImportError:
        raise MissingExtra(".pdf") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise BadRow.Error("encrypted", "the PDF asks for a password; save a copy without it")
        if len(reader.pages) > _MAX_PAGES:
            raise BadRow.Error("too_large", f"{len(reader.pages)} pages, over {_MAX_PAGES}; split it")
        text = "\n\n".join(page.extract_text() for page in reader.pages)
        title = str((reader.metadata and reader.metadata.title) or "")
    except BadRow.Error:
        raise
    except Exception as error:
        raise BadRow.Error("broken_file", f"no PDF that could be parsed: {type(error).__name__}: {error}") from error
    if not text.strip():
        raise BadRow.Error("empty", "no text in it (scanned pages, or damaged ones?); run it through text recognition")
    if text.count("\ufffd") > len(text) // 2:
        raise BadRow.Error("broken_file", "the PDF's fonts do not tell which characters they show")
    return text, title.strip()


def docx_to_markdown(data: bytes) -> tuple[str, str]:
    """Markdown of a Word document: headings and lists by style, tables row by row."""
    try:
        from docx import Document as open_docx
    except ImportError:
        raise MissingExtra(".docx") from None
    if data.startswith(_OLE_MAGIC):
        raise BadRow.Error("encrypted", "the Word document has a password, or is an old .doc; save a .docx without it")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
        if any(entry.flag_bits & 1 for entry in entries):
            raise BadRow.Error("encrypted", "the Word document is encrypted; save a copy without a password")
        size = sum(entry.file_size for entry in entries if entry.filename.endswith((".xml", ".rels")))
        if size > _MAX_XML_BYTES or any(entry.file_size > 8 * _MAX_XML_BYTES for entry in entries):
            raise BadRow.Error("too_large", f"{size} bytes of XML when unzipped, over {_MAX_XML_BYTES}; split it")
        document = open_docx(io.BytesIO(data))
        styles = {style.style_id: style.name or "" for style in document.styles}
        text = "\n\n".join(block for block in _docx_blocks(document.element.body, styles) if block.strip())
        title = document.core_properties.title or ""
    except BadRow.Error:
        raise
    except Exception as error:
        detail = f"no Word document that could be parsed: {type(error).__name__}: {error}"
        raise BadRow.Error("broken_file", detail) from error
    return text, title.strip()


def _docx_blocks(parent: Any, styles: Mapping[str, str]) -> Iterator[str]:
    """Paragraphs and tables in order, also those inside content controls and tracked changes."""
    for element in parent:
        if element.tag == f"{_WORD}p":
            yield _docx_paragraph(element, styles)
        elif element.tag == f"{_WORD}tbl":
            rows = (
                " | ".join(_docx_text(cell) for cell in row.iterchildren(f"{_WORD}tc"))
                for row in element.iter(f"{_WORD}tr")
            )
            yield "\n".join(f"| {row} |" for row in rows)
        elif element.tag not in (f"{_WORD}sectPr", f"{_WORD}del"):
            yield from _docx_blocks(element, styles)


def _docx_paragraph(paragraph: Any, styles: Mapping[str, str]) -> str:
    text = _docx_text(paragraph)
    style_id = paragraph.find(f"{_WORD}pPr/{_WORD}pStyle")
    style = styles.get(style_id.get(f"{_WORD}val"), "") if style_id is not None else ""
    if not text:
        return ""
    if style == "Title":
        return f"# {text}"
    if style.lower().startswith("heading ") and style[8:].isdecimal():
        return f"{'#' * min(6, int(style[8:]))} {text}"
    return f"- {text}" if style.startswith("List") else text


def _docx_text(element: Any) -> str:
    """The visible text under an element; deleted text has a tag of its own."""
    parts = {f"{_WORD}tab": "\t", f"{_WORD}br": "\n", f"{_WORD}cr": "\n"}
    found = (node.text or "" if node.tag == f"{_WORD}t" else parts.get(node.tag, "") for node in element.iter())
    return "".join(found).strip()


def _html(data: bytes) -> tuple[str, str]:
    try:
        text = decode(data, html=True)[0]
    except Undecodable as error:
        raise BadRow.Error("undecodable", str(error)) from None
    return html_to_markdown(text)


FORMATS: dict[str, tuple[str, Callable[[bytes], tuple[str, str]]]] = {
    ".html": ("text/markdown", _html),
    ".htm": ("text/markdown", _html),
    ".pdf": ("text/plain", pdf_to_text),
    ".docx": ("text/markdown", docx_to_markdown),
}
"""By file name ending: the media type of what comes out, and the parser, which returns (text, title)."""
