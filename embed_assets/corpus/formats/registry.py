"""Names the parser of each format that is read as a whole."""

from __future__ import annotations

from collections.abc import Callable

from embed_assets.corpus.formats.epub import read_epub
from embed_assets.corpus.formats.html import read_html
from embed_assets.corpus.formats.mail import read_eml, read_msg
from embed_assets.corpus.formats.notebook import read_notebook
from embed_assets.corpus.formats.opendocument import read_opendocument
from embed_assets.corpus.formats.parsed import Parsed
from embed_assets.corpus.formats.pdf import read_pdf
from embed_assets.corpus.formats.sheets import read_sheets
from embed_assets.corpus.formats.slides import read_slides
from embed_assets.corpus.formats.word import read_word

FORMATS: dict[str, Callable[[bytes], Parsed]] = {
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    ".pdf": read_pdf,
    **dict.fromkeys((".docx", ".docm"), read_word),
    **dict.fromkeys((".pptx", ".pptm"), read_slides),
    **dict.fromkeys((".xlsx", ".xlsm", ".xlsb", ".xls", ".ods"), read_sheets),
    **dict.fromkeys((".odt", ".odp"), read_opendocument),
    ".epub": read_epub,
    ".eml": read_eml,
    ".msg": read_msg,
    ".ipynb": read_notebook,
}
"""By file name suffix. They import their libraries only when they are called, in the sandbox's process."""
