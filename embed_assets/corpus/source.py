"""Lists the source's files, assigns them to versioned partitions, and opens them.

Any fsspec URL works. A local folder is walked without fsspec, so that links to places outside it are noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

import fsspec

from embed_assets.corpus.listing import SourceFile, find, ignored_names, walk
from embed_assets.corpus.sidecars import with_sidecars
from embed_assets.corpus.tables import with_tables
from embed_assets.errors import SettingsError, SourceError
from embed_assets.locations import canonical_location, local_path
from embed_assets.records import hash_parts, hash_text

if TYPE_CHECKING:
    from pydantic import JsonValue

    from embed_assets.settings import Settings

ROOT_PARTITION = "_root"
"""Key of the partition of files that lie in no folder, with EMBED_PARTITION_BY=folder."""

_FORBIDDEN_IN_KEYS = re.compile(r"\.\.\.|[\x00-\x1f\x7f]|[\ud800-\udfff]")
"""Dagster rejects '...' and control characters in partition keys; lone surrogates can't be encoded as UTF-8."""
_LOOKS_LIKE_ROW_ID = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|delta|pdf)(\.\w+)?#", re.IGNORECASE)
"""A file may be named like the id of a row, such as 'data.csv#1'; its own id must differ."""
_HASHED_KEY = re.compile(r"~[0-9a-f]{32}$")
"""A name that ends like a key that `partition_key` made is hashed too, so that the two can't collide."""
_KEY_SUFFIX_LENGTH = 35
"""'~' and 32 hex digits, and two to spare."""
_MAX_QUOTED_KEY = 200
"""Characters of a percent-encoded key. Delta names a folder 'partition_key=<key>', and file systems allow 255 bytes."""
_VAGUE = "-vague"
"""End of the version of a partition with files that have neither checksum nor time."""
_LAKE_FOLDERS = frozenset({"", "raw_documents", "rejected_documents", "chunks", "embeddings", "models"})
"""Folders of the lake that can't be the source; '' is the lake itself."""
_READ_BYTES = 1 << 18
"""Buffer for reading a file. More would make fewer requests to remote storage, at that much more memory."""
_RESERVED_KEYS = frozenset({ROOT_PARTITION, "__HIVE_DEFAULT_PARTITION__"})
"""Names that a folder can have but a key can't: one is the root's own partition, the other is Delta's null."""


@dataclass(frozen=True)
class SourcePartition:
    """The files of one partition."""

    key: str
    files: tuple[SourceFile, ...] = ()
    """In order of their paths."""
    prefix: str = ""
    """Start of the files' paths that their document ids leave out."""

    @cached_property
    def version(self) -> str:
        """Data version of the files as listed: '<hash of paths and sizes>-<hash of checksums or times>'.

        It ends in '-vague' if some files have neither checksum nor time: see `detects_changes`.
        """
        shape = hash_parts(part for f in self.files for part in (f.path, str(f.size), f.rejected))
        is_vague = any(not file.version and not file.rejected for file in self.files)
        return f"{shape}-{hash_parts(f.version for f in self.files)}{_VAGUE if is_vague else ''}"

    @cached_property
    def byte_size(self) -> int:
        """Size of all files together."""
        return sum(file.size for file in self.files)

    def document_id(self, file: SourceFile) -> str:
        """Id of a file's document: its path within the partition."""
        name = clean_name(file.path.removeprefix(self.prefix))
        return f"{name}~{hash_text(name)[:8]}" if _LOOKS_LIKE_ROW_ID.search(name) else name


@dataclass(frozen=True, slots=True)
class Listing:
    """The contents of a source at one point in time."""

    partitions: dict[str, SourcePartition]
    """Partitions that have files, by key, in order of their keys."""
    hidden: tuple[str, ...] = ()
    """Paths of files and folders that are skipped because their names begin with a dot."""


