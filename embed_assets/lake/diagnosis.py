"""What is wrong with a table that Delta's library can't open, or opens as something it is not."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator

import pyarrow.parquet as pq

from embed_assets.lake.storage import Storage

_COMMIT = re.compile(r"(\d{20})\.json$")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint.*\.parquet$")
_WAY_OUT = "restore it from a backup, or move the table's folder away and sync, which makes it anew"


def diagnose_log(storage: Storage, table: str) -> str:
    """The first thing that is wrong with a table's log, naming the file and the way out; '' when nothing is.

    Reads the whole log, so it is for tables that made trouble.
    """
    return next(_problems(storage, table, is_thorough=True), "")


def find_empty_commit(storage: Storage, table: str) -> str:
    """The same for what a listing shows. Delta's library takes an empty entry for a commit without changes, and
    rows of before for the newest."""
    return next(_problems(storage, table, is_thorough=False), "")


def has_orphaned_data(storage: Storage, table: str) -> bool:
    """There are data files, and no log that says what they are."""
    names = [file.path for file in storage.files(table) if "/_staging/" not in file.path]
    return any(name.endswith(".parquet") for name in names) and not any("/_delta_log/" in name for name in names)


def _problems(storage: Storage, table: str, is_thorough: bool) -> Iterator[str]:
    folder = f"{table}/_delta_log"
    files = sorted(storage.files(folder), key=lambda file: file.path)
    commits = {int(found[1]): file for file in files if (found := _COMMIT.search(file.path))}
    checkpoints = {int(found[1]): file for file in files if (found := _CHECKPOINT.search(file.path))}
    for file in commits.values():
        if file.size == 0:
            yield f"{file.path!r} is empty, as after a power cut; {_WAY_OUT}"
    if not is_thorough:
        return
    for file in commits.values():
        try:
            for line in storage.read(file.path).decode("utf-8").splitlines():
                json.loads(line)
        except ValueError as error:
            yield f"{file.path!r} is damaged ({error}); {_WAY_OUT}"
    for file in checkpoints.values():
        try:
            pq.ParquetFile(io.BytesIO(storage.read(file.path)))
        except Exception as error:
            yield f"{file.path!r} is damaged ({error}); {_WAY_OUT}"
    first = max((version for version in checkpoints if version <= max(commits, default=-1)), default=0)
    for version in range(first, max(commits, default=-1)):
        if version not in commits and version not in checkpoints:
            yield f"'{folder}/{version:020}.json' is missing; {_WAY_OUT}"
