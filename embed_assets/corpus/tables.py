"""Finds Delta tables among the files of a source, so that only the rows of their current version are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from embed_assets.corpus.listing import SourceFile
from embed_assets.records import hash_parts

_LOG = re.compile(r"((?:.*?/)??)_delta_log/\d{20}\.(?:json|checkpoint\.)")
"""The path of a commit or checkpoint in the log of a table, whose folder, with a slash, is the group."""


def with_tables(files: Iterable[SourceFile], root_name: str, can_read_tables: bool) -> Iterator[SourceFile]:
    """The files, with one in place of all those of each Delta table: a folder that has a folder _delta_log."""
    every = list(files)
    folders = {log[1] for file in every if "_delta_log/" in file.path and (log := _LOG.match(file.path))}
    members: dict[str, list[SourceFile]] = {
        folder: [] for folder in folders if not any(folder != o and folder.startswith(o) for o in folders)
    }
    for file in every:
        folder = next((folder for folder in members if file.path.startswith(folder)), None)
        if folder is None:
            yield file
        else:
            members[folder].append(file)
    for folder, inside in members.items():
        yield _as_table(folder.rstrip("/"), root_name, inside, can_read_tables)


def _as_table(folder: str, root_name: str, files: Sequence[SourceFile], can_read: bool) -> SourceFile:
    """The file that stands for a Delta table. Every commit to the table changes its version."""
    name = PurePosixPath(folder).name or root_name
    commits = [f for f in files if (log := _LOG.match(f.path)) is not None and log[1].rstrip("/") == folder]
    version = hash_parts(f"{f.path}/{f.size}/{f.version}" for f in sorted(commits, key=lambda f: f.path))
    return SourceFile(
        f"{folder}/{name}.delta".lstrip("/"),
        sum(file.size for file in files),
        max(file.modified_at for file in files),
        version,
        "" if can_read else "delta_table",
        folder,
    )
