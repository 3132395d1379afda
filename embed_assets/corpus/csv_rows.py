"""Reads CSV and its kin, without holding a whole file in memory."""

from __future__ import annotations

import csv
import itertools
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from embed_assets.corpus.encoding import Undecodable
from embed_assets.corpus.items import BadRow, Row
from embed_assets.corpus.line_files import SAMPLE_BYTES, STRAY_BYTE, encoding_of, text_of
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.rows import build_row, missing_column

_DELIMITERS = (",", ";", "\t", "|")
_MOST_LINES_OF_A_BROKEN_FIELD = 20
"""More would find the ends of longer ones, and lose more good rows where a stray quotation mark opened none."""


def iter_csv(stream: IO[bytes], options: ParseOptions) -> Iterator[Row | BadRow]:
    """Rows of a file with a header line, whose values are separated by commas, semicolons, tabs or bars.

    The encoding is determined from the file's start, the separator from the header line or a line ``sep=`` before it.
    """
    head = stream.read(SAMPLE_BYTES)
    try:
        encoding = encoding_of(head)
    except Undecodable as error:
        yield BadRow("", "undecodable", str(error))
        return
    text = text_of(head, stream, encoding, newline="")
    csv.field_size_limit(options.max_file_bytes)
    try:
        header = text.readline(SAMPLE_BYTES)
        delimiter = header.strip()[4:] if re.fullmatch("sep=[,;\t|]", header.strip()) else ""
        if delimiter:
            header = text.readline(SAMPLE_BYTES)
        delimiter = delimiter or _delimiter_of(header, options.text_column)
        lines = _CsvLines(itertools.chain([header], text))
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        names = next(reader, [])
    except (csv.Error, UnicodeDecodeError) as error:
        yield BadRow("", "broken_file", f"the header line could not be read: {error}")
        return
    twice = next((name for name in names if names.count(name) > 1 and name), None)
    if problem := missing_column(names, options):
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
        elif any(STRAY_BYTE.search(value) for value in values):
            yield BadRow(key, "undecodable", f"row {number} has bytes that are not {encoding}")
        elif size > options.max_file_bytes:
            yield BadRow(key, "too_large", f"{size} bytes, over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
        else:
            yield build_row(dict(zip(names, values, strict=True)), key, size, options)


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
