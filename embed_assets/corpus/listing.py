"""Lists files with a version each that shows when they change, on a local disk or any fsspec file system."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeAlias

from fsspec import AbstractFileSystem

from embed_assets.errors import SourceError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_SECONDS = 60_000_000_000.0
"""Times further than this from 1970 are clamped: the years 68 to 3871 are safely within those of Python's datetime."""
_CHECKSUMS = (
    "etag",  # S3, Azure, WebDAV, HTTP
    "md5hash",  # Google Cloud Storage
    "contentmd5",  # Azure, HTTP
    "contenthash",  # Dropbox
    "md5checksum",  # Google Drive
    "md5",
    "checksum",  # lakeFS
    "sha256",
    "sha1",
    "sha",  # GitHub
    "hex",  # git
    "oid",
    "blobid",  # Hugging Face
    "crc32c",
    "crc",  # ZIP
    "digest",  # HTTP
    "generation",
    "versionid",
    "rev",
)
"""Keys under which fsspec implementations report a value that changes with the content, best first, as `_normalized`.

fsspec standardizes no such key: https://github.com/fsspec/filesystem_spec/issues/526.
"""
_TIMES = (
    "lastmodified",  # S3, Azure, Jupyter, HTTP
    "updated",  # Google Cloud Storage
    "mtime",  # SFTP, SMB, HDFS, archives
    "modified",  # WebDAV
    "modify",  # FTP
    "modificationtime",  # WebHDFS
    "modifiedtime",  # Google Drive
    "servermodified",  # Dropbox
    "timemodified",  # Oracle
    "lastwritetime",
    "datetime",
)
"""Keys under which fsspec implementations report the modification time, best first, as `_normalized`."""
_NOT_ALPHANUMERIC = re.compile("[^a-z0-9]")
_FTP_TIME = re.compile(r"\d{14}(\.\d+)?$")
_MAX_CONCURRENT_REQUESTS = 16
"""Requests for single files. More would list faster, but risk a server's rate limit."""
_MAX_PLAUSIBLE_SECONDS = 1e11
"""A larger time is in milliseconds: as seconds this is the year 5138, as milliseconds March 1973."""
_PROBE_SUFFIX = ".embed-assets-probe"
"""Appended to the name of a file to get one that does not exist."""


Ignored: TypeAlias = Callable[[str], bool]
"""Whether a file or folder of this name is left out."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the source as the listing shows it."""

    path: str
    """Relative to the source's root, '/'-separated."""
    size: int
    """Bytes."""
    modified_at: datetime
    """Time zone aware; 1970 when the file system does not report it."""
    version: str
    """Checksum if the file system reports one, else the modification time; '' if it reports neither."""
    rejected: str = ""
    """Reason code if the listing alone shows that the file must not be read, else ''."""
    table: str | None = None
    """Path of the folder, if this stands for all files of a Delta table; '' is the source's root."""
    sidecars: tuple[SourceFile, ...] = ()
    """Files with metadata of the file: of its folders, the outermost first, then its own. Their versions are part of
    the file's."""

    @property
    def content_key(self) -> str | None:
        """Changes when the file's content does; None if the listing can't tell."""
        return f"{self.size}-{self.version}{self.rejected and '-'}{self.rejected}" if self.version else None


