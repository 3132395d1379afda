"""JSONL, CSV and Parquet: one row, one document, one row in memory at a time."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from embed_assets.corpus.encoding import Undecodable, byte_order_mark, decode
from embed_assets.corpus.items import BadRow, Row
from embed_assets.corpus.options import ParseOptions
from embed_assets.records import hash_text

_MAX_BRACKETS = 3_000_000
"""Of a JSON line: an empty list takes 56 bytes of memory, thirty times its text."""
_BATCH_ROWS = 256
"""Of a Parquet file, read at a time ..."""
_NESTED_BATCH_ROWS = 4
"""... and where a row may hold lists: a few bytes of such a file can stand for millions of values."""
_MOST_UNFOLDED = 200
"""Times the size of a Parquet file that its rows may have together; well packed text is a tenth of itself."""


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
        if (brackets := line.count(b"[") + line.count(b"{")) > _MAX_BRACKETS:
            yield BadRow(key, "too_large", f"line {number} has {brackets} brackets, over {_MAX_BRACKETS}")
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
    """Rows of a Parquet file, a small batch at a time.

    Values become Python's row by row, and strings stay in dictionaries until then, so that a file that is small
    because it repeats itself does not unfold all at once.
    """
    number = unfolded = 0
    try:
        budget = max(options.max_file_bytes, _MOST_UNFOLDED * stream.seek(0, io.SEEK_END))
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        if options.text_column not in names:
            yield BadRow("", "missing_text", _no_column(options.text_column, names))
            return
        strings = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
        file = pq.ParquetFile(stream, read_dictionary=strings)
        for batch in _parquet_batches(file):
            for i in range(batch.num_rows):
                number += 1
                if unfolded > budget:
                    detail = f"the file unfolds to more than {_MOST_UNFOLDED} times its size; {budget} bytes were read"
                    yield BadRow(f"row{number}", "too_large", detail)
                    continue
                row = _parquet_row(names, batch, i, f"row{number}", options)
                unfolded += row.byte_size + len(row.metadata) if isinstance(row, Row) else 0
                yield row
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        after = f" after row {number}; the rest was not read" if number else ""
        key = f"row{number + 1}" if number else ""
        yield BadRow(key, "broken_file", f"no Parquet that could be parsed{after}: {error or 'not enough memory'}")


def _parquet_batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """All rows in batches, small ones where a row may hold any number of values."""
    # How many it holds, the metadata of its columns would tell; of some broken files, asking for that ends the process.
    is_nested = any(pa.types.is_nested(field.type) for field in file.schema_arrow)
    rows = _NESTED_BATCH_ROWS if is_nested else _BATCH_ROWS
    for i in range(file.num_row_groups):
        yield from file.iter_batches(batch_size=rows, row_groups=[i], use_threads=False)


def _python_value(value: pa.Scalar, is_text: bool) -> Any:
    """The value; one that Python can't hold (a time out of its range, ...) as Arrow writes it, or as None."""
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if is_text:
            return value.as_buffer().to_pybytes() if value.as_buffer() is not None else None
    except Exception:  # anything from OverflowError to an unknown time zone's KeyError
        pass
    try:
        return value.cast(pa.string()).as_py()
    except Exception:
        return None


def _parquet_row(names: list[str], batch: pa.RecordBatch, i: int, key: str, options: ParseOptions) -> Row | BadRow:
    try:
        fields = {
            name: _python_value(batch.column(names.index(name))[i], name == options.text_column) for name in names
        }
        text = fields.get(options.text_column)
        size = len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
        row = _row(fields, key, size, options) if size <= options.max_file_bytes else None
    except MemoryError:
        return BadRow(key, "too_large", "it needs more memory than there is")
    size += len(row.metadata) if isinstance(row, Row) else 0
    if size > options.max_file_bytes:
        return BadRow(key, "too_large", f"{size} bytes, over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
    assert row is not None
    return row


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
    metadata = (
        json.dumps(_finite(fields), ensure_ascii=True, sort_keys=True, default=str, allow_nan=False) if fields else "{}"
    )
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
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _printable(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _no_column(text_column: str, found: list[str]) -> str:
    shown = ", ".join(repr(name) for name in found[:8])
    return f"no column {text_column!r} among {shown or 'none'}; set EMBED_TEXT_COLUMN"
