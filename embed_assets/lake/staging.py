"""Stage embedded windows before they are committed, so that a killed run loses little work."""

from __future__ import annotations

import io
import logging
import re
import uuid
from collections.abc import Iterable, Iterator
from datetime import timedelta

import pyarrow as pa

from embed_assets.errors import LakeError
from embed_assets.lake.storage import StoredFile
from embed_assets.lake.tables import Lake, TableSpec, lake_errors
from embed_assets.lake.vectors import VECTOR_ROWS
from embed_assets.records import hash_text, utc_now

_log = logging.getLogger(__name__)

_HASH = re.compile("[0-9a-f]{32}")
STALE_WINDOWS = timedelta(days=2)
"""Age at which a window counts as left by a killed run that nobody will resume. Longer keeps more files
around, shorter may mean embedding texts again."""


class Staging:
    """Staged windows of one partition in one embedding space.

    Each window is an Arrow file, written atomically, under the table's ``_staging/``, which Delta's readers and vacuum
    ignore; its name starts with a hash of the partition key. Rows are looked up by input hash, so vectors of unchanged
    texts are reused even if the other inputs have changed since.
    """

    def __init__(self, lake: Lake, table: TableSpec, key: str) -> None:
        self._lake, self._folder, self._name, self.key = lake, _folder(table), hash_text(key), key
        self._known: set[str] = set()

    def write(self, batch: pa.RecordBatch, name: str | None = None) -> None:
        """Stage a window atomically, under a new name or, overwriting, under `name`. Raises ``LakeError``."""
        self._lake.require_writable()
        path = self._path(name or uuid.uuid4().hex)
        with lake_errors(f"the window {path!r} can't be staged", self._lake.root):
            self._lake.storage.write(path, bytes_of(batch))
        self._known.add(path)

    def read_window(self, name: str) -> pa.RecordBatch:
        """The window `name`. Raises a retryable ``LakeError`` if it is missing or damaged."""
        path = self._path(name)
        with lake_errors(f"the staged window {path!r} can't be read", self._lake.root):
            try:
                [batch] = batches_of(self._lake.storage.read(path))
            except FileNotFoundError as error:
                why = "another run of its partition has committed it, or EMBED_LAKE is another folder on this machine"
                raise LakeError(f"the staged window {path!r} is gone: {why}; run again", is_retryable=True) from error
            except (pa.ArrowException, ValueError) as error:
                raise LakeError(
                    f"the staged window {path!r} is damaged: {error}; run again", is_retryable=True
                ) from error
        self._known.add(path)
        return batch

    def _path(self, name: str) -> str:
        return f"{self._folder}/{self._name}-{name}.arrow"

    def read(self) -> Iterator[pa.RecordBatch]:
        """All windows staged by earlier attempts at this partition. Damaged ones are skipped with a warning."""
        with lake_errors(f"the staged windows in {self._folder!r} can't be read", self._lake.root):
            for file in self._lake.storage.files(self._folder):
                if not file.path.startswith(f"{self._folder}/{self._name}"):
                    continue
                self._known.add(file.path)
                try:
                    yield from batches_of(self._lake.storage.read(file.path))
                except FileNotFoundError:
                    continue  # another run committed the partition meanwhile
                except (pa.ArrowException, OSError, ValueError) as error:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    _log.warning(
                        "the staged window %s is damaged (%s); its texts are embedded again", file.path, reason
                    )

    def clear(self) -> None:
        """Delete the windows read or written through this object, after their rows were committed."""
        with lake_errors(f"the staged windows in {self._folder!r} can't be removed", self._lake.root):
            for path in self._known:
                self._lake.storage.delete(path)
        self._known.clear()


def stale_windows(lake: Lake, table: TableSpec, age: timedelta = STALE_WINDOWS) -> list[StoredFile]:
    """Windows of a table older than `age`: leftovers of killed runs. Raises ``LakeError``."""
    before = utc_now() - age
    with lake_errors(f"the staged windows of {table.path!r} can't be listed", lake.root):
        return [file for file in lake.storage.files(_folder(table)) if file.modified_at < before]


def remove_windows(lake: Lake, windows: Iterable[StoredFile]) -> None:
    """Delete windows returned by `stale_windows`. Raises ``LakeError``."""
    with lake_errors("stale staged windows can't be removed", lake.root):
        for file in windows:
            lake.storage.delete(file.path)


def _folder(table: TableSpec) -> str:
    return f"{table.path}/_staging"


def bytes_of(batch: pa.RecordBatch) -> bytes:
    """The batch as an Arrow IPC stream, which stores vectors as little-endian float32."""
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, batch.schema) as stream:
        stream.write_batch(batch)
    return buffer.getvalue()


def batches_of(data: bytes) -> list[pa.RecordBatch]:
    """The batches in the bytes of a window. Raises ``ValueError`` or ``pa.ArrowException`` if anything is damaged."""
    with pa.ipc.open_stream(io.BytesIO(data)) as stream:
        batches = list(stream)
    for batch in batches:
        if not batch.schema.equals(VECTOR_ROWS):
            raise ValueError(f"its columns are {batch.schema.names}")
        batch.validate(full=True)
        if not all(map(_HASH.fullmatch, batch.column("input_hash").to_pylist())):
            raise ValueError("it has malformed input hashes")
    return batches
