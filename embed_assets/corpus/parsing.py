"""Reads files into documents, with one parser per format.

A bad file or row raises nothing: it becomes a `Rejection` with its reason.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import IO

from embed_assets.corpus.arrow_rows import iter_delta, iter_parquet
from embed_assets.corpus.code import CODE_FORMATS, is_code, require_grammar
from embed_assets.corpus.compression import decompressed, inner_name
from embed_assets.corpus.csv_rows import iter_csv
from embed_assets.corpus.encoding import Undecodable, decode
from embed_assets.corpus.formats.parsed import MissingExtra
from embed_assets.corpus.formats.registry import FORMATS
from embed_assets.corpus.front_matter import split_front_matter
from embed_assets.corpus.items import BadRow, Row
from embed_assets.corpus.json_rows import iter_json, iter_jsonl
from embed_assets.corpus.listing import SourceFile
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.rows import to_json
from embed_assets.corpus.sandbox import parser_process
from embed_assets.corpus.sidecars import SidecarError, Sidecars
from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.corpus.structure import find_headings
from embed_assets.metadata import values_of
from embed_assets.records import Document, Rejection
from embed_assets.scratch import SpillingSet

REASONS: dict[str, str] = {
    "empty": "it has no text",
    "too_large": "it is larger than EMBED_MAX_FILE_BYTES",
    "undecodable": "its bytes are not text in any known encoding",
    "invalid_unicode": "its text has lone surrogates, which UTF-8 can't encode",
    "unsupported_format": "its file name extension is not supported",
    "wrong_metadata": "a field of its metadata has another type than EMBED_METADATA says",
    "broken_file": "it could not be parsed",
    "too_costly": "parsing it takes too much time or memory",
    "pages_without_text": "pages of it are scanned, and hold no text",
    "encrypted": "it is protected by a password",
    "missing_extra": "reading it needs an optional package",
    "invalid_json": "the line is not a JSON object",
    "invalid_row": "the row does not match the file's columns",
    "missing_text": "it has no text column",
    "missing_id": "it lacks the column of EMBED_ID_COLUMN",
    "missing_title": "it lacks the column of EMBED_TITLE_COLUMN",
    "duplicate_id": "an earlier row of the file has the same id",
    "delta_table": "it is a Delta table on remote storage; sync a local copy, or export its rows as Parquet",
    "unreadable": "its permissions don't allow reading it",
    "symlink_outside": "it is a link to a place outside the source",
    "symlink_to_folder": "it is a link to a folder; the folder's files are read where they really are",
    "broken_link": "it is a link to nothing, or to itself",
    "not_a_file": "it is a device, socket or pipe, not a regular file",
}
"""Reason codes of rejected documents, with the detail that is given where nothing more specific is known."""

_NOT_FOR_GOOD = frozenset({"too_costly", "missing_extra"})
"""Reasons that depend on more than the file, so that it is read again although it did not change."""
_ROW_FORMATS: dict[str, Callable[[IO[bytes], ParseOptions], Iterator[Row | BadRow]]] = {
    ".json": iter_json,
    ".jsonl": iter_jsonl,
    ".ndjson": iter_jsonl,
    ".csv": iter_csv,
    ".tsv": iter_csv,
    ".parquet": iter_parquet,
}
_TEXT_FORMATS = {
    ".txt": "text/plain",
    ".text": "text/plain",
    ".log": "text/plain",
    ".srt": "text/plain",
    ".vtt": "text/plain",
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".mdx": "text/markdown",
    ".qmd": "text/markdown",
    ".rst": "text/x-rst",
    **CODE_FORMATS,
}
_PLAIN_NAMES = frozenset({"readme", "license", "copying", "notice", "authors", "changelog", "changes", "news", "todo"})
"""Of files that are plain text without an extension, in any case."""
SUPPORTED_SUFFIXES = tuple(sorted([*_ROW_FORMATS, *_TEXT_FORMATS, *FORMATS]))
_MAX_DETAIL_CHARACTERS = 500
"""Length of a rejection's detail: room for the essence of a library's message, and a table that stays readable."""
_TITLE_SEARCH_CHARACTERS = 4000
"""How far into a document its title is looked for. A heading further down is rarely the document's title."""


