"""Reads Jupyter notebooks as Markdown: their text and code, without outputs."""

from __future__ import annotations

import json
from typing import Any

from embed_assets.corpus.formats.parsed import Parsed, real_title
from embed_assets.corpus.items import BadRow


def read_notebook(data: bytes) -> Parsed:
    """The notebook's cells in order, code in fences. Raises ``BadRow.Error``."""
    try:
        notebook = json.loads(data.decode("utf-8-sig"))
        # Before format 4, cells lay in worksheets.
        cells = notebook.get("cells") or [c for sheet in notebook.get("worksheets", ()) for c in sheet.get("cells", ())]
        about = notebook.get("metadata") or {}
        language = _language(about)
        blocks = [_cell(cell, language) for cell in cells]
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise BadRow.Error("broken_file", f"it is no Jupyter notebook: {error}") from error
    return Parsed("\n\n".join(block for block in blocks if block.strip()), real_title(about.get("title")))


def _language(about: dict[str, Any]) -> str:
    named = (about.get("language_info") or {}).get("name") or (about.get("kernelspec") or {}).get("language") or ""
    return str(named) if str(named).replace("-", "").replace("+", "").isalnum() else ""


def _cell(cell: dict[str, Any], language: str) -> str:
    source = cell.get("source", cell.get("input", ""))
    text = ("".join(map(str, source)) if isinstance(source, list) else str(source)).strip("\n")
    kind = cell.get("cell_type")
    if kind == "heading":  # before format 4
        return f"{'#' * max(1, min(6, int(cell.get('level', 1))))} {text}"
    if kind != "code" or not text.strip():
        return text
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
