"""Compact, vacuum and checkpoint the tables and remove leftovers of killed runs; safe while other runs are active."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from embed_assets.errors import LakeError
from embed_assets.lake.reader import DataFile, files_by_partition
from embed_assets.lake.staging import remove_windows, stale_windows
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, Lake, TableSpec, lake_errors
from embed_assets.lake.writer import TARGET_FILE_BYTES, writer_properties
from embed_assets.locations import local_path
from embed_assets.records import COPY_KINDS, slices, utc_now

RETENTION = timedelta(hours=168)
"""How long unreferenced files are kept for readers and runs that still use them. It is Delta's own default.
Vacuuming files that are younger than the longest run makes the table unreadable once that run commits."""
_CHECKPOINT_COMMITS = 10
"""Commits since the last checkpoint that justify a new one. Fewer mean faster opening, more mean less rewriting."""
_PARTITIONS_PER_COMPACTION = 1000
"""Partitions per compaction commit. More mean fewer commits, but a conflict with another run is more likely."""
_COMPACTION_ATTEMPTS = 5
"""Attempts after conflicts, before the partitions are split into smaller groups."""
_EXPANSION = 8
"""Assumed ratio of a row's size in memory to its compressed size; it keeps row groups small, since readers
hold a whole one. A higher ratio makes them smaller than necessary, a lower one may cost readers memory."""
_ABANDONED = re.compile(r"\.(parquet|json|arrow|crc)#\d+$")
"""Names of temporary files that object_store leaves on a local disk when its process is killed; neither it nor vacuum
removes them: https://github.com/apache/arrow-rs-object-store/issues/137"""
_FOLDERS = ("raw_documents", "rejected_documents", "chunks", "embeddings", "models", "generations", "copies")
"""Folders to sweep. Nothing else below the lake's root belongs to the lake: the documents may be stored there too."""


@dataclass(slots=True)
class TableWork:
    """Maintenance work that a table needs, or that was done."""

    table: str
    partitions_to_compact: int = 0
    """Partitions with more than one small file."""
    files_to_compact: int = 0
    files_to_vacuum: int = 0
    """Files that no version within the retention period refers to."""
    commits_since_checkpoint: int = 0
    stale_windows: int = 0
    """Staged windows left by killed runs."""
    left_alone: int = 0
    """How many of `partitions_to_compact` were skipped because other runs kept writing to them."""
    error: str = ""
    """Why maintenance of the table failed; empty if it did not."""


@dataclass(frozen=True, slots=True)
class Space:
    """An embedding space that has a table."""

    name: str
    bytes: int
    """Size of all files of its table, old versions included."""
    is_current: bool
    """Whether it is in use: by the current settings, by readers, or for a rollback."""


@dataclass(slots=True)
class Maintenance:
    """What there is to do for a lake, or what was done."""

    retention_hours: float
    tables: list[TableWork] = field(default_factory=list)
    abandoned_files: list[str] = field(default_factory=list)
    spaces: list[Space] = field(default_factory=list)
    removed_spaces: list[str] = field(default_factory=list)

    def use_of(self, space: Space) -> str:
        """Status of a space: 'removed', 'in use' or 'not in use'."""
        if space.name in self.removed_spaces:
            return "removed"
        return "in use" if space.is_current else "not in use"

    @property
    def failed(self) -> list[TableWork]:
        """Tables whose maintenance failed."""
        return [work for work in self.tables if work.error]


def maintain(
    lake: Lake,
    in_use: Collection[str],
    retention: timedelta,
    dry_run: bool,
    remove: Sequence[str] = (),
    on_table: Callable[[str], None] = lambda table: None,
) -> Maintenance:
    """Compact, vacuum and checkpoint all tables, and remove leftover files and the spaces named in `remove`.

    With `dry_run` nothing is changed and the result lists what there is to do. The spaces `in_use`
    can't be removed. `retention` is raised to `RETENTION` if it is less, and must be longer than the longest run.
    `on_table` is called with each table's path. Raises ``LakeError`` if a space to remove does not exist or is in use.
    """
    if not dry_run:
        lake.require_writable()
    retention = max(retention, RETENTION)
    spaces = lake.spaces()
    _check_removable(lake, spaces, in_use, remove)
    done = Maintenance(retention.total_seconds() / 3600)
    kept = [space for space in spaces if space not in remove]
    copies = [TableSpec("copies", f"{space}-{kind}") for space in kept for kind in COPY_KINDS]
    for table in (RAW, REJECTED, CHUNK_TABLE, *(TableSpec("embeddings", space) for space in kept), *copies):
        on_table(table.path)
        work = TableWork(table.path)
        try:
            if _maintain_table(lake, table, retention, dry_run, work):
                done.tables.append(work)
        except LakeError as error:
            work.error = str(error)
            done.tables.append(work)
    done.abandoned_files = list(_abandoned_files(lake, retention))
    done.spaces = [Space(space, space_bytes(lake, space), space in in_use) for space in spaces]
    if not dry_run:
        for name in done.abandoned_files:
            Path(name).unlink(missing_ok=True)
        for space in remove:
            remove_space(lake, space)
            done.removed_spaces.append(space)
    return done


def _check_removable(lake: Lake, spaces: Sequence[str], in_use: Collection[str], names: Sequence[str]) -> None:
    for name in names:
        if name in in_use:
            raise LakeError(
                f"a space to remove must not be in use, {name!r} is: it is active, would be after a rollback, or is "
                "that of EMBED_MODEL; see 'embed-assets spaces'"
            )
        if name not in spaces:
            raise LakeError(f"there is no space {name!r} in the lake {lake.root!r}, only {', '.join(spaces) or 'none'}")