def read_documents(source: Source, partition: SourcePartition, options: ParseOptions) -> Iterator[Document | Rejection]:
    """A `Document` or a `Rejection` for every file or row of the partition, in order of the files' paths.

    One file is in memory at a time, and of JSONL, CSV and Parquet one row or small batch of rows.
    Raises ``SourceError`` when a file can't be opened or read.
    """
    sidecars = Sidecars(source)
    for file in partition.files:
        yield from _read_file(source, file, partition.document_id(file), options, sidecars)


def _read_file(
    source: Source, file: SourceFile, document_id: str, options: ParseOptions, sidecars: Sidecars
) -> Iterator[Document | Rejection]:
    uri, version = source.uri(file), file.content_key

    def rejected(reason: str, detail: str = "", row_key: str = "") -> Rejection:
        row_id = f"{document_id}#{row_key}" if row_key else document_id
        line = " ".join((detail or REASONS[reason]).split())
        known = None if reason in _NOT_FOR_GOOD else version
        return Rejection(row_id, uri, reason, line[:_MAX_DETAIL_CHARACTERS], known)

    suffix = format_of(file.path)
    is_rows = has_rows(file)
    file_name = PurePosixPath(document_id).name
    if file.rejected:
        yield rejected(file.rejected)
    elif suffix not in SUPPORTED_SUFFIXES and file.table is None:
        kind = f"with the extension {suffix}" if suffix else "without an extension"
        hint = f"convert them, or leave them out with EMBED_IGNORE (*{suffix})" if suffix else "add one"
        yield rejected("unsupported_format", f"files {kind} are not read; {hint}; docs/formats.md lists those that are")
    elif file.size > options.max_file_bytes and not is_rows:
        yield rejected("too_large", f"{file.size} bytes, over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
    else:
        read = _read_rows if is_rows else _read_whole
        try:
            above, beside = sidecars.of(file)
            for item in read(source, file, suffix, options):
                if isinstance(item, BadRow):
                    yield rejected(item.reason, item.detail, item.key)
                elif problem := _text_problem(item.text):
                    yield rejected(problem, row_key=item.key)
                else:
                    try:
                        values = values_of(options.metadata, item.metadata, above, beside)
                    except ValueError as error:
                        yield rejected("wrong_metadata", f"{error}; correct it, or EMBED_METADATA", item.key)
                        continue
                    yield Document(
                        f"{document_id}#{item.key}" if item.key else document_id,
                        uri,
                        item.media_type,
                        item.title or file_name,
                        item.text,
                        item.byte_size,
                        file.modified_at,
                        item.metadata,
                        version,
                        item.page_starts,
                        values,
                    )
        except MissingExtra as error:
            yield rejected("missing_extra", str(error))
        except SidecarError as error:
            yield rejected("wrong_metadata", str(error))


def format_of(path: str) -> str:
    """The suffix that tells a file's format, in lower case: '.txt' for 'README', '.csv' for 'a.csv.gz'."""
    name = inner_name(PurePosixPath(path))
    return ".txt" if name.name.lower() in _PLAIN_NAMES else name.suffix.lower()


def has_rows(file: SourceFile) -> bool:
    """Whether the rows of a file are documents, rather than the file."""
    return file.table is not None or format_of(file.path) in _ROW_FORMATS


def lost(source: Source, files: SourcePartition, cause: str) -> Rejection:
    """The rejection of the one file of `files`, whose reading twice ended its process, as `cause` says."""
    [file] = files.files
    detail = f"reading it ended the process twice, with {cause}, perhaps for lack of memory; split it"
    return Rejection(files.document_id(file), source.uri(file), "too_costly", detail)


def _text_problem(text: str) -> str:
    """Reason code of a text that can't be stored, else ''."""
    if not text.strip():
        return "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "invalid_unicode"
    return ""


def _read_rows(source: Source, file: SourceFile, suffix: str, options: ParseOptions) -> Iterator[Row | BadRow]:
    """The rows of a JSONL, CSV or Parquet file, each with a key that no earlier row of the file has."""
    repeats: dict[str, int] = {}
    is_empty = True
    with _open_rows(source, file, suffix, options) as rows, SpillingSet() as keys:
        for row in _until_broken(rows):
            is_empty = False
            if isinstance(row, BadRow) and row.position and not keys.add(row.key):
                row = replace(row, key=row.position)  # an earlier row has its id
            if isinstance(row, Row) and not keys.add(row.key):
                if row.position:
                    detail = f"its id {row.key!r} was used by an earlier row; ids must be unique"
                    yield BadRow(row.position, "duplicate_id", detail)
                    continue
                text_key, is_new = row.key, False
                while not is_new:  # the key of a row without an id is a hash of its text: number equal texts
                    repeats[text_key] = repeats.get(text_key, 1) + 1
                    row = row.with_key(f"{text_key}.{repeats[text_key]}")
                    is_new = keys.add(row.key)
            yield _from_html(row) if isinstance(row, Row) and options.text_format == "html" else row
    if is_empty:
        yield BadRow("", "empty", "the file has no rows")


@contextlib.contextmanager
def _open_rows(
    source: Source, file: SourceFile, suffix: str, options: ParseOptions
) -> Iterator[Iterator[Row | BadRow]]:
    if file.table is not None:
        yield iter_delta(source.table(file), options)
    else:
        with _open(source, file) as stream:
            yield _ROW_FORMATS[suffix](stream, options)


@contextlib.contextmanager
def _open(source: Source, file: SourceFile) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed."""
    with source.open(file) as stream:
        yield decompressed(stream, PurePosixPath(file.path).suffix, file.size)


def _until_broken(rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    """The rows, and what ended them if their file turns out to be broken."""
    try:
        yield from rows
    except BadRow.Error as error:
        yield error.row


def _from_html(row: Row) -> Row | BadRow:
    """The row with the Markdown of its text, which is HTML."""
    try:
        parsed = parser_process.parse(".html", codecs.BOM_UTF8 + row.text.encode("utf-8", "surrogatepass"))
    except BadRow.Error as error:
        return replace(error.row, key=row.key)
    return replace(row, text=parsed.text, media_type=parsed.media_type, title=row.title or parsed.title)


def _read_whole(source: Source, file: SourceFile, suffix: str, options: ParseOptions) -> Iterator[Row | BadRow]:
    """The one document of a file that is parsed as a whole."""
    try:
        with _open(source, file) as stream:
            data = stream.read(options.max_file_bytes + 1)
    except BadRow.Error as error:
        yield error.row
        return
    if len(data) > options.max_file_bytes:
        yield BadRow(
            "", "too_large", f"over EMBED_MAX_FILE_BYTES={options.max_file_bytes}, though listed with {file.size} bytes"
        )
        return
    if not data.strip():
        yield BadRow("", "empty", f"the file has {len(data)} bytes and no text")
        return
    try:
        if suffix in CODE_FORMATS:
            _require_grammar(suffix)
        if suffix in _TEXT_FORMATS:
            yield _text_row(data, _TEXT_FORMATS[suffix])
        else:
            parsed = parser_process.parse(suffix, data)
            title = parsed.title or _title_of(parsed.text, parsed.media_type)
            asked = {field.name for field in options.metadata}
            known = {name: value for name, value in parsed.properties.items() if name in asked}
            metadata = to_json({**known, **parsed.metadata})
            yield Row("", parsed.text, title, parsed.media_type, len(data), metadata, page_starts=parsed.page_starts)
            yield from parsed.lost
    except Undecodable as error:
        yield BadRow("", "undecodable", str(error))
    except BadRow.Error as error:
        yield error.row


def _require_grammar(suffix: str) -> None:
    """Raise ``MissingExtra`` if source code with this suffix could be split at its functions, but not here."""
    try:
        require_grammar(CODE_FORMATS[suffix])
    except ImportError:
        raise MissingExtra(suffix, "code") from None


def _text_row(data: bytes, media_type: str) -> Row:
    """The document of a text file. Raises ``Undecodable``."""
    text, encoding = decode(data)
    fields, text = split_front_matter(text) if media_type == "text/markdown" else ({}, text)
    has_title = isinstance(fields.get("title"), str | int | float)
    title = " ".join(str(fields.pop("title")).split()) if has_title else _title_of(text, media_type)
    metadata = fields | ({} if encoding == "utf-8" else {"encoding": encoding})
    return Row("", text, title, media_type, len(data), to_json(metadata))


def _title_of(text: str, media_type: str) -> str:
    """The first heading near the document's start, if it is one of the outer two levels; else ''."""
    if is_code(media_type):
        return ""
    headings = find_headings(text[:_TITLE_SEARCH_CHARACTERS], media_type)
    return headings[0].title if headings and headings[0].depth <= 2 else ""
