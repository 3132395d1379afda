"""Discovery: registers the source's partitions with Dagster and records an observation of each that changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from dagster import DagsterInstance

from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.defs.dagster_internals import register_partitions
from embed_assets.defs.names import SOURCE, Names
from embed_assets.defs.recording import observation
from embed_assets.defs.staleness import History, Record
from embed_assets.defs.storage import kept_open
from embed_assets.errors import SourceError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, TableSpec
from embed_assets.records import slices

KEYS_PER_ADD = 10_000
"""Dagster binds a variable per key and SQLite takes 32,766: https://github.com/dagster-io/dagster/issues/16260"""


@dataclass(frozen=True, slots=True)
class Discovery:
    """The result of listing the source."""

    partitions: dict[str, SourcePartition]
    """All partitions by key; one without files is empty."""
    added: list[str]
    """Keys that were not registered yet."""
    changed: list[str]
    """Registered keys whose files changed."""
    emptied: list[str]
    """Keys that have no files any more."""


def list_partitions(instance: DagsterInstance, source: Source, names: Names) -> dict[str, SourcePartition]:
    """The partitions of the source and the registered ones without files, by key; records nothing."""
    return with_emptied_partitions(instance, source.partitions(), names)


def with_emptied_partitions(
    instance: DagsterInstance, listed: dict[str, SourcePartition], names: Names
) -> dict[str, SourcePartition]:
    """Add to a listing, as empty partitions, the registered ones whose files are gone."""
    emptied = (key for key in instance.get_dynamic_partitions(names.partitions_name) if key not in listed)
    return listed | {key: SourcePartition(key) for key in emptied}


def find_orphans(tables: Snapshot, table: TableSpec, known: Collection[str]) -> list[str]:
    """Orphans: sorted keys of partitions with rows in the lake that are not among the `known` keys.

    They are reported and never dropped, because the source or the lake may be misconfigured.
    """
    found = set().union(*(tables.keys(spec) for spec in (RAW, CHUNK_TABLE, table)))
    return sorted(found - set(known))


def refuse_if_emptied(source: Source, is_empty: bool, raw: Mapping[str, Record]) -> None:
    """Raise ``SourceError`` if the source is empty but the lake holds documents, by the records of `raw`.

    It may be a disk that is not mounted or a bucket emptied by mistake, and a run would drop every partition.
    """
    held = sum(bool(record.rows or record.counts.get("rejected")) for record in raw.values()) if is_empty else 0
    if held:
        raise SourceError(
            f"the source {source.root!r} is empty, and {held} partitions hold documents of it; mount or fill it, or "
            "run 'embed-assets sync --allow-empty' to drop all of them",
            is_retryable=True,
        )


def discover(
    instance: DagsterInstance,
    partitions: dict[str, SourcePartition],
    history: History,
    on_progress: Callable[[str, float], None] = lambda line, share: None,
) -> Discovery:
    """Register new partitions, and observe those whose files changed since their last observation.

    An observation takes about 10 ms on SQLite; `on_progress` is called with a line and the share done after each.
    """
    names = history.names
    registered = set(instance.get_dynamic_partitions(names.partitions_name))
    added = [key for key in partitions if key not in registered]
    for keys in slices(added, KEYS_PER_ADD):
        register_partitions(instance, names.partitions_name, keys)
    moved = [p for key, p in partitions.items() if history.version(SOURCE, key) != p.version]
    with kept_open(instance):
        for done, partition in enumerate(moved, 1):
            instance.report_runless_asset_event(observation(names, partition))
            on_progress(f"{done:,} of {len(moved):,} new or changed partitions recorded", done / len(moved))
    changed = [p.key for p in moved if p.files and p.key in registered]
    return Discovery(partitions, added, changed, [p.key for p in moved if not p.files])
