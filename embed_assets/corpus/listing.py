"""Listing files and telling their versions apart, on a local disk or any fsspec file system."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from embed_assets.errors import SourceError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_SECONDS = 60_000_000_000.0
"""Times beyond the years that Python's dates can hold are taken for the last (or first) of them."""
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
"""What fsspec's implementations call something that changes with the content, in lower case and letters alone."""
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
"""The same of times."""
_NAME = re.compile("[^a-z0-9]")
_FTP_TIME = re.compile(r"\d{14}(\.\d+)?$")
_REQUESTS_AT_ONCE = 16
_MILLISECONDS = 1e11
"""A larger number is no count of seconds, but of milliseconds."""
_NO_SUCH_FILE = ".embed-assets-looks-whether-this-is-told-apart"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the corpus as its listing shows it."""

    path: str
    """Relative to the source's root, '/'-separated."""
    size: int
    """Bytes."""
    modified_at: datetime
    version: str
    """Checksum where the store gives one, else the modification time; '' where there is neither."""
    rejected: str = ""
    """Reason code when the listing alone shows that it must not be read."""


def walk(folder: Path, excluded: Path | None, hidden: list[str]) -> Iterator[SourceFile]:
    """The files of a local folder but for `excluded`; names that begin with a dot go to `hidden`.

    Raises ``SourceError`` for a folder that can't be listed.
    """
    root = folder.resolve()
    pending = [(folder, "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:  # gone since its parent was listed
            continue
        except OSError as error:
            raise SourceError(
                f"the folder {str(folder)!r} can't be listed: {error.strerror}; fix it or move it"
            ) from None
        for entry in entries:
            relative = prefix + entry.name
            if is_hidden(entry.name):
                hidden.append(relative)
                continue
            if entry.is_dir(follow_symlinks=False):
                if excluded is not None and root / relative == excluded:
                    continue
                pending.append((Path(entry.path), relative + "/"))
            elif file := _from_entry(entry, relative, root):
                yield file


def _from_entry(entry: os.DirEntry[str], relative: str, root: Path) -> SourceFile | None:
    """A local file as it is now; None when it is gone since its folder was listed."""
    try:
        rejected = _problem_of_entry(entry, root)
        # A rejected link's target is none of our business: only the link itself is looked at.
        stat = entry.stat(follow_symlinks=not rejected)
    except FileNotFoundError:
        return None
    modified_at = _EPOCH + timedelta(seconds=max(-_MAX_SECONDS, min(stat.st_mtime, _MAX_SECONDS)))
    return SourceFile(relative, stat.st_size, modified_at, str(stat.st_mtime_ns), rejected)


def _problem_of_entry(entry: os.DirEntry[str], root: Path) -> str:
    """Reason code of an entry that must not be read, else ''."""
    if not entry.is_symlink():
        return _problem_of_file(Path(entry.path))
    try:
        target = Path(entry.path).resolve(strict=True)
    except (OSError, RuntimeError):
        return "broken_link"
    if not target.is_relative_to(root):
        return "symlink_outside"
    if target.is_dir():
        return "symlink_to_folder"
    return _problem_of_file(target)


def _problem_of_file(path: Path) -> str:
    if not path.is_file():
        return "not_a_file"
    # Part of the listing, so that the file is read as soon as it may be.
    return "" if os.access(path, os.R_OK) else "unreadable"


def find(filesystem: Any, base: str, hidden: list[str]) -> Iterator[SourceFile]:
    """The files below a folder of an fsspec file system; those with a dot in front of a name go to `hidden`.

    Where the listing does not tell one content from another, the file system is asked about each file.
    """
    listing: dict[str, dict[str, Any]] = filesystem.find(base, detail=True)
    vague: dict[str, str] = {}
    for name, info in listing.items():
        relative = name.removeprefix(base).lstrip("/")
        if info.get("type") == "directory":
            continue
        if is_hidden(relative):
            if (top := _hidden_part(relative)) not in hidden:
                hidden.append(top)
        elif _tells(info):
            yield _from_info(relative, info)
        else:
            vague[name] = relative
    yield from _ask_about(filesystem, vague, listing) if vague else ()


def _ask_about(
    filesystem: Any, names: Mapping[str, str], listing: Mapping[str, dict[str, Any]]
) -> Iterator[SourceFile]:
    """The files, by requests of their own: `names` has their paths below the source."""
    has_key = _has_telling_key(filesystem, next(iter(names)))

    def ask(name: str) -> SourceFile | None:
        try:
            info = {**listing[name], **filesystem.info(name)}
        except FileNotFoundError:  # gone since it was listed, or a link to nothing
            return None
        if not _tells(info):
            info["modified"] = _try(filesystem.modified, name)
        if not _tells(info) and has_key:
            info["checksum"] = _try(filesystem.ukey, name)
        return _from_info(names[name], info)

    # Only file systems over HTTP take requests from several threads.
    workers = _REQUESTS_AT_ONCE if getattr(filesystem, "async_impl", False) else 1
    with ThreadPoolExecutor(workers, thread_name_prefix="list") as pool:
        yield from (file for file in pool.map(ask, names) if file is not None)


def _has_telling_key(filesystem: Any, name: str) -> bool:
    """Its `ukey` looks at the file. Some are made of the name alone, and know of a file that is not there."""
    if type(filesystem).ukey is AbstractFileSystem.ukey:  # of `info`, which does not tell
        return False
    return _try(filesystem.ukey, name + _NO_SUCH_FILE) is None


def _try(ask: Any, name: str) -> Any:
    """What a file system answers; None when it can't, which implementations say by all kinds of errors."""
    try:
        return ask(name)
    except Exception:
        return None


def _tells(info: Mapping[str, Any]) -> bool:
    """A file's info has something that changes with its content."""
    return any(value for name, value in info.items() if _plain(name) in _CHECKSUMS or _plain(name) in _TIMES)


def _from_info(relative: str, info: Mapping[str, Any]) -> SourceFile:
    plain = {_plain(name): value for name, value in info.items() if value}
    checksum = next((str(plain[name]) for name in _CHECKSUMS if name in plain), "")
    told = next((plain[name] for name in _TIMES if name in plain), None)
    modified_at = _as_time(told)
    time = "" if told is None else str(told) if modified_at is None else modified_at.isoformat()
    return SourceFile(relative, int(info.get("size") or 0), modified_at or _EPOCH, checksum or time)


def _plain(name: str) -> str:
    return _NAME.sub("", name.lower())


def _as_time(value: Any) -> datetime | None:
    """A time in one of the forms that file systems give it in; None for others."""
    try:
        if isinstance(value, datetime):
            time = value
        elif isinstance(value, tuple):
            time = datetime(*value)
        elif isinstance(value, str):
            time = _parse_time(value)
        else:
            seconds = float(value) / (1000 if abs(float(value)) > _MILLISECONDS else 1)
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
        return parsedate_to_datetime(text)  # as HTTP writes it


def is_hidden(relative: str) -> bool:
    """Names with one dot in front, by custom. Two are no custom."""
    return any(map(_has_dot, relative.split("/")))


def _hidden_part(relative: str) -> str:
    """The outermost folder (or the file) that is hidden."""
    parts = relative.split("/")
    return "/".join(parts[: next(i for i, part in enumerate(parts) if _has_dot(part)) + 1])


def _has_dot(name: str) -> bool:
    return name.startswith(".") and not name.startswith("..")
