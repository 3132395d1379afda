"""Rows of raw_documents -> rows of chunks."""

from __future__ import annotations

from collections.abc import Iterator

from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.stages.corpus import Corpus, SourceText
from embed_assets.stages.outcome import PartitionOutcome


def materialize_chunks(
    partition: PartitionSnapshot, corpus: Corpus, provenance: Provenance, outcome: PartitionOutcome
) -> Replaced:
    """Split every document that raw_documents has of the partition.

    Raises ``SupersededError`` when another run replaced them meanwhile.
    """
    with partition.watched(RAW):
        batches = corpus.chunks(stored_texts(partition), partition.key)
        replaced = partition.replace(CHUNK_TABLE, batches, provenance, lambda: partition.require_current(RAW))
    outcome.chunks = replaced.rows
    return replaced


def stored_texts(partition: PartitionSnapshot) -> Iterator[SourceText]:
    """The partition's documents as raw_documents has them."""
    for batch in partition.rows(RAW, ["document_id", "text", "media_type"]):
        for i in range(batch.num_rows):
            yield SourceText(*(batch.column(c)[i].as_py() for c in range(3)))
