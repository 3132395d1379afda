"""Parses HTML, PDF and Word into (text, title).

HTML and Word become Markdown, so that the chunker sees their headings, lists and code. The libraries raise all sorts
of exceptions on broken files, so any exception of theirs means a broken file.
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
"""XML in a Word document, unzipped: about five million elements, or three thousand pages."""
_MAX_PART_BYTES = 8 * _MAX_XML_BYTES
"""Any one file in a Word document, unzipped. Images may exceed the XML's limit, but python-docx loads them too."""
_MAX_PAGES = 20_000
"""Pages of a PDF. Far beyond real documents; it names the reason before the sandbox's CPU limit would strike."""
_OLE_MAGIC = bytes.fromhex("d0cf11e0a1b11ae1")
"""Start of a password-protected Word document, which is an OLE file and not a zip, and of the old .doc."""
_TITLE_SEARCH_CHARACTERS = 1 << 16
"""How far into a page its title is looked for: the pattern takes quadratic time on hostile pages."""
_HTML_TITLE = re.compile(r"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"


class MissingExtra(Exception):
    """The optional package that reads a format is not installed."""

    def __init__(self, suffix: str) -> None:
        super().__init__(f"reading {suffix} needs the extra 'documents': pip install 'embed-assets[documents]'")


def html_to_markdown(html: str) -> tuple[str, str]:
    """(Markdown, title) of a page, without its scripts, styles and navigation. Raises ``BadRow.Error``."""
    from html_to_markdown import ConversionOptions, convert

    options = ConversionOptions(extract_metadata=False, skip_images=True, code_block_style="backticks")
    try:
        result = convert(html, options)
    except Exception as error:
        raise BadRow.Error("broken_file", f"its HTML could not be parsed: {error}") from error
    for warning in result.warnings:
        if str(warning.kind) == "depth_limit_exceeded":
            raise BadRow.Error("broken_file", f"its HTML is nested too deeply: {warning.message}")
    title = _HTML_TITLE.search(html[:_TITLE_SEARCH_CHARACTERS])
    return result.content or "", " ".join(html_entities.unescape(title[1]).split()) if title else ""


def pdf_to_text(data: bytes) -> tuple[str, str]:
    """(text, title) of a PDF, its pages separated by blank lines. Raises ``BadRow.Error`` or ``MissingExtra``."""
    try:
        from pypdf import PdfReader
    except ImportError:
        raise MissingExtra(".pdf") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every oddity of a file
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise BadRow.Error("encrypted", "the PDF has a password; save a copy without it")
        if len(reader.pages) > _MAX_PAGES:
            raise BadRow.Error("too_large", f"the PDF has {len(reader.pages)} pages, over {_MAX_PAGES}; split it")
        text = "\n\n".join(page.extract_text() for page in reader.pages)
        title = str((reader.metadata and reader.metadata.title) or "")
    except BadRow.Error:
        raise
    except Exception as error:
        raise BadRow.Error("broken_file", f"the PDF could not be parsed: {type(error).__name__}: {error}") from error
    if not text.strip():
        raise BadRow.Error("empty", "the PDF has no text (are its pages scanned, or damaged?); run OCR on it")
    if text.count("\ufffd") > len(text) // 2:
        raise BadRow.Error("broken_file", "the PDF's fonts don't say which characters they show; run OCR on it")
    return text, title.strip()


def docx_to_markdown(data: bytes) -> tuple[str, str]:
    """(Markdown, title) of a Word document: headings and lists by their styles, tables row by row.

    Raises ``BadRow.Error`` or ``MissingExtra``.
    """
    try:
        from docx import Document as open_docx
    except ImportError:
        raise MissingExtra(".docx") from None
    if data.startswith(_OLE_MAGIC):
        raise BadRow.Error("encrypted", "it has a password or is an old .doc; save it as a .docx without a password")
    try:
        _check_archive(data)
        document = open_docx(io.BytesIO(data))
        styles = {style.style_id: style.name or "" for style in document.styles}
        text = "\n\n".join(block for block in _docx_blocks(document.element.body, styles) if block.strip())
        title = document.core_properties.title or ""
    except BadRow.Error:
        raise
    except Exception as error:
        detail = f"the Word document could not be parsed: {type(error).__name__}: {error}"
        raise BadRow.Error("broken_file", detail) from error
    return text, title.strip()


def _check_archive(data: bytes) -> None:
    """Raise ``BadRow.Error`` when a Word document, which is a zip, is encrypted or unzips to too much."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    if any(entry.flag_bits & 1 for entry in entries):
        raise BadRow.Error("encrypted", "the Word document is encrypted; save a copy without a password")
    size = sum(entry.file_size for entry in entries if entry.filename.endswith((".xml", ".rels")))
    if size > _MAX_XML_BYTES:
        raise BadRow.Error("too_large", f"it unzips to {size} bytes of XML, over {_MAX_XML_BYTES}; split it")
    largest = max(entries, key=lambda entry: entry.file_size, default=None)
    if largest is not None and largest.file_size > _MAX_PART_BYTES:
        detail = f"its {largest.filename!r} unzips to {largest.file_size} bytes, over {_MAX_PART_BYTES}; remove it"
        raise BadRow.Error("too_large", detail)


def _docx_blocks(parent: Any, styles: Mapping[str, str]) -> Iterator[str]:
    """Markdown of the paragraphs and tables in order, also of those in content controls and tracked insertions."""
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
    """Markdown of a paragraph: a heading or list item if its style says so."""
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
    """The visible text below an element. Tracked deletions are left out: their text has a tag of its own."""
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
    ".xhtml": ("text/markdown", _html),
    ".pdf": ("text/plain", pdf_to_text),
    ".docx": ("text/markdown", docx_to_markdown),
}
"""By file name suffix: the media type of the text, and the parser, which returns (text, title)."""
