"""What the source has now: registered as partitions, and observed where it changed."""

from __future__ import annotations

from dataclasses import dataclass

from dagster import DagsterInstance

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.names import SOURCE, Names
from embed_assets.defs.recording import observation
from embed_assets.defs.staleness import History
from embed_assets.lake.reader import partition_keys
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.records import slices
from embed_assets.stages.pipeline import Pipeline

KEYS_PER_ADD = 10_000
"""Dagster's SQLite storage fails on more variables in one statement."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """What listing the source showed."""

    partitions: dict[str, SourcePartition]
    """Every registered partition; those without files are empty."""
    added: list[str]
    changed: list[str]
    emptied: list[str]


def list_partitions(
    instance: DagsterInstance, pipeline: Pipeline, with_lake: bool = True
) -> dict[str, SourcePartition]:
    """All partitions by key, of the source, and those whose files are gone: registered ones, and (`with_lake`) ones
    that Dagster has forgotten but the lake still has rows of. Nothing is recorded."""
    listed = pipeline.source.partitions()
    known = set(instance.get_dynamic_partitions(Names.of(pipeline).partitions_name))
    tables = (RAW, CHUNK_TABLE, pipeline.embeddings_table) if with_lake else ()
    known.update(*(partition_keys(pipeline.lake, table) for table in tables))
    return listed | {key: SourcePartition(key) for key in sorted(known - listed.keys())}


def discover(instance: DagsterInstance, partitions: dict[str, SourcePartition], history: History) -> Discovery:
    """Register new partitions and record an observation of each one whose files changed since the last one."""
    names = history.names
    registered = set(instance.get_dynamic_partitions(names.partitions_name))
    added = [key for key in partitions if key not in registered]
    for keys in slices(added, KEYS_PER_ADD):
        instance.add_dynamic_partitions(names.partitions_name, keys)
    moved = [p for key, p in partitions.items() if history.version(SOURCE, key) != p.version]
    for partition in moved:
        instance.report_runless_asset_event(observation(names, partition))
    changed = [p.key for p in moved if p.files and p.key in registered]
    return Discovery(partitions, added, changed, [p.key for p in moved if not p.files])
