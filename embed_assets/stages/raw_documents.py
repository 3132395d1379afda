"""Files of a partition -> rows of raw_documents and rejected_documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.parsing import read_documents
from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.errors import SupersededError
from embed_assets.lake.inputs import Inputs
from embed_assets.lake.reader import PartitionState
from embed_assets.lake.tables import RAW, Lake
from embed_assets.lake.writer import Provenance, Replaced, replace_partition
from embed_assets.records import RAW_DOCUMENTS, Document, Rejection, batched_bytes, hash_text
from embed_assets.stages.rejections import Rejections, replace_rejections


@dataclass(frozen=True, slots=True)
class RawDocuments:
    """What reading a partition gave."""

    replaced: Replaced
    documents: int
    rejected: int


def materialize_raw_documents(
    lake: Lake,
    source: Source,
    partition: SourcePartition,
    options: ParseOptions,
    provenance: Provenance,
    known: PartitionState | None = None,
    rewrite: bool = False,
) -> RawDocuments:
    """Read and parse the partition's files; documents go to one table, rejections with their reasons to another.

    `known` is what the table had when the source was listed. Raises ``SupersededError`` when another run replaced
    that since, and the source is no longer as it was listed. `rewrite` commits the rows even if the table seems to
    hold them already.
    """
    rows = Inputs(lake, partition.key, [RAW], [known] if known is not None else [])

    def check() -> None:
        try:
            rows.check()
        except SupersededError:
            if source.partitions().get(partition.key, SourcePartition(partition.key)).version != partition.version:
                raise

    with Rejections(partition.key) as rejections:

        def documents() -> Iterator[Document]:
            for item in read_documents(source, partition, options):
                if isinstance(item, Rejection):
                    rejections.add(item)
                else:
                    yield item

        batches = document_batches(documents(), partition.key)
        replaced = replace_partition(lake, RAW, partition.key, batches, provenance, rewrite=rewrite, check=check)
        own = Inputs(lake, partition.key, [RAW], [replaced.state])
        replace_rejections(lake, partition.key, rejections, provenance, check=own.check)
        return RawDocuments(replaced, replaced.rows, rejections.count)


def document_batches(documents: Iterator[Document], key: str) -> Iterator[pa.RecordBatch]:
    """Rows of raw_documents, a few megabytes of text per batch."""
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
