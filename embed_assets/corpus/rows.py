"""Builds the documents of rows from their columns. Pure functions."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from embed_assets.corpus.items import BadRow, Row
from embed_assets.corpus.options import ParseOptions
from embed_assets.records import hash_text

_POSITION = re.compile(r"(?:line|row)\d+|pages")
"""What rows without an id are called when they are rejected, and lost parts of a file."""


def build_row(fields: dict[str, Any], position: str, size: int, options: ParseOptions) -> Row | BadRow:
    """The row with these columns. `position` is its key when it has no id, and `size` its size in bytes."""
    problem = missing_column(list(fields), options, is_row=True)
    identity = _take(fields, options.id_column)
    has_id = identity is not None and str(identity) != ""
    key = _key(identity) if has_id else position
    text = _text_of_value(_take(fields, options.text_column))
    title = _take(fields, options.title_column)
    if problem is None and text is None:
        problem = "empty", f"its column {options.text_column!r} is null"
    elif problem is None and not isinstance(text, str):
        problem = "missing_text", f"its column {options.text_column!r} is a {type(text).__name__}, not text"
    if problem is not None:
        return BadRow(key, *problem, position if has_id else "")
    return Row(
        key if has_id else hash_text(text)[:16],
        text.replace("\r\n", "\n").replace("\r", "\n"),
        _printable(title) if title is not None else "",
        "text/markdown" if options.text_format == "markdown" else "text/plain",
        size,
        to_json(fields),
        position if has_id else "",
    )


def _key(identity: object) -> str:
    """The key of a row with an id. An id that reads like a rejected row's position gets a hash, so that they differ."""
    name = _printable(identity)
    return f"{name}~{hash_text(name)[:8]}" if _POSITION.fullmatch(name) else name


def value_of(fields: dict[str, Any], column: str) -> Any:
    """The value of a column, or of a field inside columns, such as 'doc.text'; None if there is none."""
    if column in fields or "." not in column:
        return fields.get(column)
    value: Any = fields
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _take(fields: dict[str, Any], column: str) -> Any:
    """The value as `value_of`, which is no longer among the fields."""
    if column in fields or "." not in column:
        return fields.pop(column, None)
    outer, _, name = column.rpartition(".")
    inside = value_of(fields, outer)
    return inside.pop(name, None) if isinstance(inside, dict) else None


def text_bytes(fields: dict[str, Any], options: ParseOptions) -> int:
    """Size of a row's text in UTF-8; 0 if it has none."""
    text = _text_of_value(value_of(fields, options.text_column))
    return len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0


def _text_of_value(value: Any) -> Any:
    """A text as such, bytes of UTF-8 as text, a list of texts as paragraphs, and anything else as it is."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, list) and all(isinstance(part, str | None) for part in value):
        return "\n\n".join(part for part in value if part)
    return value


def to_json(fields: dict[str, Any]) -> str:
    """A document's metadata. Sorted, so that a different order of columns is not a change."""
    return json.dumps(_finite(fields), ensure_ascii=True, sort_keys=True, default=_as_json, allow_nan=False)


def _as_json(value: object) -> object:
    """What JSON has no form for; a set, of YAML, in an order that is always the same."""
    return sorted(map(str, value)) if isinstance(value, set) else str(value)


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _printable(value: object) -> str:
    """The value as text, with lone surrogates escaped."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def missing_column(found: list[str], options: ParseOptions, is_row: bool = False) -> tuple[str, str] | None:
    """(reason, detail) of a file or row without a column that it needs; None if it has them all.

    A row of a file whose rows name their columns, such as JSONL, may do without a title.
    """
    for column in options.needed_columns:
        if column in found or ("." in column and column.partition(".")[0] in found):
            continue
        if is_row and column == options.title_column:
            continue
        kind = {options.text_column: "TEXT", options.id_column: "ID"}.get(column, "TITLE")
        shown = ", ".join(repr(name) for name in found[:8])
        detail = f"no column {column!r} among {shown or 'no columns'}; set EMBED_{kind}_COLUMN"
        return f"missing_{kind.lower()}", detail
    return None
