"""Temporary files that keep the bookkeeping of a partition on disk, so that it need not fit in memory."""

from __future__ import annotations

import contextlib
import io
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from filelock import FileLock, Timeout

from embed_assets.errors import LakeError

_CACHE_KILOBYTES = 16_384
"""Page cache of each `DiskMap`. A larger one keeps more maps off the disk, at that much more memory per open map."""
_FOLDER_PREFIX, _LOCK_NAME = "embed_assets_", "lock"
_ORPHAN_SECONDS = 60.0
"""Age from which a folder without a holder of its lock counts as an orphan: creating one takes far less."""
_MAX_IN_MEMORY = 200_000
"""Strings a `SpillingSet` holds before it spills: about 25 MB of ids. The database takes five times as long."""


def scratch_file() -> IO[bytes]:
    """An open temporary file that is deleted when it is closed or the process ends."""
    with scratch_errors():
        return tempfile.TemporaryFile(prefix="embed_assets_")


@contextlib.contextmanager
def scratch_errors() -> Iterator[None]:
    """Turn a failed write to a temporary file into a ``LakeError`` that names the folder."""
    try:
        yield
    except (OSError, sqlite3.Error, pa.ArrowException) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise LakeError(
            f"a temporary file could not be written in {tempfile.gettempdir()!r}: {reason}; "
            "free some space there or set TMPDIR to a larger folder",
        ) from error


class SpooledBatches:
    """Record batches of one schema, spooled to a temporary file; they can be read back any number of times."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._file = scratch_file()
        self._stream = pa.ipc.new_stream(self._file, schema)
        self._is_complete = False

    def __enter__(self) -> SpooledBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Append a batch. Not allowed after `complete` or a first iteration."""
        with scratch_errors():
            self._stream.write_batch(batch)

    def complete(self) -> int:
        """Flush everything to disk; returns the size of the spool in bytes."""
        with scratch_errors():
            if not self._is_complete:
                self._is_complete = True
                self._stream.close()
                self._file.flush()
            return self._file.seek(0, io.SEEK_END)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        self.complete()
        self._file.seek(0)
        with pa.ipc.open_stream(self._file) as stream:
            yield from stream


@dataclass(frozen=True, slots=True)
class ArrowFile:
    """Record batches in a file, which readers map into memory."""

    path: Path
    rows: int
    byte_size: int

    @classmethod
    def write(cls, path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> ArrowFile:
        """Write the batches to `path`. Raises ``LakeError`` if the disk is full."""
        rows = 0
        with scratch_errors():
            file = pa.OSFile(str(path), "wb")
            stream = pa.ipc.new_stream(file, schema)
        try:
            for batch in batches:
                rows += batch.num_rows
                with scratch_errors():
                    stream.write_batch(batch)
            with scratch_errors():
                stream.close()
                return cls(path, rows, file.tell())
        finally:
            file.close()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """The batches. They stay valid when the file is removed."""
        yield from pa.ipc.open_stream(pa.memory_map(str(self.path)))

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


class ScratchFolder:
    """A temporary folder, deleted when it is closed, or by a later process if this one is killed before."""

    def __init__(self) -> None:
        with scratch_errors():
            _remove_orphans()
            self._folder = tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX, ignore_cleanup_errors=True)
            self._lock = FileLock(self.path / _LOCK_NAME)
            self._lock.acquire(timeout=0)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self._folder.name)

    def close(self) -> None:
        """Delete the folder and everything in it."""
        self._lock.release()
        self._folder.cleanup()


def _remove_orphans() -> None:
    """Delete the folders of processes that were killed: nobody holds their locks any more."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*/{_LOCK_NAME}"):
        # Another user's folder, or one that its process is creating or deleting at this moment, is left alone.
        with contextlib.suppress(OSError, Timeout):
            if time.time() - lock.stat().st_mtime > _ORPHAN_SECONDS:
                with FileLock(lock).acquire(timeout=0):
                    shutil.rmtree(lock.parent, ignore_errors=True)


class DiskMap:
    """Maps a key of bytes or text to a row of values, in a temporary SQLite database that deletes itself."""

    def __init__(self, *columns: str) -> None:
        # An empty name opens a private on-disk database; SQLite writes only what its cache can't hold.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in (f"cache_size=-{_CACHE_KILOBYTES}", "journal_mode=OFF", "synchronous=OFF", "temp_store=FILE"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute(f"CREATE TABLE rows ({', '.join(['key PRIMARY KEY', *columns])}) WITHOUT ROWID")
        self._insert = f"INSERT OR IGNORE INTO rows VALUES ({', '.join('?' * (len(columns) + 1))})"
        self._select = f"SELECT {', '.join(columns) or '1'} FROM rows WHERE key = ?"

    def __enter__(self) -> DiskMap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close and delete the database."""
        self._database.close()

    def add(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Insert rows of (key, *values). A key that is already present keeps its values."""
        with scratch_errors():
            self._database.execute("BEGIN")
            try:
                self._database.executemany(self._insert, rows)
            finally:
                self._database.execute("COMMIT")

    def add_one(self, key: bytes | str, *values: Any) -> bool:
        """Insert one row, unless its key is present; returns whether it was not."""
        with scratch_errors():
            return self._database.execute(self._insert, (key, *values)).rowcount == 1

    def get(self, keys: Sequence[bytes | str]) -> Iterator[tuple[Any, ...] | None]:
        """The values of each key, in order; None for a key that is not there."""
        with scratch_errors():
            cursor = self._database.cursor()
            for key in keys:
                yield cursor.execute(self._select, (key,)).fetchone()

    def __contains__(self, key: bytes | str) -> bool:
        with scratch_errors():
            return self._database.execute(self._select, (key,)).fetchone() is not None

    def __len__(self) -> int:
        [count] = self._database.execute("SELECT count(*) FROM rows").fetchone()
        return int(count)


class SpillingSet:
    """A set of strings that keeps the first ones in memory and spills the rest to disk."""

    def __init__(self) -> None:
        self._in_memory: set[str] = set()
        self._spilled: DiskMap | None = None

    def __enter__(self) -> SpillingSet:
        return self

    def __exit__(self, *_: object) -> None:
        if self._spilled is not None:
            self._spilled.close()

    def add(self, item: str) -> bool:
        """Add a string; returns whether it is new."""
        if item in self._in_memory:
            return False
        if len(self._in_memory) < _MAX_IN_MEMORY:
            self._in_memory.add(item)
            return True
        self._spilled = self._spilled or DiskMap()
        return self._spilled.add_one(_key(item))


def _key(item: str) -> bytes:
    return item.encode("utf-8", "surrogatepass")
