"""Reads Parquet files and Delta tables, a batch of rows at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from embed_assets.corpus.items import BadRow, Row
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.rows import build_row, missing_column, text_bytes
from embed_assets.errors import SourceError

_BATCH_ROWS = 256
"""Rows of a Parquet file in memory at a time. More would read faster, but they are all held until each is handed on."""
_NESTED_BATCH_ROWS = 4
"""Rows in memory at a time if rows may have lists: a few bytes of a file can encode a list of millions of values."""
_MAX_EXPANSION = 200
"""How many times its own size a Parquet file may expand to. Text usually compresses about tenfold; a bomb, far more."""


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
        if problem := missing_column(names, options):
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

    Raises ``SourceError`` if its files can't be read, which may be because it was changed meanwhile.
    """
    try:
        table = DeltaTable(location)
        names = [field.name for field in table.schema().fields]
        files = table.file_uris()
    except (DeltaError, ValueError) as error:
        yield BadRow("", "broken_file", f"the Delta table can't be opened: {error}")
        return
    folder = Path(location).resolve()
    foreign = next((uri for uri in files if not Path(unquote(uri)).resolve().is_relative_to(folder)), None)
    if foreign is not None:
        yield BadRow("", "broken_file", f"the Delta table has rows in a file outside of its folder: {foreign!r}")
    elif problem := missing_column(names, options):
        yield BadRow("", *problem)
    else:
        try:
            yield from _delta_rows(table, options)
        except (DeltaError, pa.ArrowException) as error:
            raise SourceError(
                f"the Delta table {location!r} can't be read: {error}; run again if something is writing to it",
                is_retryable=True,
            ) from error


def _delta_rows(table: DeltaTable, options: ParseOptions) -> Iterator[Row | BadRow]:
    number = 0
    for batch in pa.RecordBatchReader.from_stream(table.scan()):
        for i in range(batch.num_rows):
            number += 1
            yield _parquet_row(batch.schema.names, batch, i, f"row{number}", options)


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
        size = text_bytes(fields, options)
        row = build_row(fields, key, size, options) if size <= options.max_file_bytes else None
    except MemoryError:
        return BadRow(key, "too_large", "there is not enough memory for it")
    size += len(row.metadata) if isinstance(row, Row) else 0
    if size > options.max_file_bytes:
        return BadRow(key, "too_large", f"{size} bytes, over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
    assert row is not None
    return row
