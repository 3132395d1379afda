"""Temporary files, so that what is known of a partition's rows does not have to fit in memory."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from embed_assets.errors import LakeError

_CACHE_KILOBYTES = 16_384
_IN_MEMORY = 20_000


def scratch_file() -> IO[bytes]:
    """A file that is gone when it is closed, or when the process ends."""
    with scratch_errors():
        return tempfile.TemporaryFile(prefix="embed_assets_")


@contextlib.contextmanager
def scratch_errors() -> Iterator[None]:
    """Name the place where a temporary file could not be written. Raises ``LakeError``."""
    try:
        yield
    except (OSError, sqlite3.Error, pa.ArrowException) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise LakeError(
            f"a temporary file could not be written in {tempfile.gettempdir()!r}: {reason}; "
            "free some space there or set TMPDIR to a larger folder",
        ) from error


class SpooledBatches:
    """Record batches of one schema in a temporary file, to be read as often as need be."""

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
        """Keep one more; not after they were read."""
        with scratch_errors():
            self._stream.write_batch(batch)

    def complete(self) -> int:
        """Write what is left; returns the bytes of all batches."""
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


class DiskMap:
    """Rows of values by a key of bytes or text, in a temporary database that SQLite removes by itself."""

    def __init__(self, *columns: str) -> None:
        # An empty name is a private database on disk; only what the cache can't hold is written at all.
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
        """Remove it."""
        self._database.close()

    def add(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Take in rows, their key first; where a key is there already, its values stay."""
        with scratch_errors():
            self._database.execute("BEGIN")
            try:
                self._database.executemany(self._insert, rows)
            finally:
                self._database.execute("COMMIT")

    def get(self, keys: Sequence[bytes | str]) -> Iterator[tuple[Any, ...] | None]:
        """The values of each key, or None."""
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


class Seen:
    """Which strings were there before. The first ones are kept in memory, where files are many and small."""

    def __init__(self) -> None:
        self._first: set[str] = set()
        self._others: DiskMap | None = None

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        if self._others is not None:
            self._others.close()

    def __contains__(self, item: str) -> bool:
        return item in self._first or (self._others is not None and _key(item) in self._others)

    def add(self, item: str) -> None:
        """Remember it."""
        if len(self._first) < _IN_MEMORY:
            self._first.add(item)
            return
        self._others = self._others or DiskMap()
        self._others.add([(_key(item),)])


def _key(item: str) -> bytes:
    return item.encode("utf-8", "surrogatepass")
