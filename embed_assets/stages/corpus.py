"""Read a corpus: parse the documents of a source and split their texts into chunks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, tee
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from embed_assets.corpus.chunking import ChunkOptions, split_documents
from embed_assets.corpus.code import is_code
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.parsing import read_documents
from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.engine.inputs import ModelInput, hash_input
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.errors import SettingsError
from embed_assets.records import (
    CONTENT_COLUMNS,
    PARSED_DOCUMENTS,
    SPLIT_CHUNKS,
    Chunk,
    Document,
    Rejection,
    chunk_ids,
    grouped_bytes,
    hash_text,
    hashable,
    packed_hashes,
    row_hashes,
)

if TYPE_CHECKING:
    from embed_assets.settings import Settings

_MIN_TEXT_TOKENS = 8
"""Tokens of text that a chunk must have room for. With fewer, a long prompt would split texts into single words."""
_READ_FACTOR = 16
"""Chunks that a sample reads per chunk it returns. More make it more representative, fewer make it faster."""
_MIN_READ_CHUNKS = 8
"""Chunks that a sample reads at least from a partition, so that opening its files is worth it."""
TEXT_COLUMNS = ("document_id", "uri", "title", "media_type", "text", "page_starts")
"""Columns of raw_documents that chunking needs."""
_Identified: TypeAlias = tuple["_Text", Chunk, str, str]
"""(document, chunk, text hash, chunk id)."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A document's values of `TEXT_COLUMNS`."""

    document_id: str
    uri: str
    title: str
    media_type: str
    text: str
    page_starts: Sequence[int] | None
    values: tuple[Any, ...] = field(kw_only=True)
    """Of the fields of metadata that become columns."""

    @property
    def module(self) -> str:
        """What is above the classes and functions of source code: the name of its file; '' for other texts."""
        return PurePosixPath(self.title).stem if is_code(self.media_type) else ""

    def page_of(self, position: int) -> int | None:
        """The page, from 1, that a code point of the text is on; None if the document has no pages."""
        return bisect_right(self.page_starts, position) if self.page_starts else None


