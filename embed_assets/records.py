"""The nouns: what a document and a chunk are, the tables' Arrow schemas, ids and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
import pyarrow as pa

T = TypeVar("T")

TIMESTAMP = pa.timestamp("us", "UTC")
VECTOR = pa.list_(pa.field("element", pa.float32()))
"""A list, not a fixed-size list: Delta has no fixed-size type and readers disagree about the remains of one."""


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

CONTENT_COLUMNS: dict[str, tuple[str, ...]] = {
    "raw_documents": (
        "document_id",
        "uri",
        "media_type",
        "title",
        "content_hash",
        "byte_size",
        "metadata",
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
    ),
}
"""Per table, what makes two rows the same: all columns but the times, and but texts and vectors, which have hashes."""

COLUMN_DESCRIPTIONS: dict[str, str] = {
    "partition_key": "the part of the corpus that is rebuilt on its own",
    "document_id": "path inside the partition, plus '#' and the row key for JSONL, CSV and Parquet",
    "uri": "where the document was read",
    "media_type": "MIME type of `text`: HTML and Word documents are kept as text/markdown",
    "title": "the document's own title, else its file name",
    "text": "the text itself",
    "content_hash": "blake2b-128 hex of `text`",
    "byte_size": "size of the source file or row in bytes",
    "modified_at": "modification time of the source file, UTC",
    "metadata": "JSON object: remaining columns of a row, the detected encoding, ...",
    "reason": "short code of why the document was not read",
    "detail": "what was found, and what to do about it",
    "rejected_at": "when it was rejected, UTC",
    "chunk_id": "blake2b-128 hex of (document_id, text_hash, occurrence): survives an insertion above it",
    "chunk_index": "place of the chunk in its document, from 0",
    "heading_path": "headings above the start of the chunk, outermost first, joined by ' > '",
    "char_start": "start of the chunk in the document's text, in code points",
    "char_end": "end of the chunk in the document's text, in code points, exclusive",
    "token_count": "tokens of the embedding model's tokenizer, special tokens included",
    "text_hash": "blake2b-128 hex of the chunk's text",
    "is_truncated": "the model saw only the first tokens of this chunk",
    "input_hash": "blake2b-128 hex of the exact string given to the model, prompt included",
    "embedding": "unit-norm float32 vector",
    "embedded_at": "when the vector was computed, UTC",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One source text with a stable identity."""

    document_id: str
    """Path inside the partition, '/'-separated; plus '#' and the row key for a row of a file."""
    uri: str
    media_type: str
    title: str
    text: str
    byte_size: int
    """Bytes of the source file, or of the row."""
    modified_at: datetime
    metadata: str = "{}"
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A document that could not be read, and why."""

    document_id: str
    uri: str
    reason: str
    """Short code, one of `corpus.parsing.REASONS` or `NOT_EMBEDDABLE`."""
    detail: str
    """What was found and what to do, on one line."""


NOT_EMBEDDABLE = "not_embeddable"
"""Reason code of a document of which the model can't embed a chunk."""


def chunk_detail(space: str, chunk_id: str, reason: str) -> str:
    """The detail of a `NOT_EMBEDDABLE` rejection; `is_chunk_of` and `chunk_of` read it."""
    return f"{space}: chunk {chunk_id}: {reason}"


def is_chunk_of(space: str, detail: str) -> bool:
    """Whether a `NOT_EMBEDDABLE` rejection is of that space: another model may embed the chunk."""
    return detail.startswith(f"{space}: chunk ")


def chunk_of(detail: str) -> str:
    """The id of the chunk that a `NOT_EMBEDDABLE` rejection is about."""
    return detail.partition(": chunk ")[2].partition(":")[0]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous span of one document: ``document.text[char_start:char_end] == text``."""

    chunk_index: int
    """0-based, inside the document."""
    text: str
    heading_path: str
    char_start: int
    """Code points, half-open."""
    char_end: int
    token_count: int
    """Tokens of the model's tokenizer, special tokens included."""


def hash_text(text: str) -> str:
    """blake2b-128 of the UTF-8 bytes, 32 hex characters."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def hash_parts(parts: Iterable[str]) -> str:
    """blake2b-128 hex of a sequence of strings, unambiguous whatever they contain."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def chunk_ids(document_id: str, text_hashes: Sequence[str]) -> list[str]:
    """Ids of a document's chunks, in order: equal texts are told apart by their occurrence, not their place."""
    seen: dict[str, int] = {}
    ids: list[str] = []
    for text_hash in text_hashes:
        occurrence = seen.get(text_hash, 0)
        seen[text_hash] = occurrence + 1
        ids.append(hash_parts((document_id, text_hash, str(occurrence))))
    return ids


_ROW_BYTES = 16


class ContentVersion:
    """The data version of a table's partition: a hash over its rows that does not depend on their order.

    Feed it batches with `add`; 16 bytes per row are kept until `hexdigest`.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = tuple(columns)
        self._rows = bytearray()

    def add(self, batch: pa.RecordBatch) -> None:
        """Count in the rows of `batch`, which must have all the columns."""
        values = [batch.column(name).to_pylist() for name in self._columns]
        for row in zip(*values, strict=True):
            self._rows += hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=_ROW_BYTES).digest()

    def hexdigest(self) -> str:
        """32 hex characters; the version of no rows at all is a constant too."""
        rows = np.frombuffer(self._rows, dtype=f"S{_ROW_BYTES}")
        rows.sort()  # where they lie: a million rows are copied no further
        return hashlib.blake2b(rows.data if len(rows) else b"", digest_size=16).hexdigest()

    @property
    def row_count(self) -> int:
        """Rows counted in so far."""
        return len(self._rows) // _ROW_BYTES


def utc_now() -> datetime:
    """The current time with its zone, as all times in the tables."""
    return datetime.now(UTC)


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in their order, at most `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def batched_bytes(
    items: Iterable[tuple[int, dict[str, object]]], schema: pa.Schema, max_bytes: int = 8 << 20
) -> Iterator[pa.RecordBatch]:
    """Record batches of rows, cut where the rows' sizes (first of each pair, in bytes) add up to `max_bytes`."""
    rows: list[dict[str, object]] = []
    size = 0
    for item_bytes, row in items:
        rows.append(row)
        size += item_bytes + 200
        if size >= max_bytes:
            yield pa.RecordBatch.from_pylist(rows, schema=schema)
            rows, size = [], 0
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=schema)
