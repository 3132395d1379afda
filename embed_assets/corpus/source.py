"""Where documents come from: list them, tell versions apart, assign them to partitions, open them.

Any fsspec URL works; a local folder is walked here so that links leaving it are noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import fsspec
from pydantic import JsonValue

from embed_assets.corpus.listing import SourceFile, find, walk
from embed_assets.errors import SettingsError, SourceError
from embed_assets.records import hash_parts, hash_text
from embed_assets.settings import Settings, local_path, same_place

ROOT_PARTITION = "_root"
"""Key of the partition of the loose files at the root, with PARTITION_BY=folder."""

_FORBIDDEN_IN_KEYS = re.compile(r"\.\.\.|[\x00-\x1f\x7f]|[\ud800-\udfff]")
"""Dagster refuses '...' and control characters in partition keys; lone surrogates can't be stored as UTF-8."""
_LOOKS_LIKE_A_ROW = re.compile(r"\.(jsonl|csv|parquet)#", re.IGNORECASE)
"""A file named like the id of a row ('data.csv#1') must not share it."""
_HASHED_KEY = re.compile(r"~[0-9a-f]{32}$")
_MAX_QUOTED_KEY = 200
"""Characters of a key in a table's folder names, where all but letters and digits count threefold."""
_VAGUE = "-vague"
_LAKE_FOLDERS = frozenset({"", "raw_documents", "rejected_documents", "chunks", "embeddings", "models"})
_READ_BYTES = 1 << 18
_RESERVED_KEYS = frozenset({ROOT_PARTITION, "__HIVE_DEFAULT_PARTITION__"})
"""Names a folder can have that mean something else: our own partition of loose files, and Delta's null."""


