"""Reads spreadsheets as Markdown: a heading per sheet, and a line for each row."""

from __future__ import annotations

import datetime
import io
import zipfile
from typing import Any

from embed_assets.corpus.formats.archive import OLE_MAGIC, Archive
from embed_assets.corpus.formats.parsed import MissingExtra, Parsed, real_title
from embed_assets.corpus.items import BadRow

_ENCRYPTED = "EncryptedPackage".encode("utf-16-le")
"""The stream of an OLE file that holds an encrypted spreadsheet ([MS-OFFCRYPTO] 2.3.4.4)."""
_MAX_CELLS = 5_000_000
"""Of a sheet, empty ones included: a file of kilobytes can name a cell at the end of a million rows of 16,384."""


def read_sheets(data: bytes) -> Parsed:
    """All sheets that are shown, with the values that their formulas had when the file was saved.

    Raises ``BadRow.Error`` or ``MissingExtra``.
    """
    try:
        from python_calamine import CalamineError, PasswordError, SheetTypeEnum, SheetVisibleEnum, load_workbook
    except ImportError:
        raise MissingExtra("a spreadsheet") from None
    if data.startswith(OLE_MAGIC) and _ENCRYPTED in data:
        raise BadRow.Error("encrypted", "the spreadsheet has a password; save a copy without it")
    is_zip = zipfile.is_zipfile(io.BytesIO(data))
    archive = Archive(data, "spreadsheet") if is_zip else None
    blocks = []
    try:
        workbook = load_workbook(io.BytesIO(data))
        for sheet in workbook.sheets_metadata:
            if sheet.visible != SheetVisibleEnum.Visible or sheet.typ != SheetTypeEnum.WorkSheet:
                continue
            table = workbook.get_sheet_by_name(sheet.name)
            if table.total_height * table.total_width > _MAX_CELLS:
                detail = f"its sheet {sheet.name!r} spans {table.total_height} rows of {table.total_width} cells"
                raise BadRow.Error("too_large", f"{detail}, over {_MAX_CELLS} in all; split it")
            rows = (_row(row) for row in table.iter_rows())
            lines = "\n".join(row for row in rows if row)
            blocks += [f"# {' '.join(sheet.name.split())}", lines] if lines else []
    except PasswordError as error:
        raise BadRow.Error("encrypted", "the spreadsheet has a password; save a copy without it") from error
    except (CalamineError, ValueError, OSError) as error:
        raise BadRow.Error("broken_file", f"the spreadsheet could not be parsed: {error}") from error
    if archive is None or "docProps/core.xml" not in archive.names:
        return Parsed("\n\n".join(blocks))
    return Parsed("\n\n".join(blocks), real_title(archive.title()), properties=archive.properties())


def _row(row: list[Any]) -> str:
    """A row as a line, without the empty cells at its end; '' if it has no values."""
    cells = [_value(cell) for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return f"| {' | '.join(cells)} |" if cells else ""


def _value(cell: Any) -> str:
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 1e15:
        return str(int(cell))
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return str(cell.date())
    return " ".join(str(cell).split())
