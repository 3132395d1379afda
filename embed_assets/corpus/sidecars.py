"""Files with metadata of others: `NAME.meta.json` beside a file, and `_meta.json` for all files of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import IO, Any, Protocol

from embed_assets.corpus.listing import SourceFile
from embed_assets.records import hash_parts

_SUFFIX = ".meta.json"
_OF_FOLDER = "_meta.json"
_MAX_BYTES = 1 << 20


class SidecarError(Exception):
    """A file with metadata is no JSON object."""


class Opener(Protocol):
    """Opens files of a source."""

    def open(self, file: SourceFile) -> IO[bytes]:
        """The file's content. Opening and reading may raise ``SourceError``."""
        ...


def with_sidecars(files: Iterable[SourceFile]) -> Iterator[SourceFile]:
    """The files with their sidecars, which are left out themselves.

    'a.pdf' has 'a.pdf.meta.json' or 'a.meta.json'. A file that is named like one, and is of no other, is a document.
    """
    known = {file.path: file for file in files}
    used: set[str] = set()
    described = []
    for path, file in known.items():
        found = [known[name] for name in (*_above(path), *_beside(path)) if name in known and name != path]
        used.update(sidecar.path for sidecar in found)
        described.append(_described(file, found) if found else file)
    folders = {path for path in known if path.rpartition("/")[2] == _OF_FOLDER}
    return (file for file in described if file.path not in used | folders)


def _above(path: str) -> list[str]:
    """Where metadata of the file's folders may be, the outermost first."""
    folders = path.split("/")[:-1]
    return ["/".join([*folders[:depth], _OF_FOLDER]) for depth in range(len(folders) + 1)]


def _beside(path: str) -> list[str]:
    folder, slash, name = path.rpartition("/")
    stem = name.rpartition(".")[0] or name
    return list(dict.fromkeys([f"{folder}{slash}{stem}{_SUFFIX}", f"{path}{_SUFFIX}"]))


def _described(file: SourceFile, sidecars: list[SourceFile]) -> SourceFile:
    versions = [sidecar.content_key or "" for sidecar in sidecars]
    version = f"{file.version}+{hash_parts(versions)}" if file.version and all(versions) else ""
    return replace(file, version=version, sidecars=tuple(sidecars))


class Sidecars:
    """Reads the metadata that files have from others."""

    def __init__(self, source: Opener) -> None:
        self._source = source
        self._of_folders: dict[str, dict[str, Any]] = {}

    def of(self, file: SourceFile) -> tuple[dict[str, Any], dict[str, Any]]:
        """The metadata that a file has from its folders, in which the nearest counts most, and from its own sidecar.

        Raises ``SidecarError`` if one is no JSON object, ``SourceError`` if it can't be read.
        """
        above: dict[str, Any] = {}
        beside: dict[str, Any] = {}
        for sidecar in file.sidecars:
            if sidecar.path.rpartition("/")[2] != _OF_FOLDER:
                beside |= self._read(sidecar)
                continue
            if sidecar.path not in self._of_folders:
                self._of_folders[sidecar.path] = self._read(sidecar)
            above |= self._of_folders[sidecar.path]
        return above, beside

    def _read(self, sidecar: SourceFile) -> dict[str, Any]:
        with self._source.open(sidecar) as stream:
            data = stream.read(_MAX_BYTES + 1)
        try:
            found = json.loads(data) if len(data) <= _MAX_BYTES else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise SidecarError(
                f"its metadata in {sidecar.path!r} must be a JSON object of at most {_MAX_BYTES:,} bytes; correct that"
            )
        return found
