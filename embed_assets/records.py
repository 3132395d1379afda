"""Shared data types: documents and chunks, the tables' Arrow schemas, ids and content hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

T = TypeVar("T")

TIMESTAMP = pa.timestamp("us", "UTC")
VECTOR = pa.list_(pa.field("element", pa.float32()))
"""A list, not a fixed-size list: Delta has no fixed-size type (https://github.com/delta-io/delta-rs/issues/2162),
and some readers fail on files that still carry one (https://github.com/pola-rs/polars/issues/27866)."""


def _schema(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


RAW_DOCUMENTS = _schema(
    ("partition_key", pa.string()),
    ("document_id", pa.string()),
    ("uri", pa.string()),
    ("media_type", pa.string()),
    ("title", pa.string()),
    ("text", pa.string()),
    ("content_hash", pa.string()),
    ("byte_size", pa.int64()),
    ("modified_at", TIMESTAMP),
    ("metadata", pa.string()),
)
FILE_VERSION = pa.field("file_version", pa.string())
PAGE_STARTS = pa.field("page_starts", pa.list_(pa.field("element", pa.int64())))
PAGES = (pa.field("page_start", pa.int32()), pa.field("page_end", pa.int32()))
UNKNOWN_TOKENS = pa.field("unknown_tokens", pa.int32())
ADDED_COLUMNS: dict[str, tuple[pa.Field, ...]] = {
    "raw_documents": (FILE_VERSION, PAGE_STARTS),
    "rejected_documents": (FILE_VERSION,),
    "chunks": (*PAGES, UNKNOWN_TOKENS),
    "embeddings": PAGES,
    "copies": (),
}
"""By table, columns that older versions did not have. They are null in rows written before."""
REJECTED_DOCUMENTS = _schema(
    ("partition_key", pa.string()),
    ("document_id", pa.string()),
    ("uri", pa.string()),
    ("reason", pa.string()),
    ("detail", pa.string()),
    ("rejected_at", TIMESTAMP),
)
CHUNKS = _schema(
    ("partition_key", pa.string()),
    ("chunk_id", pa.string()),
    ("document_id", pa.string()),
    ("chunk_index", pa.int32()),
    ("text", pa.string()),
    ("heading_path", pa.string()),
    ("char_start", pa.int64()),
    ("char_end", pa.int64()),
    ("token_count", pa.int32()),
    ("text_hash", pa.string()),
)
EMBEDDINGS = _schema(
    ("partition_key", pa.string()),
    ("chunk_id", pa.string()),
    ("document_id", pa.string()),
    ("chunk_index", pa.int32()),
    ("uri", pa.string()),
    ("title", pa.string()),
    ("text", pa.string()),
    ("heading_path", pa.string()),
    ("char_start", pa.int64()),
    ("char_end", pa.int64()),
    ("token_count", pa.int32()),
    ("is_truncated", pa.bool_()),
    ("input_hash", pa.string()),
    ("embedding", VECTOR),
    ("embedded_at", TIMESTAMP),
)

COPIES = _schema(
    ("partition_key", pa.string()),
    ("chunk_id", pa.string()),
    ("code", pa.binary()),
    ("scale", pa.float32()),
    ("origin", pa.string()),
)
"""Codes of a space's vectors, as `lake.copies` makes them; `origin` tells of which files of the space they are."""

CopyKind = Literal["binary", "int8"]
COPY_KINDS: tuple[CopyKind, ...] = ("binary", "int8")

SPLIT_CHUNKS = pa.schema(
    [
        *CHUNKS,
        *PAGES,
        UNKNOWN_TOKENS,
        pa.field("uri", pa.string(), False),
        pa.field("title", pa.string(), False),
        pa.field("before", pa.string(), False),
        pa.field("input_hash", pa.string(), False),
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("row_hash", pa.binary(16), False),
    ]
)
"""Chunks just split, with what embedding them needs: uri and title of their document, what is before the text in the
model's input, the input's hash and token ids (null where only its tokenizer can tell them), and the hash of their row
in the table of chunks."""
REJECTED_ROWS = pa.schema([*REJECTED_DOCUMENTS, FILE_VERSION])
"""Rows of rejected_documents."""
PARSED_DOCUMENTS = pa.schema([*RAW_DOCUMENTS, FILE_VERSION, PAGE_STARTS, pa.field("row_hash", pa.binary(16), False)])
"""Documents just parsed, each with the hash of its row."""

CONTENT_COLUMNS: dict[str, tuple[str, ...]] = {
    "raw_documents": (
        "document_id",
        "uri",
        "media_type",
        "title",
        "content_hash",
        "byte_size",
        "metadata",
        "page_starts",
    ),
    "rejected_documents": ("document_id", "uri", "reason", "detail"),
    "chunks": (
        "chunk_id",
        "document_id",
        "chunk_index",
        "heading_path",
        "char_start",
        "char_end",
        "token_count",
        "text_hash",
        "page_start",
        "page_end",
    ),
    "embeddings": (
        "chunk_id",
        "document_id",
        "chunk_index",
        "uri",
        "title",
        "heading_path",
        "char_start",
        "char_end",
        "token_count",
        "is_truncated",
        "input_hash",
        "page_start",
        "page_end",
    ),
    "copies": ("chunk_id", "origin"),
}
"""Per table, the columns that decide whether two rows are equal: all except times, texts and vectors. Texts and vectors
are represented by their hashes. Those that can be null stand last, see `row_hashes`."""

COLUMN_DESCRIPTIONS: dict[str, str] = {
    "partition_key": "the part of the corpus that is materialized as a unit",
    "document_id": "path inside the partition, plus '#' and the row key for JSONL, CSV and Parquet",
    "uri": "where the document was read from",
    "media_type": "MIME type of `text`: HTML and Word documents are kept as text/markdown",
    "title": "the document's own title, else its file name",
    "text": "the text itself",
    "content_hash": "blake2b-128 hex of `text`",
    "byte_size": "size of the source file or row in bytes",
    "modified_at": "modification time of the source file, UTC",
    "metadata": "JSON object: remaining columns of a row, the detected encoding, ...",
    "file_version": "size and checksum or modification time of the source file when it was read; null if it has none",
    "page_starts": "for a document with pages, the code points of `text` where they start; else null",
    "page_start": "the page that the chunk begins on, from 1; null for documents without pages",
    "page_end": "the page that the chunk ends on; null for documents without pages",
    "reason": "short code for why the document was rejected",
    "detail": "what was found, and how to fix it",
    "rejected_at": "when it was rejected, UTC",
    "chunk_id": "blake2b-128 hex of (document_id, text_hash, occurrence): stable when text is inserted above",
    "chunk_index": "position of the chunk in its document, from 0",
    "heading_path": "headings above the chunk's text, outermost first, joined by ' > '",
    "char_start": "start of the chunk in the document's text, in code points",
    "char_end": "end of the chunk in the document's text, in code points, exclusive",
    "token_count": "length in tokens of the embedding model's tokenizer, special tokens included",
    "unknown_tokens": "tokens of the chunk that the model's tokenizer has no word for; null if it was not counted",
    "text_hash": "blake2b-128 hex of the chunk's text",
    "is_truncated": "the model saw only the first tokens of this chunk",
    "input_hash": "blake2b-128 hex of the exact string given to the model, prompt and context included",
    "embedding": "unit-norm float32 vector",
    "embedded_at": "when the vector was computed, UTC",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One source text with a stable id."""

    document_id: str
    """Path inside the partition, '/'-separated, plus '#' and the row key if the document is one row of a file."""
    uri: str
    media_type: str
    title: str
    text: str
    byte_size: int
    """Size of the source file, or of the row, in bytes."""
    modified_at: datetime
    metadata: str = "{}"
    """JSON object, as text."""
    file_version: str | None = None
    """Tells whether the file changed since it was read; None if that can't be told."""
    page_starts: tuple[int, ...] = ()
    """The code points where the pages of a document with pages start."""
    values: tuple[Any, ...] = ()
    """Of each field of metadata that becomes a column, the value; None where the document has none."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A document that could not be read, and why."""

    document_id: str
    uri: str
    reason: str
    """Short code, one of `corpus.parsing.REASONS` or `NOT_EMBEDDABLE`."""
    detail: str
    """What was found and how to fix it, on one line."""
    file_version: str | None = None
    """As that of a `Document`."""


def rejection_batch(rejections: Sequence[Rejection], key: str, when: datetime) -> pa.RecordBatch:
    """Rows of rejected_documents for the partition `key`."""
    columns = {
        "partition_key": [key] * len(rejections),
        "document_id": [rejection.document_id for rejection in rejections],
        "uri": [rejection.uri for rejection in rejections],
        "reason": [rejection.reason for rejection in rejections],
        "detail": [rejection.detail for rejection in rejections],
        "rejected_at": [when] * len(rejections),
        "file_version": [rejection.file_version for rejection in rejections],
    }
    return pa.RecordBatch.from_pydict(columns, schema=REJECTED_ROWS)


NOT_EMBEDDABLE = "not_embeddable"
"""Reason code for a document with a chunk that the model can't embed."""


def chunk_detail(space: str, chunk_id: str, reason: str) -> str:
    """The `detail` of a `NOT_EMBEDDABLE` rejection, in the format that `is_chunk_of` and `chunk_of` parse."""
    return f"{space}: chunk {chunk_id}: {reason}"


def is_chunk_of(space: str, detail: str) -> bool:
    """Whether a `NOT_EMBEDDABLE` rejection is from `space`: another model may be able to embed the chunk."""
    return detail.startswith(f"{space}: chunk ")


def chunk_of(detail: str) -> str:
    """The chunk id in the `detail` of a `NOT_EMBEDDABLE` rejection."""
    return detail.partition(": chunk ")[2].partition(":")[0]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous span of one document: ``document.text[char_start:char_end] == text``."""

    chunk_index: int
    """0-based position inside the document."""
    text: str
    heading_path: str
    char_start: int
    """Start of the span, in code points."""
    char_end: int
    """End of the span, in code points, exclusive."""
    token_count: int
    """Length in tokens of the model's tokenizer, special tokens included."""
    token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32), compare=False, repr=False)
    """int32: its tokens, without special ones."""


def hash_text(text: str) -> str:
    """blake2b-128 of the text's UTF-8 bytes, as 32 hex characters."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def hash_parts(parts: Iterable[str]) -> str:
    """blake2b-128 of a sequence of strings, as 32 hex characters. It includes their lengths, so that ('ab',) and
    ('a', 'b') differ."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def chunk_ids(document_id: str, text_hashes: Sequence[str]) -> list[str]:
    """Ids of a document's chunks, in order. Equal texts are distinguished by occurrence number, not position."""
    seen: dict[str, int] = {}
    ids: list[str] = []
    for text_hash in text_hashes:
        occurrence = seen.get(text_hash, 0)
        seen[text_hash] = occurrence + 1
        ids.append(hash_parts((document_id, text_hash, str(occurrence))))
    return ids


_ROW_BYTES = 16
"""Digest size per row: 128 bits make accidental collisions negligible."""


def row_hashes(columns: Sequence[Sequence[object]]) -> bytes:
    """blake2b-128 of each row of the given columns' values, end to end.

    Nulls at the end of a row do not count, so that rows from before a column was added keep their hashes.
    """
    blake2b = hashlib.blake2b
    filled = len(columns)
    while filled and all(value is None for value in columns[filled - 1]):
        filled -= 1
    rows: Iterable[tuple[object, ...]] = zip(*columns[:filled], strict=True)
    if any(value is None for value in (columns[filled - 1] if filled else ())):
        rows = (_without_last_nulls(row) for row in rows)
    return b"".join(
        blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=_ROW_BYTES).digest() for row in rows
    )


def _without_last_nulls(row: tuple[object, ...]) -> tuple[object, ...]:
    end = len(row)
    while end and row[end - 1] is None:
        end -= 1
    return row[:end]


def hashable(column: pa.Array) -> list[object]:
    """A column's values for `row_hashes`: times as numbers, since their text depends on the libraries installed."""
    return list((column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist())


def packed_hashes(hashes: bytes) -> pa.FixedSizeBinaryArray:
    """128-bit hashes, end to end, as an Arrow array."""
    count = len(hashes) // _ROW_BYTES
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(_ROW_BYTES), count, [None, pa.py_buffer(hashes)])


class ContentVersion:
    """The data version of a partition: the number of its rows and the sum of their hashes, in any order.

    A sum, so that the version of a changed partition follows from that of before and the rows that came and went.
    """

    def __init__(self, columns: Sequence[str], version: str | None = None) -> None:
        """Of no rows, or as `version` says. Rows are hashed by `columns`."""
        self._columns = tuple(columns)
        self.row_count, self._sum = 0, np.zeros(_ROW_BYTES // 8, np.uint64)
        if version is not None:
            rows, _, digits = version.partition("-")
            self.row_count, self._sum = int(rows), np.frombuffer(bytes.fromhex(digits), "<u8").copy()

    @staticmethod
    def can_continue(version: str) -> bool:
        """Whether a recorded version is such a sum: versions before 0.2 recorded a hash of all rows."""
        return "-" in version

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the rows of `batch`, which has all the columns or, already computed, `row_hash`."""
        self.row_count += batch.num_rows
        self._sum += self._hashes(batch).sum(axis=0)  # each half modulo 2^64

    def remove(self, batch: pa.RecordBatch) -> None:
        """Take out rows that are included."""
        self.row_count -= batch.num_rows
        self._sum -= self._hashes(batch).sum(axis=0)

    def text(self) -> str:
        """'<rows>-<32 hex digits>'."""
        return f"{self.row_count}-{self._sum.astype('<u8').tobytes().hex()}"

    def _hashes(self, batch: pa.RecordBatch) -> np.ndarray:
        """uint64, shape (rows, 2)."""
        return np.frombuffer(hashes_of(batch, self._columns), "<u8").reshape(-1, _ROW_BYTES // 8)


def hashes_of(batch: pa.RecordBatch, columns: Sequence[str]) -> bytes:
    """128-bit hash of each row, end to end: as the batch's column `row_hash` has them, else computed from `columns`."""
    if "row_hash" not in batch.schema.names:
        return row_hashes([hashable(batch.column(name)) for name in columns])
    hashes = batch.column("row_hash")
    start = hashes.offset * _ROW_BYTES
    return memoryview(hashes.buffers()[1])[start : start + len(hashes) * _ROW_BYTES].tobytes()


class SortedContentVersion:
    """The data version of a partition as versions before 0.2 recorded it: a hash over its rows' sorted hashes."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = tuple(columns)
        self._rows = bytearray()

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the rows of `batch`."""
        self._rows += hashes_of(batch, self._columns)

    def text(self) -> str:
        """32 hex digits."""
        rows = np.frombuffer(self._rows, dtype=f"S{_ROW_BYTES}")
        rows.sort()
        return hashlib.blake2b(rows.data if len(rows) else b"", digest_size=16).hexdigest()


def utc_now() -> datetime:
    """The current time in UTC, timezone-aware like all times in the tables."""
    return datetime.now(UTC)


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of `items` with at most `size` items each."""
    return (items[start : start + size] for start in range(0, len(items), size))


_ROW_OVERHEAD_BYTES = 200
"""Rough size of a row's ids, hashes and numbers, so that groups of many short texts stay bounded too."""


def grouped_bytes(items: Iterable[T], size_of: Callable[[T], int], max_bytes: int = 4 << 20) -> Iterator[list[T]]:
    """Consecutive groups of rows of about `max_bytes`, whose texts have `size_of(item)` bytes.

    The default of 4 MiB trades memory per group against overhead per group.
    """
    group: list[T] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item) + _ROW_OVERHEAD_BYTES
        if size >= max_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group
