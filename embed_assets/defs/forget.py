"""Forgets a partition: deletes its rows from every table and its key from Dagster."""

from __future__ import annotations

from dagster import DagsterInstance

from embed_assets.defs.names import Names
from embed_assets.errors import PartitionError
from embed_assets.lake.copies import copies_of, copy_table
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.spaces import space_table
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED
from embed_assets.lake.writer import Provenance
from embed_assets.stages.pipeline import Pipeline


def forget(instance: DagsterInstance, pipeline: Pipeline, key: str) -> int:
    """Delete the partition's rows in all embedding spaces and unregister its key; returns the number of tables changed.

    Old table versions keep the rows until they are vacuumed. Raises ``PartitionError`` if the partition does not exist,
    or if the source has files for it: the next run would bring it back.
    """
    names = Names.of(pipeline)
    pipeline.lake.require_writable()
    pipeline.lake.check_owner()
    files = pipeline.corpus.source.partitions().get(key)
    if files is not None:
        raise PartitionError(
            f"a partition to forget must have no files in the source, {key!r} has {len(files.files)}; "
            f"remove them from {pipeline.corpus.source.root!r} first"
        )
    snapshot, spaces = Snapshot(pipeline.lake), pipeline.lake.spaces()
    copies = [copy_table(space, kind) for space in spaces for kind in copies_of(snapshot, space)]
    tables = [RAW, REJECTED, CHUNK_TABLE, *map(space_table, spaces), *copies]
    partition = snapshot.partition(key)
    for table in tables:
        partition.state(table)  # raises if a table is damaged, before any is changed
    emptied = sum(partition.replace(table, [], Provenance("forget")).is_committed for table in tables)
    registered = key in instance.get_dynamic_partitions(names.partitions_name)
    if registered:
        instance.delete_dynamic_partition(names.partitions_name, key)
    if not registered and not emptied:
        raise PartitionError(f"there is no partition {key!r} in Dagster or the lake; 'embed-assets plan' lists them")
    return emptied
