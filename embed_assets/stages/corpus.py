"""Read a corpus: parse the documents of a source and split their texts into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, tee

import pyarrow as pa

from embed_assets.corpus.chunking import ChunkOptions, split_documents
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.parsing import read_documents
from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.engine.tokenization import ModelTokenizer
from embed_assets.errors import SettingsError
from embed_assets.records import CHUNKS, Document, Rejection, batched_bytes, chunk_ids, hash_text
from embed_assets.settings import Settings

_MIN_TEXT_TOKENS = 8
"""Tokens of text that a chunk must have room for. With fewer, a long prompt would split texts into single words."""
_READ_FACTOR = 16
"""Chunks that a sample reads per chunk it returns. More make it more representative, fewer make it faster."""
_MIN_READ_CHUNKS = 8
"""Chunks that a sample reads at least from a partition, so that opening its files is worth it."""


@dataclass(frozen=True, slots=True)
class SourceText:
    """The parts of a document that chunking needs."""

    document_id: str
    text: str
    media_type: str


@dataclass(frozen=True)
class Corpus:
    """A source of documents with the options that decide how they are parsed and split."""

    source: Source
    parsing: ParseOptions
    chunking: ChunkOptions
    tokenizer: ModelTokenizer
    """The model's tokenizer: chunk sizes are measured in its tokens."""

    @classmethod
    def from_settings(cls, settings: Settings, space: EmbeddingSpace) -> Corpus:
        """The corpus of the settings, split for the model of `space`. Reads nothing. Raises ``SettingsError``."""
        chunking = _chunk_options(settings, space)
        return cls(Source.from_settings(settings), ParseOptions.from_settings(settings), chunking, space.tokenizer)

    def documents(self, partition: SourcePartition) -> Iterator[Document | Rejection]:
        """Read and parse the files of a partition; documents that can't be read come as rejections."""
        return read_documents(self.source, partition, self.parsing)

    def chunks(self, documents: Iterable[SourceText], key: str) -> Iterator[pa.RecordBatch]:
        """Rows of the chunks table for the partition `key`, in document order, in batches of a few megabytes."""
        documents, texts = tee(documents)

        def rows() -> Iterator[tuple[int, dict[str, object]]]:
            split = split_documents(((d.text, d.media_type) for d in texts), self.tokenizer, self.chunking)
            for document, chunks in zip(documents, split, strict=True):
                hashes = [hash_text(chunk.text) for chunk in chunks]
                ids = chunk_ids(document.document_id, hashes)
                for chunk, text_hash, chunk_id in zip(chunks, hashes, ids, strict=True):
                    yield (
                        len(chunk.text) + len(chunk.heading_path),
                        {
                            "partition_key": key,
                            "chunk_id": chunk_id,
                            "document_id": document.document_id,
                            "chunk_index": chunk.chunk_index,
                            "text": chunk.text,
                            "heading_path": chunk.heading_path,
                            "char_start": chunk.char_start,
                            "char_end": chunk.char_end,
                            "token_count": chunk.token_count,
                            "text_hash": text_hash,
                        },
                    )

        return batched_bytes(rows(), CHUNKS)

    def chunks_of(self, partition: SourcePartition) -> Iterator[pa.RecordBatch]:
        """Rows of the chunks table for a partition, read and split from its source files instead of the lake."""
        documents = (
            SourceText(item.document_id, item.text, item.media_type)
            for item in self.documents(partition)
            if isinstance(item, Document)
        )
        return self.chunks(documents, partition.key)

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


def _chunk_options(settings: Settings, space: EmbeddingSpace) -> ChunkOptions:
    """Chunk size, by default what fits the model beside its prompt, and overlap. Raises ``SettingsError``."""
    fits = space.max_seq_length - space.prompt_tokens
    max_tokens = settings.chunk_tokens or fits
    room = max_tokens - space.tokenizer.special_tokens
    if room < _MIN_TEXT_TOKENS:
        raise SettingsError(
            f"a chunk needs room for at least {_MIN_TEXT_TOKENS} tokens of text, but of the {max_tokens} tokens of a "
            f"chunk (the model takes {space.max_seq_length}, the prompt {space.prompt_tokens}) special tokens leave "
            f"{room}; shorten EMBED_PROMPT or raise EMBED_CHUNK_TOKENS"
        )
    if settings.chunk_overlap_tokens >= room:
        raise SettingsError(
            f"CHUNK_OVERLAP_TOKENS must be smaller than the {room} tokens of text in a chunk of "
            f"CHUNK_TOKENS={max_tokens}, got {settings.chunk_overlap_tokens}; lower EMBED_CHUNK_OVERLAP_TOKENS"
        )
    return ChunkOptions(max_tokens, settings.chunk_overlap_tokens)
