"""JSONL, CSV and Parquet: one row, one document, one row in memory at a time."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from embed_assets.corpus.encoding import Undecodable, byte_order_mark, decode
from embed_assets.corpus.options import ParseOptions
from embed_assets.records import hash_text


@dataclass(frozen=True, slots=True)
class Row:
    """The text of a row, or of a whole file (then `key` is empty)."""

    key: str
    """What tells it from the other rows of its file: its id, else a hash of its text."""
    text: str
    title: str
    media_type: str
    byte_size: int
    metadata: str = "{}"
    place: str = ""
    """Where the row stands in its file, when `key` comes from the id column; empty when it has no id."""

    def named(self, key: str) -> Row:
        """A copy under another key."""
        return replace(self, key=key)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or file (then `key` is empty), that could not be read."""

    key: str
    reason: str
    detail: str

    class Error(Exception):
        """Raised by a parser of whole files."""

        def __init__(self, reason: str, detail: str) -> None:
            super().__init__(detail)
            self.row = BadRow("", reason, detail)


def iter_jsonl(stream: IO[bytes], options: ParseOptions) -> Iterator[Row | BadRow]:
    """One JSON object per line; blank lines are skipped. Bad lines are named by their 1-based number."""
    for number, line in enumerate(_lines(stream, options.max_file_bytes), 1):
        key = f"line{number}"
        if line is None:
            yield BadRow(key, "too_large", f"the line is over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"), parse_int=_parse_int)
            row = _row(value, key, len(line), options) if isinstance(value, dict) else None
        except UnicodeDecodeError as error:
            yield BadRow(key, "undecodable", f"line {number} is no UTF-8 ({error.reason} at byte {error.start})")
        except (ValueError, RecursionError) as error:
            yield BadRow(key, "invalid_json", f"line {number} is no JSON: {error}")
        else:
            yield row or BadRow(key, "invalid_json", f"line {number} is a JSON {type(value).__name__}, not an object")


def _parse_int(digits: str) -> int | str:
    # Python refuses to parse thousands of digits; as text they can be kept.
    return int(digits) if len(digits) < 1000 else digits


def _lines(stream: IO[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Lines of at most `max_bytes`; None for a longer one, which is read past in bounded memory."""
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass
        yield None


def iter_csv(stream: IO[bytes], options: ParseOptions) -> Iterator[Row | BadRow]:
    """Comma-separated rows under a header line; the encoding is told from the file's beginning."""
    head = stream.read(1 << 18)
    try:
        # A byte order mark tells at once; without one the sample must not end inside a character.
        encoding = byte_order_mark(head) or decode(head[: head.rfind(b"\n") + 1] or head)[1]
    except Undecodable as error:
        yield BadRow("", "undecodable", str(error))
        return
    text = io.TextIOWrapper(io.BufferedReader(_Rejoined(head, stream)), encoding=encoding, newline="", errors="strict")
    csv.field_size_limit(options.max_file_bytes)
    reader = csv.DictReader(text, strict=True)
    try:
        names = list(reader.fieldnames or ())
    except (csv.Error, UnicodeDecodeError) as error:
        yield BadRow("", "broken_file", f"the header line could not be read: {error}")
        return
    if options.text_column not in names:
        yield BadRow("", "missing_text", _no_column(options.text_column, names))
        return
    yield from _csv_rows(reader, len(names), options)


def _csv_rows(reader: csv.DictReader[str], columns: int, options: ParseOptions) -> Iterator[Row | BadRow]:
    for number in itertools.count(2):
        key = f"row{number}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger than" in str(error):  # what follows would be read from inside that field
                yield BadRow(
                    key,
                    "too_large",
                    f"a field over EMBED_MAX_FILE_BYTES={options.max_file_bytes}; the rest was not read",
                )
                return
            yield BadRow(key, "invalid_row", f"row {number}: {error}")
            continue
        except UnicodeDecodeError as error:
            detail = f"no {error.encoding} near row {number} ({error.reason}); the rest was not read"
            yield BadRow(key, "undecodable", detail)
            return
        size = sum(len(str(value).encode("utf-8", "replace")) for value in fields.values())
        if None in fields or None in fields.values():
            yield BadRow(key, "invalid_row", f"row {number} has other columns than the header's {columns}")
        elif size > options.max_file_bytes:
            yield BadRow(key, "too_large", f"{size} bytes, over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
        else:
            yield _row(dict(fields), key, size, options)


class _Rejoined(io.RawIOBase):
    """A stream whose beginning was read already, from its beginning."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def iter_parquet(stream: IO[bytes], options: ParseOptions) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file, a small batch at a time."""
    number = 0
    try:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        if options.text_column not in names:
            yield BadRow("", "missing_text", _no_column(options.text_column, names))
            return
        for batch in file.iter_batches(batch_size=256, use_threads=False):
            columns = {
                name: _python_values(batch.column(names.index(name)), name == options.text_column) for name in names
            }
            for values in zip(*columns.values(), strict=True):
                number += 1
                fields = dict(zip(columns, values, strict=True))
                yield _parquet_row(fields, f"row{number}", options)
    except (pa.ArrowException, OSError, ValueError) as error:
        after = f" after row {number}; the rest was not read" if number else ""
        key = f"row{number + 1}" if number else ""
        yield BadRow(key, "broken_file", f"no Parquet that could be parsed{after}: {error}")


def _python_values(column: pa.Array, is_text: bool) -> list[Any]:
    """A column's values; what Python can't hold (times out of its range, ...) as Arrow writes it, or as None."""
    try:
        return list(column.to_pylist())
    except Exception:  # anything from OverflowError to an unknown time zone's KeyError
        if not is_text:
            try:
                return list(column.cast(pa.string()).to_pylist())
            except Exception:
                return [None] * len(column)
    return [_python_value(value) for value in column]


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes() if value.as_buffer() is not None else None


def _parquet_row(fields: dict[str, Any], key: str, options: ParseOptions) -> Row | BadRow:
    text = fields.get(options.text_column)
    size = len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
    if size > options.max_file_bytes:
        return BadRow(key, "too_large", f"{size} bytes, over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
    return _row(fields, key, size, options)


def _row(fields: dict[str, Any], fallback: str, size: int, options: ParseOptions) -> Row | BadRow:
    if options.text_column not in fields:
        return BadRow(fallback, "missing_text", _no_column(options.text_column, list(fields)))
    text = fields.pop(options.text_column)
    if text is None:
        return BadRow(fallback, "empty", f"its column {options.text_column!r} is null")
    if not isinstance(text, str):
        return BadRow(
            fallback, "missing_text", f"its column {options.text_column!r} is a {type(text).__name__}, not a string"
        )
    identity = fields.pop(options.id_column, None)
    title = fields.pop(options.title_column, None)
    has_id = identity is not None and str(identity) != ""
    key = _printable(identity) if has_id else hash_text(text)[:16]
    # Sorted, so that the order of a row's columns is no change.
    metadata = json.dumps(_finite(fields), ensure_ascii=True, sort_keys=True, default=str) if fields else "{}"
    return Row(
        key,
        text.replace("\r\n", "\n").replace("\r", "\n"),
        _printable(title) if title is not None else "",
        "text/plain",
        size,
        metadata,
        fallback if has_id else "",
    )


def _finite(value: Any) -> Any:
    """The value without NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


def _printable(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _no_column(text_column: str, found: list[str]) -> str:
    shown = ", ".join(repr(name) for name in found[:8])
    return f"no column {text_column!r} among {shown or 'none'}; set EMBED_TEXT_COLUMN"
