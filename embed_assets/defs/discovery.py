"""What the source has now: registered as partitions, and observed where it changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dagster import DagsterInstance

from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.defs.dagster_internals import register_partitions
from embed_assets.defs.names import SOURCE, Names
from embed_assets.defs.recording import observation
from embed_assets.defs.staleness import History, Record
from embed_assets.errors import SourceError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, TableSpec
from embed_assets.records import slices

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


def list_partitions(instance: DagsterInstance, source: Source, names: Names) -> dict[str, SourcePartition]:
    """All partitions, of the source and registered ones whose files are gone, by key; nothing is recorded."""
    return with_gone_ones(instance, source.partitions(), names)


def with_gone_ones(
    instance: DagsterInstance, listed: dict[str, SourcePartition], names: Names
) -> dict[str, SourcePartition]:
    """The partitions of a listing, and the registered ones that it has not any more."""
    gone = (key for key in instance.get_dynamic_partitions(names.partitions_name) if key not in listed)
    return listed | {key: SourcePartition(key) for key in gone}


def find_orphans(tables: Snapshot, table: TableSpec, known: Collection[str]) -> list[str]:
    """Partitions that the lake has rows of and neither the source nor Dagster knows.

    They are left alone: perhaps it is the source, or the lake, that is the wrong one.
    """
    found = set().union(*(tables.keys(spec) for spec in (RAW, CHUNK_TABLE, table)))
    return sorted(found - set(known))


def refuse_if_emptied(source: Source, is_empty: bool, raw: Mapping[str, Record]) -> None:
    """Raise ``SourceError`` when the source has no file any more, and the lake has documents of it.

    It may be a disk that is not mounted or a bucket emptied by mistake; believed, every partition would be dropped.
    """
    held = sum(bool(record.rows or record.counts.get("rejected")) for record in raw.values()) if is_empty else 0
    if held:
        raise SourceError(
            f"the source {source.root!r} is empty, and {held} partitions hold documents of it; mount or fill it, or, "
            "if all of them are to be dropped, run 'embed-assets sync --allow-empty'",
            is_retryable=True,
        )


def discover(instance: DagsterInstance, partitions: dict[str, SourcePartition], history: History) -> Discovery:
    """Register new partitions and record an observation of each one whose files changed since the last one."""
    names = history.names
    registered = set(instance.get_dynamic_partitions(names.partitions_name))
    added = [key for key in partitions if key not in registered]
    for keys in slices(added, KEYS_PER_ADD):
        register_partitions(instance, names.partitions_name, keys)
    moved = [p for key, p in partitions.items() if history.version(SOURCE, key) != p.version]
    for partition in moved:
        instance.report_runless_asset_event(observation(names, partition))
    changed = [p.key for p in moved if p.files and p.key in registered]
    return Discovery(partitions, added, changed, [p.key for p in moved if not p.files])
