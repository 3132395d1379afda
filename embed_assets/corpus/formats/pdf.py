"""Reads PDF documents page by page, in the order that pdfium gives."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from embed_assets.corpus.formats.page_text import Line, joined_pages, page_ranges
from embed_assets.corpus.formats.parsed import MissingExtra, Parsed, real_title
from embed_assets.corpus.formats.properties import pdf_properties
from embed_assets.corpus.items import BadRow

_MAX_PAGES = 20_000
"""Far beyond real documents; it names the reason before the sandbox's CPU limit would strike."""
_MAX_STAMP_CHARACTERS = 20
"""Of the text on a scanned page that still counts as without text: a stamped number or date."""
_SCAN_SHARE = 0.5
"""Of the page that a picture must cover to be a scan of it."""
_LOST_SHARE = 0.5
"""Of pages without text from which on the document is also among the rejected ones."""
_PARAGRAPH_GAP = 1.4
"""Times the page's usual distance between lines: more of it separates paragraphs."""
_HEADING_SIZE = 1.15
"""Times the size of the line before: a line of another size is a paragraph of its own."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_NO_CHARACTER = "\ufffd"


def read_pdf(data: bytes) -> Parsed:
    """The document's text, with a blank line between paragraphs and pages, and where each page starts.

    The metadata names the pages that hold no text although something is on them. Raises ``BadRow.Error`` or
    ``MissingExtra``.
    """
    try:
        import pypdfium2
    except ImportError:
        raise MissingExtra(".pdf") from None
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise BadRow.Error("encrypted", "the PDF has a password; save a copy without it") from error
        raise BadRow.Error("broken_file", f"the PDF could not be parsed: {error}") from error
    if len(pdf) > _MAX_PAGES:
        raise BadRow.Error("too_large", f"the PDF has {len(pdf)} pages, over {_MAX_PAGES}; split it")
    pdf.init_forms()
    try:
        pages = [_read_page(pdf, i) for i in range(len(pdf))]
    except pypdfium2.PdfiumError as error:
        raise BadRow.Error("broken_file", f"the PDF could not be parsed: {error}") from error
    text, starts = joined_pages([page.lines for page in pages])
    if not text.strip():
        raise BadRow.Error("empty", "the PDF has no text (are its pages scanned, or damaged?); run OCR on it")
    if text.count(_NO_CHARACTER) > len(text) // 2:
        raise BadRow.Error("broken_file", "the PDF's fonts don't say which characters they show; run OCR on it")
    described = pdf.get_metadata_dict()
    title = real_title(described.get("Title"))
    silent = [i for i, page in enumerate(pages, 1) if page.is_silent]
    metadata, properties = _metadata(len(pages), silent), pdf_properties(described)
    return Parsed(text, title, "text/plain", metadata, starts, _lost(len(pages), silent), properties)


def _metadata(pages: int, silent: Sequence[int]) -> dict[str, str | int]:
    return {"pages": pages} | ({"pages_without_text": page_ranges(silent)} if silent else {})


def _lost(pages: int, silent: Sequence[int]) -> tuple[BadRow, ...]:
    if len(silent) < pages * _LOST_SHARE or not silent:
        return ()
    detail = f"{len(silent)} of its {pages} pages hold no text that can be read: {page_ranges(silent)}; run OCR on it"
    return (BadRow("pages", "pages_without_text", detail),)


@dataclass(frozen=True, slots=True)
class _Page:
    lines: list[Line]
    is_silent: bool
    """Whether something is on the page, but no text to speak of."""


def _read_page(pdf: Any, index: int) -> _Page:
    """A page, with what was typed into its form fields."""
    import pypdfium2.raw as pdfium

    page = pdf[index]
    if pdfium.FPDFPage_GetAnnotCount(page):
        pdfium.FPDFPage_Flatten(page, pdfium.FLAT_NORMALDISPLAY)  # makes form fields part of the page read next
        page.close()
        page = pdf[index]
    try:
        text_page = page.get_textpage()
        try:
            lines = list(_lines(text_page, pdfium))
        finally:
            text_page.close()
        text = "".join(line.text for line in lines).strip()
        return _Page(lines, len(text) <= _MAX_STAMP_CHARACTERS and _is_silent(page, text, pdfium))
    finally:
        page.close()


def _is_silent(page: Any, text: str, pdfium: Any) -> bool:
    """Whether a page of little or no text shows something else: a picture of the page, or without text anything."""
    objects = list(page.get_objects(max_depth=2))
    if not text:
        return bool(objects)
    width, height = page.get_size()

    def covers(item: Any) -> bool:
        left, bottom, right, top = item.get_bounds()
        return bool((right - left) * (top - bottom) >= _SCAN_SHARE * width * height)

    return any(item.type == pdfium.FPDF_PAGEOBJ_IMAGE and covers(item) for item in objects)


def _lines(text_page: Any, pdfium: Any) -> Iterator[Line]:
    """The lines of a page, and an empty one between paragraphs, which are told by distance and size."""
    text = text_page.get_text_range()
    found: list[tuple[str, float, float]] = []
    at = 0
    for line in text.split("\r\n"):
        clean = _CONTROL.sub("", line).rstrip()
        if clean.strip():
            first = at + len(line) - len(line.lstrip())
            found.append((clean, *_place(text_page, first, pdfium)))
        at += len(line) + 2
    gaps = [a[1] - b[1] for a, b in pairwise(found) if a[1] > b[1]]
    usual = median(gaps) if gaps else 0.0
    usual_size = median(size for _, _, size in found) if found else 0.0
    for i, (line, y, size) in enumerate(found):
        if i:
            _, above, size_above = found[i - 1]
            is_far = above - y > usual * _PARAGRAPH_GAP
            if is_far or max(size, size_above) > min(size, size_above) * _HEADING_SIZE:
                yield Line("")
        yield Line(line, size > usual_size * _HEADING_SIZE)


def _place(text_page: Any, index: int, pdfium: Any) -> tuple[float, float]:
    """(height of the base line above the page's bottom, font size) of a character, in points."""
    x, y = ctypes.c_double(), ctypes.c_double()
    pdfium.FPDFText_GetCharOrigin(text_page, index, x, y)
    return y.value, float(pdfium.FPDFText_GetFontSize(text_page, index))
