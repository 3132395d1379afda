"""Reads JSONL, CSV and Parquet, where each row is a document, without holding a whole file in memory."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from embed_assets.corpus.encoding import DamagedUtf8, Undecodable, byte_order_mark, decode
from embed_assets.corpus.items import BadRow, Row
from embed_assets.corpus.options import ParseOptions
from embed_assets.errors import SourceError
from embed_assets.records import hash_text

_MAX_BRACKETS = 3_000_000
"""Opening brackets in a JSON line. An empty list takes 56 bytes of memory, thirty times its text: 170 MB in all."""
_MAX_INT_DIGITS = 1000
"""Longer integers stay text: Python refuses to parse more than 4,300 digits."""
_SKIP_BYTES = 1 << 20
"""Read at a time of a line that is too long. More would take fewer reads and more memory."""
_SAMPLE_BYTES = 1 << 18
"""From the start of a file, to determine its encoding. More would make it surer, at that much more memory."""
_DELIMITERS = (",", ";", "\t", "|")
_MOST_LINES_OF_A_BROKEN_FIELD = 20
"""More would find the ends of longer ones, and lose more good rows where a stray quotation mark opened none."""
_POSITION = re.compile(r"(?:line|row)\d+|pages")
"""What rows without an id are called when they are rejected, and lost parts of a file."""
_STRAY_BYTE = re.compile("[\udc80-\udcff]")
"""What a byte that is not text in the file's encoding is read as."""
_BATCH_ROWS = 256
"""Rows of a Parquet file in memory at a time. More would read faster, but they are all held until each is handed on."""
_NESTED_BATCH_ROWS = 4
"""Rows in memory at a time if rows may have lists: a few bytes of a file can encode a list of millions of values."""
_MAX_EXPANSION = 200
"""How many times its own size a Parquet file may expand to. Text usually compresses about tenfold; a bomb, far more."""


def iter_jsonl(stream: IO[bytes], options: ParseOptions) -> Iterator[Row | BadRow]:
    """Rows of a JSONL file, one JSON object per line. Blank lines are skipped; bad ones are keyed by 1-based number."""
    head = stream.read(_SAMPLE_BYTES)
    try:
        encoding = _encoding_of(head)
    except Undecodable:
        encoding = "utf-8"  # the lines say which of them are not
    lines: _Lines = io.BufferedReader(_PrefixedStream(head, stream))
    if encoding != "utf-8":
        lines = _Recoded(_text_of(head, stream, encoding, newline="\n"))
    number = 0
    try:
        for number, line in enumerate(_lines(lines, options.max_file_bytes), 1):
            if line is None or line.strip():
                yield _json_row(line, number, options)
    except UnicodeDecodeError as error:
        detail = f"line {number + 1} is not {encoding} ({error.reason}); the rest of the file was not read"
        yield BadRow(f"line{number + 1}", "undecodable", detail)


def iter_json(stream: IO[bytes], options: ParseOptions) -> Iterator[Row | BadRow]:
    """Rows of a JSON file: of an array of objects, or of an object that holds one; else the object is the only row.

    Unlike the other formats of rows, the file is in memory as a whole. One of JSON lines is read as such.
    """
    data = stream.read(options.max_file_bytes + 1)
    if len(data) > options.max_file_bytes:
        detail = f"over EMBED_MAX_FILE_BYTES={options.max_file_bytes}; write it as JSON Lines, which may be larger"
        yield BadRow("", "too_large", detail)
        return
    if (brackets := data.count(b"[") + data.count(b"{")) > _MAX_BRACKETS:
        yield BadRow("", "too_large", f"it has {brackets} brackets, over {_MAX_BRACKETS}")
        return
    try:
        value = json.loads(decode(data)[0], parse_int=_parse_int)
    except Undecodable as error:
        yield BadRow("", "undecodable", str(error))
        return
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            yield from iter_jsonl(io.BytesIO(data), options)
        else:
            yield BadRow("", "invalid_json", f"it is not JSON: {error}")
        return
    rows = _rows_of_json(value, options)
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            text = _text_of_value(_value(row, options.text_column))
            size = len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
            yield _build_row(row, f"row{number}", size, options)
        else:
            yield BadRow(f"row{number}", "invalid_json", f"row {number} is a JSON {type(row).__name__}, not an object")


