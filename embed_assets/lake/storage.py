"""Read, write and list plain files on the lake's storage, with the same credentials and options as the tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import obstore
from obstore.exceptions import BaseError, UnknownConfigurationKeyError
from obstore.store import LocalStore, from_url

from embed_assets.locations import local_path

_CLIENT_OPTIONS = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "http1_only",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_url",
        "timeout",
        "user_agent",
    }
)
"""Options of the HTTP client. Delta accepts them among the store's options, obstore takes them separately."""
_from_url: Any = from_url  # overloaded per store type, which is only known at run time
_PREFIXES = ("aws_", "azure_", "google_")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in a listing."""

    path: str
    """Path relative to the lake's root."""
    size: int
    """Size in bytes."""
    modified_at: datetime
    """Modification time, timezone-aware."""


class Storage:
    """Files below the lake's root. Writes are atomic.

    Reading a missing file raises ``FileNotFoundError``. Other errors are of the types that `lake_errors` converts.
    """

    def __init__(self, root: str, options: Mapping[str, str]) -> None:
        self._root, self._options, self._path = root, options, local_path(root)

    @cached_property
    def _store(self) -> Any:
        if self._path is not None:
            return LocalStore(self._path, mkdir=True)
        return _remote_store(self._root, self._options)

    @property
    def _is_absent(self) -> bool:
        """Whether this is a local lake whose folder does not exist yet. Listing must not create it."""
        return self._path is not None and not self._path.is_dir()

    def read(self, path: str) -> bytes:
        """The content of a file."""
        return bytes(obstore.get(self._store, path).bytes())

    def has(self, path: str) -> bool:
        """Whether a file exists."""
        if self._path is not None:
            return (self._path / path).exists()
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Write or overwrite a file. Missing folders are created."""
        obstore.put(self._store, path, data)

    def delete(self, path: str) -> None:
        """Delete a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, path)

    def files(self, folder: str) -> Iterator[StoredFile]:
        """All files below a folder, at any depth, in no particular order; none if it does not exist."""
        if self._is_absent:
            return
        for batch in obstore.list(self._store, folder):
            yield from (StoredFile(str(f["path"]), int(f["size"]), f["last_modified"]) for f in batch)

    def folders(self, folder: str) -> list[str]:
        """Sorted names of the folders directly inside a folder."""
        if self._is_absent:
            return []
        found = obstore.list_with_delimiter(self._store, folder)["common_prefixes"]
        return sorted(str(path).rpartition("/")[2] for path in found)


def _remote_store(root: str, options: Mapping[str, str]) -> Any:
    """An obstore store for a URL, given those of Delta's options that obstore knows."""
    plain = {name: _without_prefix(name) for name in options}
    client = {plain[name]: _value(value) for name, value in options.items() if plain[name] in _CLIENT_OPTIONS}
    others = {name: value for name, value in options.items() if plain[name] not in _CLIENT_OPTIONS}
    config = {name: value for name, value in others.items() if _is_known(root, name, value)}
    retries = {"max_retries": int(options["max_retries"])} if "max_retries" in options else None
    return _from_url(root, config=config or None, client_options=client or None, retry_config=retries)


def _value(text: str) -> str | bool:
    return text == "true" if text in ("true", "false") else text


def _without_prefix(name: str) -> str:
    name = name.lower()
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _is_known(root: str, name: str, value: str) -> bool:
    """Whether the store knows the option. Some are Delta's own, such as those about how to commit."""
    try:
        _from_url(root, config={name: value})
    except UnknownConfigurationKeyError:
        return False
    except BaseError:
        pass  # known, but not sufficient on its own
    return True
