"""Diagnose a damaged Delta log: one that delta-rs can't open, or silently opens at an older state."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator

import pyarrow.parquet as pq

from embed_assets.lake.storage import Storage

_COMMIT = re.compile(r"(\d{20})\.json$")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint.*\.parquet$")
_REMEDY = "restore it from a backup, or move the table's folder away and sync, which rebuilds the table"


def diagnose_log(storage: Storage, table: str) -> str:
    """The first problem in a table's log: the file, what is wrong and how to fix it. '' if there is none.

    Reads the whole log, so call it only after opening the table failed.
    """
    return next(_problems(storage, table, is_thorough=True), "")


def find_empty_commit(storage: Storage, table: str) -> str:
    """The first empty commit file in a table's log and how to fix it, or ''. Needs only a listing.

    Delta's libraries read an empty file as a commit without changes, and so return outdated rows without an error:
    https://github.com/delta-io/delta-kernel-rs/issues/2358
    """
    return next(_problems(storage, table, is_thorough=False), "")


def has_orphaned_data(storage: Storage, table: str) -> bool:
    """Whether the table's folder has data files but no log that refers to them."""
    names = [file.path for file in storage.files(table) if "/_staging/" not in file.path]
    return any(name.endswith(".parquet") for name in names) and not any("/_delta_log/" in name for name in names)


def _problems(storage: Storage, table: str, is_thorough: bool) -> Iterator[str]:
    folder = f"{table}/_delta_log"
    files = sorted(storage.files(folder), key=lambda file: file.path)
    commits = {int(found[1]): file for file in files if (found := _COMMIT.search(file.path))}
    checkpoints = {int(found[1]): file for file in files if (found := _CHECKPOINT.search(file.path))}
    for file in commits.values():
        if file.size == 0:
            yield f"{file.path!r} is empty, as after a power cut; {_REMEDY}"
    if not is_thorough:
        return
    for file in commits.values():
        try:
            for line in storage.read(file.path).decode("utf-8").splitlines():
                json.loads(line)
        except ValueError as error:
            yield f"{file.path!r} is damaged ({error}); {_REMEDY}"
    for file in checkpoints.values():
        try:
            pq.ParquetFile(io.BytesIO(storage.read(file.path)))
        except Exception as error:
            yield f"{file.path!r} is damaged ({error}); {_REMEDY}"
    first = max((version for version in checkpoints if version <= max(commits, default=-1)), default=0)
    for version in range(first, max(commits, default=-1)):
        if version not in commits and version not in checkpoints:
            yield f"'{folder}/{version:020}.json' is missing; {_REMEDY}"
