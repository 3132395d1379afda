"""Rows of raw_documents -> rows of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee

import pyarrow as pa

from embed_assets.corpus.chunking import ChunkOptions, Tokenizer, split_documents
from embed_assets.lake.inputs import Inputs
from embed_assets.lake.reader import PartitionState, read_partition
from embed_assets.lake.tables import CHUNK_TABLE, RAW, Lake
from embed_assets.lake.writer import Provenance, Replaced, replace_partition
from embed_assets.records import CHUNKS, batched_bytes, chunk_ids, hash_text


@dataclass(frozen=True, slots=True)
class SourceText:
    """What chunking needs of a document."""

    document_id: str
    text: str
    media_type: str


def materialize_chunks(
    lake: Lake,
    key: str,
    tokenizer: Tokenizer,
    options: ChunkOptions,
    provenance: Provenance,
    known: Sequence[PartitionState] = (),
    rewrite: bool = False,
) -> Replaced:
    """Split every document of the partition, which is in raw_documents as it is `known` to be.

    `rewrite` commits the rows even if the table seems to hold them already.
    Raises ``SupersededError`` when another run replaced them meanwhile.
    """
    documents = Inputs(lake, key, [RAW], known)
    batches = chunk_batches(stored_texts(lake, key), key, tokenizer, options)
    with documents.watched():
        return replace_partition(lake, CHUNK_TABLE, key, batches, provenance, rewrite=rewrite, check=documents.check)


def stored_texts(lake: Lake, key: str) -> Iterator[SourceText]:
    """The partition's documents as raw_documents has them."""
    for batch in read_partition(lake, RAW, key, ["document_id", "text", "media_type"]):
        for i in range(batch.num_rows):
            yield SourceText(*(batch.column(c)[i].as_py() for c in range(3)))


def chunk_batches(
    documents: Iterable[SourceText], key: str, tokenizer: Tokenizer, options: ChunkOptions
) -> Iterator[pa.RecordBatch]:
    """Rows of chunks, document by document, a few megabytes per batch."""
    documents, texts = tee(documents)

    def rows() -> Iterator[tuple[int, dict[str, object]]]:
        split = split_documents(((d.text, d.media_type) for d in texts), tokenizer, options)
        for document, chunks in zip(documents, split, strict=True):
            hashes = [hash_text(chunk.text) for chunk in chunks]
            for chunk, text_hash, chunk_id in zip(chunks, hashes, chunk_ids(document.document_id, hashes), strict=True):
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
