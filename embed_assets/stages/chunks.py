"""Materialize chunks: split the rows of raw_documents."""

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
    """Split the partition's rows of raw_documents, replace its chunks and count them in `outcome`.

    Raises ``SupersededError`` if another run replaced the documents meanwhile, or another ``LakeError`` if a table
    can't be read or written.
    """
    with partition.watched(RAW):
        batches = corpus.chunks(stored_texts(partition), partition.key)
        replaced = partition.replace(CHUNK_TABLE, batches, provenance, lambda: partition.require_current(RAW))
    outcome.chunks = replaced.rows
    return replaced


def stored_texts(partition: PartitionSnapshot) -> Iterator[SourceText]:
    """The partition's documents, read from raw_documents."""
    for batch in partition.rows(RAW, ["document_id", "text", "media_type"]):
        for i in range(batch.num_rows):
            yield SourceText(*(batch.column(c)[i].as_py() for c in range(3)))
