"""Materialize chunks: commit the split documents of a partition."""

from __future__ import annotations

from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.lake.writer import Provenance, Replaced, rows_in_files
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.preparing import Prepared


def materialize_chunks(
    partition: PartitionSnapshot, prepared: Prepared, provenance: Provenance, outcome: PartitionOutcome
) -> Replaced:
    """Replace the partition's chunks, or those of the changed documents, and count all of them in `outcome`.

    Raises ``SupersededError`` if another run replaced the documents meanwhile, or another ``LakeError`` if a table
    can't be read or written.
    """
    with partition.watched(RAW):
        rows = rows_in_files(partition.lake.full(CHUNK_TABLE), partition.key, prepared.chunks)
        replaced = partition.replace(
            CHUNK_TABLE, rows, provenance, lambda: partition.require_current(RAW), documents=prepared.changed
        )
    outcome.chunks = replaced.rows
    return replaced
