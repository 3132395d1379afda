"""Files beside the tables, on the lake's own storage: found with the credentials and options that the tables use."""

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

from embed_assets.settings import local_path

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
"""Options of the HTTP client; Delta takes them among those of the store."""
_from_url: Any = from_url  # typed per store, which is not known here
_PREFIXES = ("aws_", "azure_", "google_")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as its listing shows it."""

    path: str
    """Below the lake's root."""
    size: int
    """Bytes."""
    modified_at: datetime


class Storage:
    """The lake's storage. A file is written whole or not at all, and reading one that is gone raises
    FileNotFoundError; other errors are those that `lake_errors` knows."""

    def __init__(self, root: str, options: Mapping[str, str]) -> None:
        self._root, self._options, self._path = root, options, local_path(root)

    @cached_property
    def _store(self) -> Any:
        if self._path is not None:
            return LocalStore(self._path, mkdir=True)
        return _remote_store(self._root, self._options)

    @property
    def _is_absent(self) -> bool:
        """A local lake that was not made yet, and is not made by looking."""
        return self._path is not None and not self._path.is_dir()

    def read(self, path: str) -> bytes:
        """A file's content."""
        return bytes(obstore.get(self._store, path).bytes())

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Make `data` the file's content; folders are made as need be."""
        obstore.put(self._store, path, data)

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, path)

    def files(self, folder: str) -> Iterator[StoredFile]:
        """All files below a folder, in no particular order; none when it does not exist."""
        if self._is_absent:
            return
        for batch in obstore.list(self._store, folder):
            yield from (StoredFile(str(f["path"]), int(f["size"]), f["last_modified"]) for f in batch)

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        if self._is_absent:
            return []
        found = obstore.list_with_delimiter(self._store, folder)["common_prefixes"]
        return sorted(str(path).rpartition("/")[2] for path in found)


def _remote_store(root: str, options: Mapping[str, str]) -> Any:
    """The store of a URL, with those of Delta's options that are about the store or its client."""
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
    """The option is of the store's, not one that Delta alone has (as on how to commit)."""
    try:
        _from_url(root, config={name: value})
    except UnknownConfigurationKeyError:
        return False
    except BaseError:
        pass  # it is known, and not enough by itself
    return True