@dataclass(frozen=True, slots=True)
class SourcePartition:
    """The files of one partition."""

    key: str
    files: tuple[SourceFile, ...] = ()
    prefix: str = ""
    """Part of the paths that is the partition's own and not in its document ids."""

    @property
    def version(self) -> str:
        """Data version of what the listing shows: a hash over paths and sizes, '-', and one over checksums or times.

        At its end it says when that does not tell everything: see `can_tell_changes`.
        """
        shape = hash_parts(part for f in self.files for part in (f.path, str(f.size), f.rejected))
        is_vague = any(not file.version and not file.rejected for file in self.files)
        return f"{shape}-{hash_parts(f.version for f in self.files)}{_VAGUE if is_vague else ''}"

    @property
    def byte_size(self) -> int:
        """Of all its files."""
        return sum(file.size for file in self.files)

    def document_id(self, file: SourceFile) -> str:
        """Identity of a file's text: its path inside the partition."""
        name = clean_name(file.path.removeprefix(self.prefix))
        return f"{name}~{hash_text(name)[:8]}" if _LOOKS_LIKE_A_ROW.search(name) else name


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source has at a time."""

    partitions: dict[str, SourcePartition]
    """Those that have files, by key, in order of their keys."""
    hidden: tuple[str, ...] = ()
    """Files and folders that are left out because their names begin with a dot."""


@dataclass(frozen=True)
class Source:
    """A folder or bucket of documents."""

    root: str
    """Absolute URL or path, without a trailing slash."""
    partition_by: str
    options: Mapping[str, JsonValue] = field(default_factory=dict, repr=False)
    excluded: Path | None = None
    """A local folder that is left out: the lake, where it lies inside the source."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Source:
        """The source that the settings name; nothing is opened yet."""
        path = local_path(settings.source)
        _check_apart(settings.source, settings.lake)
        root = str(path.absolute()) if path is not None else settings.source.rstrip("/")
        lake = local_path(settings.lake)
        excluded = lake.absolute().resolve() if lake is not None else None
        return cls(root, settings.partition_by, settings.source_options, excluded)

    def partitions(self) -> dict[str, SourcePartition]:
        """All partitions that have files, by key, in order of their keys. As `listing`."""
        return self.listing().partitions

    def listing(self) -> Listing:
        """What the source has now.

        Raises ``SourceError`` when the source does not exist or can't be listed.
        """
        groups: dict[tuple[str, str], list[SourceFile]] = {}
        hidden: list[str] = []
        for file in sorted(self._files(hidden), key=lambda f: f.path):
            groups.setdefault(self._assign(file.path), []).append(file)
        found = (SourcePartition(key, tuple(files), prefix) for (key, prefix), files in groups.items())
        partitions = {partition.key: partition for partition in sorted(found, key=lambda p: p.key)}
        return Listing(partitions, tuple(sorted(hidden)))

    def open(self, file: SourceFile) -> IO[bytes]:
        """The file's bytes, for reading.

        Raises ``SourceError``, while opening or reading, when they can't be had: the file is gone since it was
        listed, became a link that leaves the source, or its storage fails. A file that is rejected is a document
        less, so none is for what may be different the next time.
        """
        path = local_path(self.root)
        with _storage_errors(self.uri(file)):
            if path is not None:
                place = path / file.path
                if not place.resolve(strict=True).is_relative_to(path.resolve()):
                    raise PermissionError("it became a link that leaves the source")
                raw = io.FileIO(place)
            else:
                raw = self._filesystem().open(self._absolute(file.path), "rb")
        return io.BufferedReader(_WatchedFile(raw, self.uri(file)), _READ_BYTES)

    def uri(self, file: SourceFile) -> str:
        """Where the file lies, as a URI: what is special in one is quoted, so that its path parses back.

        (Before 0.2 it was not: '50% off #1.md' stood in the tables as it is.)
        """
        if "://" not in self.root:
            return f"file://{quote_path(f'{self.root}/{file.path}')}"
        if self.root.startswith(("http://", "https://")):  # the addresses that HTTP servers list are URIs already
            return clean_name(f"{self.root}/{file.path}")
        scheme, _, place = self.root.partition("://")
        return f"{scheme}://{quote_path(f'{place}/{file.path}')}"

    def _absolute(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _filesystem(self) -> Any:
        return fsspec.core.url_to_fs(self.root, **self.options)[0]

    def _assign(self, path: str) -> tuple[str, str]:
        """Key of the partition a file belongs to, and the prefix that its document ids leave out."""
        if self.partition_by == "file":
            return partition_key(path), path.rpartition("/")[0] + "/" if "/" in path else ""
        if self.partition_by == "folder":
            folder, slash, _ = path.partition("/")
            if not slash:
                return ROOT_PARTITION, ""
            return partition_key(folder), folder + "/"
        buckets = int(self.partition_by.removeprefix("hash:"))
        digest = hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return f"bucket-{int.from_bytes(digest, 'big') % buckets:0{len(str(buckets - 1))}d}-of-{buckets}", ""

    def _files(self, hidden: list[str]) -> Iterator[SourceFile]:
        path = local_path(self.root)
        if path is not None:
            if not path.is_dir():
                raise SourceError(
                    f"the source must be an existing folder, got {str(path)!r}; "
                    "create it, run 'embed-assets sample' or set EMBED_SOURCE"
                )
            yield from walk(path, self.excluded, hidden)
            return
        try:
            filesystem = self._filesystem()
            filesystem.invalidate_cache()  # listings are remembered, which a sensor must not
            base = filesystem._strip_protocol(self.root).rstrip("/")
            if not filesystem.isdir(base):
                raise FileNotFoundError("it must be an existing folder or prefix")
            yield from find(filesystem, base, hidden)
        except Exception as error:
            raise SourceError(
                f"the source {self.root!r} can't be listed: {type(error).__name__}: {error}; "
                "check EMBED_SOURCE, EMBED_SOURCE_OPTIONS and the credentials in the environment",
                is_retryable=True,
            ) from error


class _WatchedFile(io.RawIOBase):
    """A file whose storage may fail while it is read."""

    def __init__(self, raw: Any, uri: str) -> None:
        self._raw, self._uri = raw, uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _storage_errors(self._uri):
            return int(self._raw.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _storage_errors(self._uri):
            return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        return int(self._raw.tell())

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


@contextlib.contextmanager
def _storage_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
        raise SourceError(
            f"{uri!r} was listed but can't be read: {reason}; if it is gone or changed the next run sees that, "
            "else check its storage, and the credentials in the environment",
            is_retryable=True,
        ) from error


def _check_apart(source: str, lake: str) -> None:
    """Raise ``SettingsError`` when the source is the lake, one of its tables or a bucket with the lake in it, which
    would embed itself again and again. A folder beside the tables is fine; a local lake in the source is left out."""
    inside, around = (same_place(location) for location in (source, lake))
    first = inside.removeprefix(around).strip("/").partition("/")[0]
    swallows_it = local_path(lake) is None and f"{around}/".startswith(f"{inside}/")
    if swallows_it or (f"{inside}/".startswith(f"{around}/") and first in _LAKE_FOLDERS):
        raise SettingsError(
            f"the source must not be the lake, hold it or be one of its tables, got EMBED_SOURCE={source!r} and "
            f"EMBED_LAKE={lake!r}; set one of them to another place"
        )


def can_tell_changes(version: str) -> bool:
    """Two equal versions of a partition are of the same content. Some sources have neither checksums nor times."""
    return not version.endswith(_VAGUE)


def is_only_touched(before: str, now: str) -> bool:
    """Between two versions of a partition no path and no size changed: perhaps no content did either."""
    return before.partition("-")[0] == now.partition("-")[0]


def partition_key(name: str) -> str:
    """A Dagster partition key for a folder or file: the name itself wherever Dagster and file systems take it.

    Names with '...', control characters or undecodable bytes, over-long ones and reserved ones get those
    characters replaced and a hash of the whole name appended, so that no two names share a key.
    """
    is_plain = name not in _RESERVED_KEYS and not _FORBIDDEN_IN_KEYS.search(name) and not _HASHED_KEY.search(name)
    if is_plain and len(quote(name, safe="")) <= _MAX_QUOTED_KEY:
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    shown = _FORBIDDEN_IN_KEYS.sub("_", name)
    while len(quote(shown, safe="")) > _MAX_QUOTED_KEY - 35:
        shown = shown[: len(shown) * 3 // 4]
    return f"{shown}~{digest}"


def quote_path(path: str) -> str:
    """A path as it stands in a URI; bytes that are no UTF-8 are quoted as they are."""
    try:
        name = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # no bytes of a local name, but half a character
        name = path.encode("utf-8", "surrogatepass")
    return quote(name, safe="/~!$&'()*+,;=:@")


def clean_name(name: str) -> str:
    """The name; if it has bytes that are no UTF-8, with those escaped and a hash appended, so that it is unique."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return f"{name.encode('utf-8', 'backslashreplace').decode('utf-8')}~{digest}"
    return name