def _rows_of_json(value: Any, options: ParseOptions) -> list[Any]:
    if isinstance(value, dict) and _value(value, options.text_column) is None:
        inside = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        return inside[0] if len(inside) == 1 else [value]
    return value if isinstance(value, list) else [value]


def _json_row(line: bytes | None, number: int, options: ParseOptions) -> Row | BadRow:
    """The row of a line; None is one that is too long."""
    key = f"line{number}"
    if line is None:
        return BadRow(key, "too_large", f"the line is over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if (brackets := line.count(b"[") + line.count(b"{")) > _MAX_BRACKETS:
        return BadRow(key, "too_large", f"line {number} has {brackets} brackets, over {_MAX_BRACKETS}")
    try:
        value = json.loads(line.decode("utf-8"), parse_int=_parse_int)
        if isinstance(value, dict):
            return _build_row(value, key, len(line), options)
    except UnicodeDecodeError as error:
        return BadRow(key, "undecodable", f"line {number} is not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return BadRow(key, "invalid_json", f"line {number} is not JSON: {error}")
    return BadRow(key, "invalid_json", f"line {number} is a JSON {type(value).__name__}, not an object")


def _encoding_of(head: bytes) -> str:
    """The encoding of a file of lines, from its start. Raises ``Undecodable`` if it can't be told."""
    try:
        # Without a byte order mark only whole lines are decoded: the sample may end inside a character.
        return byte_order_mark(head) or decode(head[: head.rfind(b"\n") + 1] or head)[1]
    except DamagedUtf8:
        return "utf-8"


def _text_of(head: bytes, rest: IO[bytes], encoding: str, newline: str) -> io.TextIOWrapper:
    """The file as text. Where an encoding is one of single bytes, or UTF-8, stray bytes are read as `_STRAY_BYTE`."""
    errors = "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    data = io.BufferedReader(_PrefixedStream(head, rest))
    return io.TextIOWrapper(data, encoding=encoding, newline=newline, errors=errors)


class _Lines(Protocol):
    """A file of lines."""

    def readline(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Recoded:
    """The lines of a text as UTF-8."""

    text: io.TextIOWrapper

    def readline(self, size: int, /) -> bytes:
        """The next line, or so many characters of it."""
        return self.text.readline(size).encode("utf-8", "surrogateescape")


def _parse_int(digits: str) -> int | str:
    return int(digits) if len(digits) < _MAX_INT_DIGITS else digits


def _lines(stream: _Lines, max_bytes: int) -> Iterator[bytes | None]:
    """Lines of at most `max_bytes`, with their line ends; None for a longer one, which is skipped in bounded memory."""
    while line := stream.readline(max_bytes + 1):
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(_SKIP_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield None


def iter_csv(stream: IO[bytes], options: ParseOptions) -> Iterator[Row | BadRow]:
    """Rows of a file with a header line, whose values are separated by commas, semicolons, tabs or bars.

    The encoding is determined from the file's start, the separator from the header line or a line ``sep=`` before it.
    """
    head = stream.read(_SAMPLE_BYTES)
    try:
        encoding = _encoding_of(head)
    except Undecodable as error:
        yield BadRow("", "undecodable", str(error))
        return
    text = _text_of(head, stream, encoding, newline="")
    csv.field_size_limit(options.max_file_bytes)
    try:
        header = text.readline(_SAMPLE_BYTES)
        delimiter = header.strip()[4:] if re.fullmatch("sep=[,;\t|]", header.strip()) else ""
        if delimiter:
            header = text.readline(_SAMPLE_BYTES)
        delimiter = delimiter or _delimiter_of(header, options.text_column)
        lines = _CsvLines(itertools.chain([header], text))
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        names = next(reader, [])
    except (csv.Error, UnicodeDecodeError) as error:
        yield BadRow("", "broken_file", f"the header line could not be read: {error}")
        return
    twice = next((name for name in names if names.count(name) > 1 and name), None)
    if problem := _missing_column(names, options):
        yield BadRow("", *problem)
    elif twice is not None:
        yield BadRow("", "broken_file", f"two of its columns are named {twice!r}; rename one")
    else:
        yield from _csv_rows(reader, lines, names, encoding, options)


def _delimiter_of(header: str, text_column: str) -> str:
    """The separator whose columns have the text among them; if none does, the one that makes the most columns."""

    def columns(delimiter: str) -> list[str]:
        try:
            return next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            return []

    return max(_DELIMITERS, key=lambda each: (text_column in (found := columns(each)), len(found)))


def _csv_rows(
    reader: Iterator[list[str]], lines: _CsvLines, names: list[str], encoding: str, options: ParseOptions
) -> Iterator[Row | BadRow]:
    for number in itertools.count(2):
        key = f"row{number}"
        lines.taken.clear()
        try:
            values = next(reader)
            while not values:  # a blank line
                values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger than" in str(error):  # the reader would go on in the middle of that field
                yield BadRow(
                    key,
                    "too_large",
                    f"a field is over EMBED_MAX_FILE_BYTES={options.max_file_bytes}; the rest of the file was not read",
                )
                return
            skipped = lines.skip_open_field()
            after = f"; it seems to go on for {skipped} lines" if skipped else ""
            yield BadRow(key, "invalid_row", f"row {number}: {error}{after}")
            continue
        except UnicodeDecodeError as error:
            detail = f"not {error.encoding} near row {number} ({error.reason}); the rest of the file was not read"
            yield BadRow(key, "undecodable", detail)
            return
        size = sum(len(value.encode("utf-8", "replace")) for value in values)
        if len(values) != len(names):
            detail = f"row {number} has {len(values)} columns, the header {len(names)}"
            yield BadRow(key, "invalid_row", detail)
        elif any(_STRAY_BYTE.search(value) for value in values):
            yield BadRow(key, "undecodable", f"row {number} has bytes that are not {encoding}")
        elif size > options.max_file_bytes:
            yield BadRow(key, "too_large", f"{size} bytes, over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
        else:
            yield _build_row(dict(zip(names, values, strict=True)), key, size, options)


@dataclass(slots=True)
class _CsvLines:
    """The lines of a file, as a reader of rows takes them."""

    source: Iterator[str]
    taken: list[str] = field(default_factory=list)
    """Those of the current row."""
    _waiting: deque[str] = field(default_factory=deque)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self.source)
        self.taken.append(line)
        return line

    def skip_open_field(self) -> int:
        """Skip the lines of a quoted field that an error left open: its row's quotation marks are odd in number, and
        so are those of the line that ends it. Returns how many; 0 if none of the next lines does."""
        if sum(line.count('"') for line in self.taken) % 2 == 0:
            return 0
        ahead: list[str] = []
        for line in itertools.islice(self, _MOST_LINES_OF_A_BROKEN_FIELD):
            ahead.append(line)
            if line.count('"') % 2:
                return len(ahead)
        self._waiting.extendleft(reversed(ahead))
        return 0


class _PrefixedStream(io.RawIOBase):
    """A stream whose first bytes were already read, put back together."""

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

    Strings stay dictionary-encoded until their row becomes Python values, so that a file that is small because it
    repeats itself never expands all at once.
    """
    number = expanded = 0
    try:
        budget = max(options.max_file_bytes, _MAX_EXPANSION * stream.seek(0, io.SEEK_END))
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        if problem := _missing_column(names, options):
            yield BadRow("", *problem)
            return
        strings = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
        file = pq.ParquetFile(stream, read_dictionary=strings)
        for batch in _parquet_batches(file):
            for i in range(batch.num_rows):
                number += 1
                if expanded > budget:
                    detail = f"the file expands to over {_MAX_EXPANSION} times its size; only {budget} bytes were read"
                    yield BadRow(f"row{number}", "too_large", detail)
                    continue
                row = _parquet_row(names, batch, i, f"row{number}", options)
                expanded += row.byte_size + len(row.metadata) if isinstance(row, Row) else 0
                yield row
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        after = f" after row {number}, and the rest was not read" if number else ""
        key = f"row{number + 1}" if number else ""
        yield BadRow(key, "broken_file", f"the Parquet file could not be parsed{after}: {error or 'not enough memory'}")


def iter_delta(location: str, options: ParseOptions) -> Iterator[Row | BadRow]:
    """Rows of the current version of a local Delta table, a batch at a time, in no particular order.

    Raises ``SourceError`` if the table can't be read, which may be because it was changed meanwhile.
    """
    try:
        table = DeltaTable(location)
        names = [field.name for field in table.schema().fields]
        inside = f"{Path(location).resolve()}/"
        foreign = [uri for uri in table.file_uris() if not str(Path(uri).resolve()).startswith(inside)]
        if foreign:
            yield BadRow("", "broken_file", f"the Delta table has rows in a file outside of its folder: {foreign[0]!r}")
            return
        if problem := _missing_column(names, options):
            yield BadRow("", *problem)
            return
        number = 0
        for batch in pa.RecordBatchReader.from_stream(table.scan()):
            for i in range(batch.num_rows):
                number += 1
                yield _parquet_row(batch.schema.names, batch, i, f"row{number}", options)
    except (DeltaError, pa.ArrowException) as error:
        raise SourceError(
            f"the Delta table {location!r} can't be read: {error}; run again if something is writing to it",
            is_retryable=True,
        ) from error


def _parquet_batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """All rows in batches, which are smaller when a row may have any number of values."""
    # The column chunks' metadata has the number of values, but reading it aborts the process on some broken files.
    is_nested = any(pa.types.is_nested(field.type) for field in file.schema_arrow)
    rows = _NESTED_BATCH_ROWS if is_nested else _BATCH_ROWS
    for i in range(file.num_row_groups):
        yield from file.iter_batches(batch_size=rows, row_groups=[i], use_threads=False)


def _python_value(value: pa.Scalar, is_text: bool) -> Any:
    """The value as a Python object; if Python has none for it, such as a late date, as Arrow prints it, or None.

    Text that is not UTF-8 comes back as bytes if `is_text`.
    """
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if is_text:
            return value.as_buffer().to_pybytes() if value.as_buffer() is not None else None
    except Exception:  # from OverflowError to an unknown time zone's KeyError
        pass
    try:
        return value.cast(pa.string()).as_py()
    except Exception:
        return None


def _parquet_row(names: list[str], batch: pa.RecordBatch, i: int, key: str, options: ParseOptions) -> Row | BadRow:
    try:
        fields = {
            name: _python_value(batch.column(at)[i], name == options.text_column) for at, name in enumerate(names)
        }
        text = _text_of_value(_value(fields, options.text_column))
        size = len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
        row = _build_row(fields, key, size, options) if size <= options.max_file_bytes else None
    except MemoryError:
        return BadRow(key, "too_large", "there is not enough memory for it")
    size += len(row.metadata) if isinstance(row, Row) else 0
    if size > options.max_file_bytes:
        return BadRow(key, "too_large", f"{size} bytes, over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
    assert row is not None
    return row


def _build_row(fields: dict[str, Any], position: str, size: int, options: ParseOptions) -> Row | BadRow:
    """The row with these columns. `position` is its key when it has no id, and `size` its size in bytes."""
    problem = _missing_column(list(fields), options, is_row=True)
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


def _value(fields: dict[str, Any], column: str) -> Any:
    """The value of a column, or of a field inside columns, such as 'doc.text'; None if there is none."""
    if column in fields or "." not in column:
        return fields.get(column)
    value: Any = fields
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _take(fields: dict[str, Any], column: str) -> Any:
    """The value as `_value`, which is no longer among the fields."""
    if column in fields or "." not in column:
        return fields.pop(column, None)
    outer, _, name = column.rpartition(".")
    inside = _value(fields, outer)
    return inside.pop(name, None) if isinstance(inside, dict) else None


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


def _missing_column(found: list[str], options: ParseOptions, is_row: bool = False) -> tuple[str, str] | None:
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
