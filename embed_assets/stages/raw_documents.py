"""Materialize raw_documents and rejected_documents: read and parse the files of a partition."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from embed_assets.corpus.source import SourcePartition
from embed_assets.errors import SupersededError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import RAW
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.records import RAW_DOCUMENTS, Document, Rejection, batched_bytes, hash_text
from embed_assets.stages.corpus import Corpus
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.rejections import Rejections, replace_rejections


def materialize_raw_documents(
    partition: PartitionSnapshot,
    corpus: Corpus,
    files: SourcePartition,
    provenance: Provenance,
    outcome: PartitionOutcome,
) -> Replaced:
    """Read and parse the partition's files and replace its documents and rejections; count both in `outcome`.

    Raises ``SupersededError`` if, since the source was listed, another run replaced the partition's rows and its files
    changed too.
    """

    def check() -> None:
        try:
            partition.require_current(RAW)
        except SupersededError:
            listed = corpus.source.partitions().get(partition.key, SourcePartition(partition.key))
            if listed.version != files.version:
                raise

    with Rejections(partition.key) as rejections:

        def documents() -> Iterator[Document]:
            for item in corpus.documents(files):
                if isinstance(item, Rejection):
                    rejections.add(item)
                else:
                    yield item

        replaced = partition.replace(RAW, document_batches(documents(), partition.key), provenance, check)
        replace_rejections(partition, rejections, provenance, lambda: partition.require_current(RAW))
        outcome.documents, outcome.rejected = replaced.rows, rejections.count
        return replaced


def document_batches(documents: Iterator[Document], key: str) -> Iterator[pa.RecordBatch]:
    """Rows of raw_documents for the partition `key`, in batches of a few megabytes."""
    rows = (
        (
            document.byte_size,
            {
                "partition_key": key,
                "document_id": document.document_id,
                "uri": document.uri,
                "media_type": document.media_type,
                "title": document.title,
                "text": document.text,
                "content_hash": hash_text(document.text),
                "byte_size": document.byte_size,
                "modified_at": document.modified_at,
                "metadata": document.metadata,
            },
        )
        for document in documents
    )
    return batched_bytes(rows, RAW_DOCUMENTS)
