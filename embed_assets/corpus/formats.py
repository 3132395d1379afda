"""Formats that are no plain text: HTML, PDF, Word. Each returns (text, title).

HTML and Word become Markdown, so that their headings, lists and code reach the chunker.
"""

from __future__ import annotations

import io
import logging
import zipfile
from typing import Any

from embed_assets.corpus.rows import BadRow

_MAX_UNZIPPED_BYTES = 512 << 20
_MAX_PAGES = 20_000


class MissingExtra(Exception):
    """An optional package is not installed."""

    def __init__(self, ending: str) -> None:
        super().__init__(f"reading {ending} needs the extra 'documents': pip install 'embed-assets[documents]'")


def html_to_markdown(html: str) -> tuple[str, str]:
    """Markdown of the page's content, without scripts, styles and navigation."""
    from html_to_markdown import ConversionOptions, convert

    options = ConversionOptions(extract_metadata=True, skip_images=True, code_block_style="backticks")
    try:
        result = convert(html, options)
    except Exception as error:
        raise BadRow.Error("broken_file", f"no HTML that could be parsed: {error}") from error
    content = result.content or ""
    front_matter, body = _split_front_matter(content)
    title = next(
        (line.removeprefix("title:").strip() for line in front_matter.splitlines() if line.startswith("title:")), ""
    )
    if not body.strip() and len(html.strip()) > 10_000 and result.warnings:
        raise BadRow.Error("broken_file", f"HTML that could not be converted: {result.warnings[0]}")
    return body, title.strip("\"'")


def _split_front_matter(content: str) -> tuple[str, str]:
    if content.startswith("---\n") and (end := content.find("\n---\n", 3)) > 0:
        return content[4:end], content[end + 5 :].lstrip("\n")
    return "", content


def pdf_to_text(data: bytes) -> tuple[str, str]:
    """The text of a PDF's pages, separated by blank lines."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise MissingExtra(".pdf") from None
    logging.getLogger("pypdf").setLevel(logging.ERROR)
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
    except (
        PyPdfError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        NotImplementedError,
        OverflowError,
    ) as error:
        raise BadRow.Error("broken_file", f"no PDF that could be parsed: {type(error).__name__}: {error}") from error
    if not text.strip():
        raise BadRow.Error("empty", "the PDF has no text layer (scanned pages?); run it through text recognition first")
    return text, title.strip()


def docx_to_markdown(data: bytes) -> tuple[str, str]:
    """Markdown of a Word document: headings by style, lists and tables."""
    try:
        from docx import Document as open_docx
        from docx.opc.exceptions import OpcError
        from docx.table import Table
    except ImportError:
        raise MissingExtra(".docx") from None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unzipped = sum(entry.file_size for entry in archive.infolist())
        if unzipped > _MAX_UNZIPPED_BYTES:
            raise BadRow.Error("too_large", f"{unzipped} bytes when unzipped, over {_MAX_UNZIPPED_BYTES}")
        document = open_docx(io.BytesIO(data))
        blocks = [_docx_table(b) if isinstance(b, Table) else _docx_paragraph(b) for b in document.iter_inner_content()]
        title = document.core_properties.title or ""
    except BadRow.Error:
        raise
    except (
        zipfile.BadZipFile,
        OpcError,
        KeyError,
        ValueError,
        SyntaxError,
        RecursionError,
        NotImplementedError,
        EOFError,
        AttributeError,
        TypeError,
    ) as error:
        # lxml's XMLSyntaxError is a SyntaxError; a zip that is no Word document raises KeyError or ValueError.
        raise BadRow.Error(
            "broken_file", f"no Word document that could be parsed: {type(error).__name__}: {error}"
        ) from error
    return "\n\n".join(block for block in blocks if block.strip()), title.strip()


def _docx_paragraph(paragraph: Any) -> str:
    style = (paragraph.style.name or "") if paragraph.style is not None else ""
    text = str(paragraph.text).strip()
    if text and style == "Title":
        return f"# {text}"
    if text and style.startswith("Heading ") and style[8:].isdigit():
        return f"{'#' * min(6, int(style[8:]))} {text}"
    return f"- {text}" if text and style.startswith("List") else text


def _docx_table(table: Any) -> str:
    rows = [" | ".join(" ".join(cell.text.split()) for cell in row.cells) for row in table.rows]
    return "\n".join(f"| {row} |" for row in rows)
