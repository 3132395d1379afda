"""A fixed sample of the chunks that a corpus has: to calibrate, to tune and to benchmark on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from embed_assets.corpus.chunking import ChunkOptions
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.parsing import read_documents
from embed_assets.corpus.source import Source
from embed_assets.engine.tokenization import ModelTokenizer
from embed_assets.records import Document, hash_text
from embed_assets.stages.chunks import SourceText, chunk_batches

_READ_FACTOR = 16
"""So many times the sample's size is read at most, from partitions in the order of their keys' hashes."""


def sample_chunks(
    source: Source, parse: ParseOptions, tokenizer: ModelTokenizer, options: ChunkOptions, count: int
) -> list[str]:
    """Texts of up to `count` chunks, the same ones for the same corpus: those with the smallest hashes of what is read.

    Reads a bounded part of the source, an equal share of each partition as far as that goes.
    """
    partitions = sorted(source.partitions().values(), key=lambda partition: hash_text(partition.key))
    share = max(8, _READ_FACTOR * count // max(1, len(partitions)))
    texts: dict[str, str] = {}
    for partition in partitions:
        documents = (
            SourceText(document.document_id, document.text, document.media_type)
            for document in read_documents(source, partition, parse)
            if isinstance(document, Document)
        )
        for text in islice(_texts(documents, partition.key, tokenizer, options), share):
            texts[hash_text(text)] = text
        if len(texts) >= _READ_FACTOR * count:
            break
    return [texts[key] for key in sorted(texts)[:count]]


def _texts(
    documents: Iterator[SourceText], key: str, tokenizer: ModelTokenizer, options: ChunkOptions
) -> Iterator[str]:
    for batch in chunk_batches(documents, key, tokenizer, options):
        yield from batch.column("text").to_pylist()