def walk(folder: Path, excluded: Path | None, is_ignored: Ignored, hidden: list[str]) -> Iterator[SourceFile]:
    """The files below a local folder, without those in the folder `excluded`.

    Ignored files and folders are skipped, and appended to `hidden`.
    Raises ``SourceError`` for a folder that can't be listed.
    """
    root = folder.resolve()
    pending = [(folder, "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:  # deleted since its parent was listed
            continue
        except OSError as error:
            raise SourceError(
                f"the folder {str(folder)!r} can't be listed: {error.strerror}; fix its permissions or move it"
            ) from None
        for entry in entries:
            relative = prefix + entry.name
            if is_ignored(entry.name):
                hidden.append(relative)
                continue
            if entry.is_dir(follow_symlinks=False):
                if excluded is not None and root / relative == excluded:
                    continue
                pending.append((Path(entry.path), relative + "/"))
            elif file := _from_entry(entry, relative, root):
                yield file


def _from_entry(entry: os.DirEntry[str], relative: str, root: Path) -> SourceFile | None:
    """A local file; None when it was deleted since its folder was listed."""
    try:
        rejected = _link_rejection(entry, root) if entry.is_symlink() else ""
        # The target of a rejected link must not influence anything, so only the link itself is examined.
        status = entry.stat(follow_symlinks=not rejected)
        rejected = rejected or _file_rejection(entry.path, status.st_mode)
    except FileNotFoundError:
        return None
    modified_at = _EPOCH + timedelta(seconds=max(-_MAX_SECONDS, min(status.st_mtime, _MAX_SECONDS)))
    return SourceFile(relative, status.st_size, modified_at, str(status.st_mtime_ns), rejected)


def _link_rejection(entry: os.DirEntry[str], root: Path) -> str:
    """Reason code of a link that must not be followed, else ''."""
    try:
        target = Path(entry.path).resolve(strict=True)
    except (OSError, RuntimeError):
        return "broken_link"
    if not target.is_relative_to(root):
        return "symlink_outside"
    return "symlink_to_folder" if target.is_dir() else ""


def _file_rejection(path: str, mode: int) -> str:
    """Reason code of a file, or target of a link, that must not be read, else ''."""
    if not stat.S_ISREG(mode):
        return "not_a_file"
    # Checked while listing: `rejected` is part of the partition's version, so fixed permissions make it stale.
    return "" if os.access(path, os.R_OK) else "unreadable"


def find(filesystem: Any, base: str, is_ignored: Ignored, hidden: list[str]) -> Iterator[SourceFile]:
    """The files below the folder `base` of an fsspec file system.

    Ignored files and folders are skipped, and appended to `hidden`. Files that the
    listing gives without a checksum or time are looked up one by one.
    """
    listing: dict[str, dict[str, Any]] = filesystem.find(base, detail=True)
    unversioned: dict[str, str] = {}
    for name, info in listing.items():
        relative = name.removeprefix(base).lstrip("/")
        if info.get("type") == "directory":
            continue
        if (top := _hidden_part(relative, is_ignored)) is not None:
            if top not in hidden:
                hidden.append(top)
        elif _has_version(info):
            yield _from_info(relative, info)
        else:
            unversioned[name] = relative
    yield from _look_up(filesystem, unversioned, listing) if unversioned else ()


def _look_up(filesystem: Any, names: Mapping[str, str], listing: Mapping[str, dict[str, Any]]) -> Iterator[SourceFile]:
    """The files, each by a request of its own. `names` maps their full names to their paths relative to the source."""
    has_content_key = _has_content_key(filesystem, next(iter(names)))

    def look_up(name: str) -> SourceFile | None:
        try:
            info = {**listing[name], **filesystem.info(name)}
        except FileNotFoundError:  # deleted since it was listed, or a link to nothing
            return None
        if not _has_version(info):
            info["modified"] = _or_none(filesystem.modified, name)
        if not _has_version(info) and has_content_key:
            info["checksum"] = _or_none(filesystem.ukey, name)
        return _from_info(names[name], info)

    # Only fsspec's asynchronous implementations, such as HTTP, can be used by several threads at once.
    workers = _MAX_CONCURRENT_REQUESTS if getattr(filesystem, "async_impl", False) else 1
    with ThreadPoolExecutor(workers, thread_name_prefix="list") as pool:
        yield from (file for file in pool.map(look_up, names) if file is not None)


def _has_content_key(filesystem: Any, name: str) -> bool:
    """Whether the file system's `ukey` depends on the file's content.

    Some implementations hash only the name: they even have a key for a file that does not exist, so one is probed.
    """
    if type(filesystem).ukey is AbstractFileSystem.ukey:  # a hash of `info`, which has no checksum or time here
        return False
    return _or_none(filesystem.ukey, name + _PROBE_SUFFIX) is None


def _or_none(method: Any, name: str) -> Any:
    """The method's result for a file; None on any error, as implementations raise all kinds when they can't tell."""
    try:
        return method(name)
    except Exception:
        return None


def _has_version(info: Mapping[str, Any]) -> bool:
    """Whether a file's info has a checksum or a modification time."""
    return any(value for key, value in info.items() if _normalized(key) in _CHECKSUMS or _normalized(key) in _TIMES)


def _from_info(relative: str, info: Mapping[str, Any]) -> SourceFile:
    values = {_normalized(key): value for key, value in info.items() if value}
    checksum = next((str(values[key]) for key in _CHECKSUMS if key in values), "")
    reported = next((values[key] for key in _TIMES if key in values), None)
    modified_at = _as_time(reported)
    time = "" if reported is None else str(reported) if modified_at is None else modified_at.isoformat()
    return SourceFile(relative, int(info.get("size") or 0), modified_at or _EPOCH, checksum or time)


def _normalized(key: str) -> str:
    """A key in lower case, letters and digits only: 'Last-Modified' and 'last_modified' are the same."""
    return _NOT_ALPHANUMERIC.sub("", key.lower())


def _as_time(value: Any) -> datetime | None:
    """A time in any of the forms that file systems use, time zone aware; None when it is in no known form."""
    try:
        if isinstance(value, datetime):
            time = value
        elif isinstance(value, tuple):
            time = datetime(*value)
        elif isinstance(value, str):
            time = _parse_time(value)
        else:
            seconds = float(value) / (1000 if abs(float(value)) > _MAX_PLAUSIBLE_SECONDS else 1)
            time = _EPOCH + timedelta(seconds=max(-_MAX_SECONDS, min(seconds, _MAX_SECONDS)))
    except (ValueError, TypeError, OverflowError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _parse_time(text: str) -> datetime:
    if _FTP_TIME.match(text):
        return datetime.strptime(text[:14], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return parsedate_to_datetime(text)  # the form of HTTP headers


def _hidden_part(relative: str, is_ignored: Ignored) -> str | None:
    """The path up to its first ignored part, a folder or the file itself; None if it has none."""
    parts = relative.split("/")
    for i, part in enumerate(parts):
        if is_ignored(part):
            return "/".join(parts[: i + 1])
    return None


def ignored_names(patterns: str) -> Ignored:
    """Whether a name begins with a dot or matches one of the patterns, in any case.

    The patterns have * and ? and are separated by commas.
    """
    expressions = [fnmatch.translate(pattern.strip()) for pattern in patterns.split(",") if pattern.strip()]
    if not expressions:
        return _is_dot_name
    matcher = re.compile("|".join(expressions), re.IGNORECASE)
    return lambda name: _is_dot_name(name) or matcher.fullmatch(name) is not None


def _is_dot_name(name: str) -> bool:
    return name.startswith(".") and not name.startswith("..")
