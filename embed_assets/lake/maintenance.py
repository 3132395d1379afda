"""Keeping the tables small and quick: what could be tidied up, and tidying it up, beside any number of running jobs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from embed_assets.records import slices, utc_now
from embed_assets.settings import local_path

RETENTION = timedelta(hours=168)
"""Files that no version needs any more are kept so long: Delta's own default, for readers and runs that use them."""
_CHECKPOINT_COMMITS = 10
_PARTITIONS_PER_COMPACTION = 1000
_COMPACTION_ATTEMPTS = 5
_UNPACKED = 8
"""How much larger rows are when unpacked, at most usually: it bounds what a reader holds."""
_ABANDONED = re.compile(r"\.(parquet|json|arrow|crc)#\d+$")
"""Names of files that were being written to a local disk when their process died; nothing else removes them."""
_FOLDERS = ("raw_documents", "rejected_documents", "chunks", "embeddings", "models")
"""What is ours in the lake's folder; the documents may lie beside it."""


@dataclass(slots=True)
class TableWork:
    """What there is to do for a table, or what was done."""

    table: str
    partitions_to_compact: int = 0
    """Partitions with several small files."""
    files_to_compact: int = 0
    files_to_vacuum: int = 0
    """Files that no version within the retention needs."""
    commits_since_checkpoint: int = 0
    stale_windows: int = 0
    """Staged windows of killed runs."""
    left_alone: int = 0
    """Of `partitions_to_compact`, those that other runs kept writing to."""
    error: str = ""
    """Why the table could not be looked after."""


@dataclass(frozen=True, slots=True)
class Space:
    """An embedding space that has a table."""

    name: str
    bytes: int
    """Of all its files, old versions included."""
    is_current: bool
    """The settings' own."""


@dataclass(slots=True)
class Maintenance:
    """What there is to do for a lake, or what was done."""

    retention_hours: float
    tables: list[TableWork] = field(default_factory=list)
    abandoned_files: list[str] = field(default_factory=list)
    spaces: list[Space] = field(default_factory=list)
    removed_spaces: list[str] = field(default_factory=list)

    def use_of(self, space: Space) -> str:
        """What is, or was, done with a space."""
        if space.name in self.removed_spaces:
            return "removed"
        return "in use" if space.is_current else "not in use"

    @property
    def failed(self) -> list[TableWork]:
        """Tables that could not be looked after."""
        return [work for work in self.tables if work.error]


def maintain(
    lake: Lake,
    current: str,
    retention: timedelta,
    dry_run: bool,
    remove: Sequence[str] = (),
    on_table: Callable[[str], None] = lambda table: None,
) -> Maintenance:
    """Compact, vacuum, checkpoint, sweep, and remove the spaces named in `remove`; with `dry_run` only say what for.

    `current` is the space in use, which can't be removed. `retention` is never less than `RETENTION`, and must be
    longer than the longest run. Raises ``LakeError`` for a space that is not there or in use.
    """
    retention = max(retention, RETENTION)
    spaces = lake.spaces()
    _check_removable(lake, spaces, current, remove)
    done = Maintenance(retention.total_seconds() / 3600)
    kept = [space for space in spaces if space not in remove]
    for table in (RAW, REJECTED, CHUNK_TABLE, *(TableSpec("embeddings", space) for space in kept)):
        on_table(table.path)
        work = TableWork(table.path)
        try:
            if _look_after(lake, table, retention, dry_run, work):
                done.tables.append(work)
        except LakeError as error:
            work.error = str(error)
            done.tables.append(work)
    done.abandoned_files = list(_abandoned_files(lake, retention))
    done.spaces = [Space(space, _size(lake, space), space == current) for space in spaces]
    if not dry_run:
        for name in done.abandoned_files:
            Path(name).unlink(missing_ok=True)
        for space in remove:
            _remove_space(lake, space)
            done.removed_spaces.append(space)
    return done


def _check_removable(lake: Lake, spaces: Sequence[str], current: str, names: Sequence[str]) -> None:
    for name in names:
        if name == current:
            raise LakeError(f"the space {name!r} is in use and can't be removed; change EMBED_MODEL first")
        if name not in spaces:
            raise LakeError(f"there is no space {name!r} in the lake {lake.root!r}, only {', '.join(spaces) or 'none'}")


def _look_after(lake: Lake, table: TableSpec, retention: timedelta, dry_run: bool, work: TableWork) -> bool:
    """Fill in what there is to do for a table, and do it; False when there is no such table."""
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
    """The small files of each partition that has more than one."""
    found = {
        key: [file for file in files if file.byte_size < TARGET_FILE_BYTES // 2]
        for key, files in files_by_partition(lake.root, table, delta).items()
    }
    return {key: files for key, files in found.items() if len(files) > 1}


def _compact(lake: Lake, table: TableSpec, keys: Sequence[str], small: dict[str, list[DataFile]]) -> int:
    """Merge the partitions' small files; returns how many partitions were left alone, since others write to them.

    A commit to one of the partitions meanwhile makes this one fail, never the other way round: rows are not lost.
    """
    files = [file for key in keys for file in small[key]]
    packed = sum(file.byte_size for file in files) // max(1, sum(file.rows for file in files))
    row_bytes = max(1, _UNPACKED * packed)
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
    # The fewer partitions at a time, the fewer others there are to get into the way.
    return sum(_compact(lake, table, part, small) for part in slices(keys, max(1, len(keys) // 10)))


def _vacuum(delta: DeltaTable, retention: timedelta, dry_run: bool) -> list[str]:
    """Files removed, those too that no commit ever named: what runs that died had written."""
    return list(delta.vacuum(retention_hours=int(retention.total_seconds() // 3600), dry_run=dry_run, full=True))


def _last_checkpoint(lake: Lake, table: TableSpec) -> int:
    """Version of the table's newest checkpoint, or 0."""
    try:
        with lake_errors(f"the checkpoint of {table.path!r} can't be read", lake.root):
            return int(json.loads(lake.storage.read(f"{table.path}/_delta_log/_last_checkpoint"))["version"])
    except (LakeError, ValueError, KeyError):
        return 0  # there is none, or none that can be read: one is made


def _abandoned_files(lake: Lake, age: timedelta) -> Iterator[str]:
    root = local_path(lake.root)
    if root is None:
        return  # object stores show no file before it is complete
    before = (utc_now() - age).timestamp()
    walks = (os.walk(root / folder) for folder in _FOLDERS)
    for folder, _, names in itertools.chain.from_iterable(walks):
        for name in names:
            if _ABANDONED.search(name):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                    if path.lstat().st_mtime < before:
                        yield str(path)


def _size(lake: Lake, space: str) -> int:
    with lake_errors(f"the files of the space {space!r} can't be listed", lake.root):
        return sum(file.size for file in lake.storage.files(f"embeddings/{space}"))


def _remove_space(lake: Lake, space: str) -> None:
    """Its log first: a table that is half removed is no table."""
    folder = f"embeddings/{space}"
    with lake_errors(f"the space {space!r} can't be removed", lake.root):
        for part in (f"{folder}/_delta_log", folder):
            for file in list(lake.storage.files(part)):
                lake.storage.delete(file.path)
        root = local_path(lake.root)
        if root is not None:
            shutil.rmtree(root / folder, ignore_errors=True)
