"""Files to documents: one parser per format, and a reason for every file or row that is not read.

Nothing here raises for a bad document: what can't be read becomes a `Rejection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO

from embed_assets.corpus.apart import parser_process
from embed_assets.corpus.encoding import Undecodable, decode
from embed_assets.corpus.formats import FORMATS, MissingExtra
from embed_assets.corpus.items import BadRow, Row
from embed_assets.corpus.listing import SourceFile
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.rows import iter_csv, iter_jsonl, iter_parquet
from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.corpus.structure import find_structure
from embed_assets.records import Document, Rejection
from embed_assets.scratch import Seen

REASONS: dict[str, str] = {
    "empty": "there is no text in it",
    "too_large": "it is larger than EMBED_MAX_FILE_BYTES",
    "undecodable": "its bytes are no text in any known encoding",
    "invalid_unicode": "its text holds lone surrogates, which no UTF-8 text can",
    "unsupported_format": "its file name ending is none of the supported ones",
    "broken_file": "its format could not be parsed",
    "too_costly": "reading it takes too much time or memory",
    "encrypted": "it is protected by a password",
    "missing_extra": "reading it needs an optional package",
    "invalid_json": "the line is no JSON object",
    "invalid_row": "the row does not fit its table",
    "missing_text": "there is no text column in it",
    "duplicate_id": "an earlier row of the file has the same id",
    "unreadable": "its permissions do not let it be read",
    "symlink_outside": "it is a link that leaves the source",
    "symlink_to_folder": "it is a link to a folder; the folder's files are read at their own place",
    "broken_link": "it is a link to nothing, or to itself",
    "not_a_file": "it is a device, socket or pipe",
}

_ROW_FORMATS: dict[str, tuple[str, Callable[[IO[bytes], ParseOptions], Iterator[Row | BadRow]]]] = {
    ".jsonl": ("application/jsonl", iter_jsonl),
    ".csv": ("text/csv", iter_csv),
    ".parquet": ("application/vnd.apache.parquet", iter_parquet),
}
_TEXT_FORMATS = {".txt": "text/plain", ".md": "text/markdown", ".rst": "text/x-rst"}
SUPPORTED_ENDINGS = tuple(sorted([*_ROW_FORMATS, *_TEXT_FORMATS, *FORMATS]))


def read_documents(source: Source, partition: SourcePartition, options: ParseOptions) -> Iterator[Document | Rejection]:
    """Every document of the partition, or why it is none, in order of the files' paths.

    One file (one row of JSONL, CSV and Parquet) is in memory at a time.
    """
    for file in partition.files:
        yield from _read_file(source, file, partition.document_id(file), options)


def _read_file(
    source: Source, file: SourceFile, document_id: str, options: ParseOptions
) -> Iterator[Document | Rejection]:
    uri = source.uri(file)

    def rejected(reason: str, detail: str = "", row_key: str = "") -> Rejection:
        what = detail or REASONS[reason]
        return Rejection(
            f"{document_id}#{row_key}" if row_key else document_id, uri, reason, " ".join(what.split())[:500]
        )

    ending = PurePosixPath(file.path).suffix.lower()
    is_rows = ending in _ROW_FORMATS
    if file.rejected:
        yield rejected(file.rejected)
    elif ending not in SUPPORTED_ENDINGS:
        yield rejected(
            "unsupported_format",
            f"files named {ending or 'without an ending'} are not read, only {' '.join(SUPPORTED_ENDINGS)}",
        )
    elif file.size > options.max_file_bytes and not is_rows:
        yield rejected("too_large", f"{file.size} bytes, over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
    else:
        read = _read_rows if is_rows else _read_whole
        try:
            for item in read(source, file, ending, options):
                if isinstance(item, BadRow):
                    yield rejected(item.reason, item.detail, item.key)
                elif problem := _problem_of(item.text):
                    yield rejected(problem, row_key=item.key)
                else:
                    yield Document(
                        f"{document_id}#{item.key}" if item.key else document_id,
                        uri,
                        item.media_type,
                        item.title or PurePosixPath(document_id).name,
                        item.text,
                        item.byte_size,
                        file.modified_at,
                        item.metadata,
                    )
        except MissingExtra as error:
            yield rejected("missing_extra", str(error))


def _problem_of(text: str) -> str:
    if not text.strip():
        return "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "invalid_unicode"
    return ""


def _read_rows(source: Source, file: SourceFile, ending: str, options: ParseOptions) -> Iterator[Row | BadRow]:
    """The rows of a table-like file, each with an id that no earlier row of the file has."""
    repeats: dict[str, int] = {}
    is_empty = True
    with source.open(file) as stream, Seen() as keys:
        for row in _ROW_FORMATS[ending][1](stream, options):
            is_empty = False
            if isinstance(row, Row):
                if row.key in keys and row.place:
                    detail = f"its id {row.key!r} was used by an earlier row; ids must be unique"
                    yield BadRow(row.place, "duplicate_id", detail)
                    continue
                text_key = row.key
                while row.key in keys:  # rows without ids are named after their text: equal texts count up
                    repeats[text_key] = repeats.get(text_key, 1) + 1
                    row = row.named(f"{text_key}.{repeats[text_key]}")
                keys.add(row.key)
            yield row
    if is_empty:
        yield BadRow("", "empty", "there are no rows in it")


def _read_whole(source: Source, file: SourceFile, ending: str, options: ParseOptions) -> Iterator[Row | BadRow]:
    """The one document of a file that is read whole."""
    with source.open(file) as stream:
        data = stream.read(options.max_file_bytes + 1)
    if len(data) > options.max_file_bytes:
        yield BadRow("", "too_large", f"over EMBED_MAX_FILE_BYTES={options.max_file_bytes}")
        return
    if not data.strip():
        yield BadRow("", "empty", f"the file has {len(data)} bytes and no text")
        return
    try:
        if ending in _TEXT_FORMATS:
            text, encoding = decode(data)
            metadata = "{}" if encoding == "utf-8" else f'{{"encoding": "{encoding}"}}'
            yield Row("", text, _title_of(text, _TEXT_FORMATS[ending]), _TEXT_FORMATS[ending], len(data), metadata)
        else:
            text, title = parser_process.parse(ending, data)
            yield Row("", text, title, FORMATS[ending][0], len(data))
    except Undecodable as error:
        yield BadRow("", "undecodable", str(error))
    except BadRow.Error as error:
        yield error.row


def _title_of(text: str, media_type: str) -> str:
    """The first heading near the document's beginning, if it is one of the outer two levels."""
    headings = find_structure(text[:4000], media_type).headings
    return headings[0].title if headings and headings[0].depth <= 2 else ""