@dataclass(frozen=True)
class Corpus:
    """A source of documents with the options that decide how they are parsed and split. Can be pickled."""

    source: Source
    parsing: ParseOptions
    chunking: ChunkOptions
    model_input: ModelInput
    """Chunk sizes are measured in tokens of its tokenizer."""

    @classmethod
    def from_settings(cls, settings: Settings, space: EmbeddingSpace) -> Corpus:
        """The corpus of the settings, split for the model of `space`. Reads nothing. Raises ``SettingsError``."""
        chunking = _chunk_options(settings, space)
        return cls(Source.from_settings(settings), ParseOptions.from_settings(settings), chunking, space.model_input)

    @property
    def fields(self) -> list[pa.Field]:
        """The columns of metadata."""
        return [field.column for field in self.parsing.metadata]

    @property
    def text_columns(self) -> list[str]:
        """Columns of raw_documents that chunking needs."""
        return [*TEXT_COLUMNS, *(field.name for field in self.fields)]

    @property
    def parsed_schema(self) -> pa.Schema:
        """`PARSED_DOCUMENTS` with the columns of metadata."""
        return pa.schema([*PARSED_DOCUMENTS, *self.fields])

    @property
    def split_schema(self) -> pa.Schema:
        """`SPLIT_CHUNKS` with the columns of metadata."""
        return pa.schema([*SPLIT_CHUNKS, *self.fields])

    def documents(self, partition: SourcePartition) -> Iterator[Document | Rejection]:
        """Read and parse the files of a partition; documents that can't be read come as rejections."""
        return read_documents(self.source, partition, self.parsing)

    def chunks(self, documents: Iterable[pa.RecordBatch], key: str) -> Iterator[pa.RecordBatch]:
        """Split documents, given as batches with `text_columns`, into the chunks of the partition `key`, in order.

        Yields batches of a few megabytes with the schema `split_schema`.
        """
        rows, texts = tee(row for batch in documents for row in self._rows_of(batch))
        pairs = ((document.text, document.media_type, document.module) for document in texts)
        split = zip(rows, split_documents(pairs, self.model_input.tokenizer, self.chunking), strict=True)
        identified = ((row, *found) for row, chunks in split for found in _identified(row.document_id, chunks))
        groups = grouped_bytes(identified, lambda found: len(found[1].text))
        return (self._chunk_batch(group, key) for group in groups)

    def parsed(self, partition: SourcePartition) -> Iterator[pa.RecordBatch]:
        """Read and parse the files of a partition: batches with the schema `parsed_schema`."""
        documents = (item for item in self.documents(partition) if isinstance(item, Document))
        groups = grouped_bytes(documents, lambda document: document.byte_size)
        return (self.parsed_batch(group, partition.key) for group in groups)

    def chunks_of(self, partition: SourcePartition) -> Iterator[pa.RecordBatch]:
        """Chunks of a partition, read and split from its source files instead of the lake, as `chunks`."""
        return self.chunks(self.parsed(partition), partition.key)

    def parsed_batch(self, documents: Sequence[Document], key: str) -> pa.RecordBatch:
        """Documents of the partition `key` as a batch with the schema `parsed_schema`."""
        columns: dict[str, Any] = {
            "partition_key": [key] * len(documents),
            "document_id": [document.document_id for document in documents],
            "uri": [document.uri for document in documents],
            "media_type": [document.media_type for document in documents],
            "title": [document.title for document in documents],
            "text": [document.text for document in documents],
            "content_hash": [hash_text(document.text) for document in documents],
            "byte_size": [document.byte_size for document in documents],
            "modified_at": [document.modified_at for document in documents],
            "metadata": [document.metadata for document in documents],
            "file_version": [document.file_version for document in documents],
            "page_starts": [list(document.page_starts) or None for document in documents],
        }
        values = self._columns_of([document.values for document in documents])
        columns |= {"row_hash": _row_hashes("raw_documents", columns, values)} | values
        return pa.RecordBatch.from_pydict(columns, schema=self.parsed_schema)

    def _chunk_batch(self, group: Sequence[_Identified], key: str) -> pa.RecordBatch:
        documents, chunks, text_hashes, ids = zip(*group, strict=True)
        before = [self.model_input.before(d.title, c.heading_path) for d, c in zip(documents, chunks, strict=True)]
        columns: dict[str, Any] = {
            "partition_key": [key] * len(group),
            "chunk_id": ids,
            "document_id": [document.document_id for document in documents],
            "chunk_index": [chunk.chunk_index for chunk in chunks],
            "text": [chunk.text for chunk in chunks],
            "heading_path": [chunk.heading_path for chunk in chunks],
            "char_start": [chunk.char_start for chunk in chunks],
            "char_end": [chunk.char_end for chunk in chunks],
            "token_count": [chunk.token_count for chunk in chunks],
            "text_hash": text_hashes,
            "unknown_tokens": self._unknown_tokens(chunks),
            "page_start": [d.page_of(c.char_start) for d, c in zip(documents, chunks, strict=True)],
            "page_end": [d.page_of(c.char_end - 1) for d, c in zip(documents, chunks, strict=True)],
            "uri": [document.uri for document in documents],
            "title": [document.title for document in documents],
            "before": before,
            "input_hash": [hash_input(b, c.text, h) for b, c, h in zip(before, chunks, text_hashes, strict=True)],
        }
        values = self._columns_of([document.values for document in documents])
        hashes = _row_hashes("chunks", columns, values)
        columns |= {"row_hash": hashes, "input_ids": self._input_ids(before, chunks)} | values
        return pa.RecordBatch.from_pydict(columns, schema=self.split_schema)

    def _columns_of(self, rows: Sequence[tuple[Any, ...]]) -> dict[str, pa.Array]:
        """The columns of metadata, given the values of each row."""
        return {field.name: pa.array([row[i] for row in rows], field.type) for i, field in enumerate(self.fields)}

    def _rows_of(self, batch: pa.RecordBatch) -> Iterator[_Text]:
        columns = [batch.column(name) for name in self.text_columns]
        known = len(TEXT_COLUMNS)
        for i in range(batch.num_rows):  # one at a time: a batch's texts take more memory as Python's than as Arrow's
            values = [column[i].as_py() for column in columns]
            yield _Text(*values[:known], values=tuple(values[known:]))

    def _unknown_tokens(self, chunks: Sequence[Chunk]) -> list[int]:
        unknown = self.model_input.tokenizer.unknown_id
        return [0 if unknown is None else int(np.count_nonzero(c.token_ids == unknown)) for c in chunks]

    def _input_ids(self, before: Sequence[str], chunks: Sequence[Chunk]) -> pa.Array:
        """list<int32>: token ids of the model's input for each chunk; null where only its tokenizer can tell them."""
        first, (_, last) = self.model_input.first_ids(before), self.model_input.tokenizer.added_ids
        known = [(ids, c.token_ids, last) for ids, c in zip(first, chunks, strict=True) if ids is not None]
        is_known = np.array([ids is not None for ids in first])
        offsets = np.zeros(len(first) + 1, np.int32)
        offsets[1:][is_known] = [sum(map(len, parts)) for parts in known]
        np.cumsum(offsets, out=offsets)
        values = np.concatenate([np.empty(0, np.int32), *(part for parts in known for part in parts)])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()), mask=pa.array(~is_known))

    def sample(self, count: int, max_tokens: int | None = None) -> list[str]:
        """Texts of up to `count` chunks (of at most `max_tokens`, if given), deterministic for the same corpus.

        Reads the beginning of the partitions, in the order of their keys' hashes and up to a limit, and returns the
        texts with the smallest hashes.
        """
        if max_tokens is not None:
            return replace(self, chunking=ChunkOptions(max_tokens)).sample(count)
        partitions = sorted(self.source.partitions().values(), key=lambda partition: hash_text(partition.key))
        share = max(_MIN_READ_CHUNKS, _READ_FACTOR * count // max(1, len(partitions)))
        texts: dict[str, str] = {}
        for partition in partitions:
            found = (text for batch in self.chunks_of(partition) for text in batch.column("text").to_pylist())
            texts.update((hash_text(text), text) for text in islice(found, share))
            if len(texts) >= _READ_FACTOR * count:
                break
        return [texts[key] for key in sorted(texts)[:count]]


def _row_hashes(kind: str, columns: Mapping[str, Any], values: Mapping[str, pa.Array]) -> pa.Array:
    """Hashes of the rows of a table of this kind, with the columns of metadata `values`."""
    content = [columns[name] for name in CONTENT_COLUMNS[kind]]
    return packed_hashes(row_hashes([*content, *map(hashable, values.values())]))


def _identified(document_id: str, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, str, str]]:
    """Each chunk of a document with its text hash and its id."""
    hashes = [hash_text(chunk.text) for chunk in chunks]
    yield from zip(chunks, hashes, chunk_ids(document_id, hashes), strict=True)


