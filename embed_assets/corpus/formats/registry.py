"""Names the parser of each format that is read as a whole."""

from __future__ import annotations

from collections.abc import Callable

from embed_assets.corpus.formats.html import read_html
from embed_assets.corpus.formats.parsed import Parsed
from embed_assets.corpus.formats.pdf import read_pdf
from embed_assets.corpus.formats.word import read_word

FORMATS: dict[str, Callable[[bytes], Parsed]] = {
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
    ".pdf": read_pdf,
    ".docx": read_word,
    ".docm": read_word,
}
"""By file name suffix. They import their libraries only when they are called, in the sandbox's process."""