def _maintain_table(lake: Lake, table: TableSpec, retention: timedelta, dry_run: bool, work: TableWork) -> bool:
    """Record in `work` what a table needs, and do it unless `dry_run`. Returns False if the table does not exist."""
    delta = lake.open(table)
    if delta is None:
        return False
    small = _small_files(lake, table, delta)
    work.partitions_to_compact, work.files_to_compact = len(small), sum(len(sizes) for sizes in small.values())
    with lake_errors(f"the table {table.path!r} can't be maintained", lake.root):
        work.files_to_vacuum = len(_vacuum(delta, retention, dry_run=True))
    work.commits_since_checkpoint = int(delta.version()) - _last_checkpoint(lake, table)
    windows = stale_windows(lake, table)
    work.stale_windows = len(windows)
    if dry_run:
        return True
    work.left_alone = sum(
        _compact(lake, table, keys, small) for keys in slices(sorted(small), _PARTITIONS_PER_COMPACTION)
    )
    with lake_errors(f"the table {table.path!r} can't be maintained", lake.root):
        delta.update_incremental()
        if work.files_to_vacuum:
            _vacuum(delta, retention, dry_run=False)
        if work.commits_since_checkpoint >= _CHECKPOINT_COMMITS:
            delta.create_checkpoint()
    remove_windows(lake, windows)
    return True


def _small_files(lake: Lake, table: TableSpec, delta: DeltaTable) -> dict[str, list[DataFile]]:
    """The small files of each partition that has more than one, by partition key."""
    found = {
        key: [file for file in files if file.byte_size < TARGET_FILE_BYTES // 2]
        for key, files in files_by_partition(lake.root, table, delta).items()
    }
    return {key: files for key, files in found.items() if len(files) > 1}


def _compact(lake: Lake, table: TableSpec, keys: Sequence[str], small: dict[str, list[DataFile]]) -> int:
    """Merge the partitions' small files. Returns the number of partitions skipped because other runs write to them.

    A concurrent commit to one of the partitions makes the compaction fail, never the other way round, so no rows are
    lost.
    """
    files = [file for key in keys for file in small[key]]
    packed = sum(file.byte_size for file in files) // max(1, sum(file.rows for file in files))
    row_bytes = max(1, _EXPANSION * packed)
    for _ in range(_COMPACTION_ATTEMPTS):
        with lake_errors(f"the table {table.path!r} can't be compacted", lake.root):
            delta = DeltaTable(lake.uri(table), storage_options=lake.options or None)
            try:
                delta.optimize.compact(
                    partition_filters=[("partition_key", "in", list(keys))],
                    target_size=TARGET_FILE_BYTES,
                    writer_properties=writer_properties(table, row_bytes),
                )
            except CommitFailedError:
                continue
            return 0
    if len(keys) == 1:
        return 1
    # Smaller groups conflict with fewer concurrent runs.
    return sum(_compact(lake, table, part, small) for part in slices(keys, max(1, len(keys) // 10)))


def _vacuum(delta: DeltaTable, retention: timedelta, dry_run: bool) -> list[str]:
    """Names of the files that were removed, or would be.

    `full` includes orphans: files of killed runs that no commit refers to. The default mode finds none of them, and
    misses some removed files too: https://github.com/delta-io/delta-rs/issues/3644
    """
    return list(delta.vacuum(retention_hours=int(retention.total_seconds() // 3600), dry_run=dry_run, full=True))


def _last_checkpoint(lake: Lake, table: TableSpec) -> int:
    """Version of the table's newest checkpoint, or 0."""
    try:
        with lake_errors(f"the checkpoint of {table.path!r} can't be read", lake.root):
            return int(json.loads(lake.storage.read(f"{table.path}/_delta_log/_last_checkpoint"))["version"])
    except (LakeError, ValueError, KeyError):
        return 0  # none exists or it is unreadable: create one


def _abandoned_files(lake: Lake, age: timedelta) -> Iterator[str]:
    root = local_path(lake.root)
    if root is None:
        return  # object stores list a file only once it is complete
    before = (utc_now() - age).timestamp()
    walks = (os.walk(root / folder) for folder in _FOLDERS)
    for folder, _, names in itertools.chain.from_iterable(walks):
        for name in names:
            if _ABANDONED.search(name):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # the upload has finished since
                    if path.lstat().st_mtime < before:
                        yield str(path)


def space_bytes(lake: Lake, space: str) -> int:
    """Size of all files of a space's table, old versions included. Raises ``LakeError``."""
    with lake_errors(f"the files of the space {space!r} can't be listed", lake.root):
        return sum(file.size for file in lake.storage.files(f"embeddings/{space}"))


def remove_space(lake: Lake, space: str) -> None:
    """Remove a space's table and the copies made of it. Raises ``LakeError``."""
    lake.require_writable()
    for folder in (f"embeddings/{space}", *(f"copies/{space}-{kind}" for kind in COPY_KINDS)):
        _remove_table(lake, folder)


def _remove_table(lake: Lake, folder: str) -> None:
    """Remove a table, its log first: without a log, leftover data files are not read as a table."""
    with lake_errors(f"the table {folder!r} can't be removed", lake.root):
        for part in (f"{folder}/_delta_log", folder):
            for file in list(lake.storage.files(part)):
                lake.storage.delete(file.path)
        root = local_path(lake.root)
        if root is not None:
            shutil.rmtree(root / folder, ignore_errors=True)