@dataclass(frozen=True)
class Source:
    """A folder or bucket of documents."""

    root: str
    """Absolute URL or path, without a trailing slash."""
    partition_by: str
    """'folder', 'file' or 'hash:<buckets>'."""
    options: Mapping[str, JsonValue] = field(default_factory=dict, repr=False)
    """Options of the fsspec file system, such as credentials."""
    excluded: Path | None = None
    """A local folder to skip: the lake, in case it is inside the source."""
    ignore: str = ""
    """Names to leave out, see `ignored_names`."""
    has_sidecars: bool = False
    """Whether files such as 'a.pdf.meta.json' hold metadata of others."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Source:
        """The source that the settings specify, not opened yet. Raises ``SettingsError`` if it overlaps the lake."""
        path = local_path(settings.source)
        _check_overlap(settings.source, settings.lake)
        root = str(path.absolute()) if path is not None else settings.source.rstrip("/")
        lake = local_path(settings.lake)
        excluded = lake.absolute().resolve() if lake is not None else None
        has_sidecars = bool(settings.metadata)
        return cls(root, settings.partition_by, settings.source_options, excluded, settings.ignore, has_sidecars)

    def partitions(self) -> dict[str, SourcePartition]:
        """All partitions that have files, by key, in order of their keys.

        Raises ``SourceError`` when the source does not exist or can't be listed.
        """
        return self.listing().partitions

    def listing(self) -> Listing:
        """The current contents of the source.

        Raises ``SourceError`` when the source does not exist or can't be listed.
        """
        groups: dict[tuple[str, str], list[SourceFile]] = {}
        hidden: list[str] = []
        is_local = local_path(self.root) is not None
        files = with_tables(self._files(hidden), self.root.rpartition("/")[2], is_local)
        if self.has_sidecars:
            files = with_sidecars(files)
        for file in sorted(files, key=lambda f: f.path):
            groups.setdefault(self._assign(file.path), []).append(file)
        found = (SourcePartition(key, tuple(files), prefix) for (key, prefix), files in groups.items())
        partitions = {partition.key: partition for partition in sorted(found, key=lambda p: p.key)}
        return Listing(partitions, tuple(sorted(hidden)))

    def open(self, file: SourceFile) -> IO[bytes]:
        """The file's content, as a buffered binary stream.

        Opening and reading raise ``SourceError`` when the file was deleted since it was listed, became a link to a
        place outside the source, or its storage fails. These are errors and not rejections, because a rejection drops
        the document, and the next attempt may well succeed.
        """
        path = local_path(self.root)
        with _storage_errors(self.uri(file)):
            if path is not None:
                place = path / file.path
                if not place.resolve(strict=True).is_relative_to(path.resolve()):
                    raise PermissionError("it became a link to a place outside the source")
                raw = io.FileIO(place)
            else:
                raw = self._filesystem().open(self._absolute(file.path), "rb")
        return io.BufferedReader(_GuardedFile(raw, self.uri(file)), _READ_BYTES)

    def table(self, file: SourceFile) -> str:
        """The local folder of the Delta table that a file stands for."""
        return f"{self.root}/{file.table}"

    def uri(self, file: SourceFile) -> str:
        """The file's location as a URI, percent-encoded so that parsing it gives the path back.

        Rows written before version 0.2 have unquoted locations, such as 'file:///docs/50% off #1.md'.
        """
        path = file.path if file.table is None else file.table
        if "://" not in self.root:
            return f"file://{quote_path(f'{self.root}/{path}'.rstrip('/'))}"
        if self.root.startswith(("http://", "https://")):  # links in HTTP listings are URIs already
            return clean_name(f"{self.root}/{path}")
        scheme, _, place = self.root.partition("://")
        return f"{scheme}://{quote_path(f'{place}/{path}'.rstrip('/'))}"

    def _absolute(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _filesystem(self) -> Any:
        return fsspec.core.url_to_fs(self.root, **self.options)[0]

    def _assign(self, path: str) -> tuple[str, str]:
        """(key of the file's partition, prefix of its path that its document id leaves out)."""
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
            yield from walk(path, self.excluded, ignored_names(self.ignore), hidden)
            return
        try:
            filesystem = self._filesystem()
            filesystem.invalidate_cache()  # a cached listing would hide changes from the sensor
            base = filesystem._strip_protocol(self.root).rstrip("/")
            if not filesystem.isdir(base):
                raise FileNotFoundError("it must be an existing folder or prefix")
            yield from find(filesystem, base, ignored_names(self.ignore), hidden)
        except Exception as error:
            raise SourceError(
                f"the source {self.root!r} can't be listed: {type(error).__name__}: {error}; "
                "check EMBED_SOURCE, EMBED_SOURCE_OPTIONS and the credentials in the environment",
                is_retryable=True,
            ) from error


class _GuardedFile(io.RawIOBase):
    """A file that raises ``SourceError`` when its storage fails."""

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
    """Turn any error into a retryable ``SourceError`` that names the file."""
    try:
        yield
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
        raise SourceError(
            f"{uri!r} was listed but can't be read: {reason}; run again if it was moved or changed, "
            "else check its storage and the credentials in the environment",
            is_retryable=True,
        ) from error


def _check_overlap(source: str, lake: str) -> None:
    """Raise ``SettingsError`` when the source is the lake or one of its tables, or is remote and contains the lake.

    Such a source would embed its own output over and over. A folder next to the tables is fine, and so is a local lake
    inside the source, which is skipped.
    """
    source_place, lake_place = (canonical_location(location) for location in (source, lake))
    folder = source_place.removeprefix(lake_place).strip("/").partition("/")[0]
    contains_lake = local_path(lake) is None and f"{lake_place}/".startswith(f"{source_place}/")
    if contains_lake or (f"{source_place}/".startswith(f"{lake_place}/") and folder in _LAKE_FOLDERS):
        raise SettingsError(
            f"the source must not be the lake, contain it or be one of its tables, got EMBED_SOURCE={source!r} and "
            f"EMBED_LAKE={lake!r}; move one of them elsewhere"
        )


def detects_changes(version: str) -> bool:
    """Whether a partition with this version changes its version whenever its content changes.

    It does not where the source reports neither checksums nor modification times.
    """
    return not version.endswith(_VAGUE)


def has_same_files(before: str, now: str) -> bool:
    """Whether two versions of a partition are of the same paths with the same sizes; the contents may still differ."""
    return before.partition("-")[0] == now.partition("-")[0]


@lru_cache
def partition_key(name: str) -> str:
    """The Dagster partition key of a folder or file: its name, wherever Dagster and file systems allow that.

    In a name with '...', control characters or undecodable bytes these are replaced, an overlong name is cut, and such
    names and reserved ones get a hash of the whole name appended. No two names share a key.
    """
    is_plain = name not in _RESERVED_KEYS and not _FORBIDDEN_IN_KEYS.search(name) and not _HASHED_KEY.search(name)
    if is_plain and len(quote(name, safe="")) <= _MAX_QUOTED_KEY:
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    shown = _FORBIDDEN_IN_KEYS.sub("_", name)
    while len(quote(shown, safe="")) > _MAX_QUOTED_KEY - _KEY_SUFFIX_LENGTH:
        shown = shown[: len(shown) * 3 // 4]
    return f"{shown}~{digest}"


def quote_path(path: str) -> str:
    """The path percent-encoded for a URI. Bytes of a local name that are not UTF-8 are encoded as they are."""
    try:
        name = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte of a local name
        name = path.encode("utf-8", "surrogatepass")
    return quote(name, safe="/~!$&'()*+,;=:@")


def clean_name(name: str) -> str:
    """The name, if it is valid Unicode; else with the rest escaped, and a hash appended that keeps it unique."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return f"{name.encode('utf-8', 'backslashreplace').decode('utf-8')}~{digest}"
    return name