def _chunk_options(settings: Settings, space: EmbeddingSpace) -> ChunkOptions:
    """Chunk size, by default what fits the model beside its prompt, and overlap. Raises ``SettingsError``."""
    limit = settings.chunk_tokens or space.max_seq_length - space.prompt_tokens
    max_tokens = limit - space.context_tokens
    room = max_tokens - space.tokenizer.special_tokens
    if room < _MIN_TEXT_TOKENS:
        context = f", and the context {space.context_tokens} of them" if space.context else ""
        raise SettingsError(
            f"a chunk needs room for at least {_MIN_TEXT_TOKENS} tokens of text, but of the {limit} tokens of a "
            f"chunk (the model takes {space.max_seq_length}, the prompt {space.prompt_tokens}{context}) special tokens "
            f"leave {room}; shorten EMBED_PROMPT, raise EMBED_CHUNK_TOKENS or unset EMBED_CONTEXT"
        )
    if settings.chunk_overlap_tokens >= room:
        raise SettingsError(
            f"CHUNK_OVERLAP_TOKENS must be smaller than the {room} tokens of text in a chunk of "
            f"CHUNK_TOKENS={limit}, got {settings.chunk_overlap_tokens}; lower EMBED_CHUNK_OVERLAP_TOKENS"
        )
    return ChunkOptions(max_tokens, settings.chunk_overlap_tokens)
