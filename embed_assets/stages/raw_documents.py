"""Materialize raw_documents and rejected_documents: commit what was read from the files of a partition."""

from __future__ import annotations

from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.errors import SupersededError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import RAW
from embed_assets.lake.writer import Provenance, Replaced, rows_in_files
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.preparing import Prepared
from embed_assets.stages.rejections import Rejections, UnreadFiles, replace_rejections


def materialize_raw_documents(
    partition: PartitionSnapshot,
    prepared: Prepared,
    source: Source,
    files: SourcePartition,
    provenance: Provenance,
    outcome: PartitionOutcome,
) -> Replaced:
    """Replace the partition's documents and rejections by those read from `files`; count both in `outcome`.

    Those of files that did not change stay, if `prepared` is without them.

    Raises ``SupersededError`` if, since the source was listed, another run replaced the partition's rows and its files
    changed too.
    """

    def check() -> None:
        try:
            partition.require_current(RAW)
        except SupersededError:
            listed = source.partitions().get(partition.key, SourcePartition(partition.key))
            if listed.version != files.version:
                raise

    with Rejections(partition.key) as rejections:
        for file in prepared.rejections:
            for batch in file:
                rejections.add_batch(batch)
        rows, changes = rows_in_files(partition.lake.full(RAW), partition.key, prepared.documents), prepared.changes
        replaced = partition.replace(RAW, rows, provenance, check, documents=prepared.read)
        own = UnreadFiles(changes.rejected if changes else frozenset())
        kept = replace_rejections(partition, rejections, own, provenance, lambda: partition.require_current(RAW))
        outcome.documents, outcome.rejected = replaced.rows, rejections.count + kept
        return replaced
