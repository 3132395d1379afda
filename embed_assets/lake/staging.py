"""Windows that are embedded but not yet committed: what survives a kill."""

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
"""A killed run is started again before that, or never."""


class Staging:
    """The windows of one partition, of the model whose table it is.

    One Arrow file per window under the table's ``_staging/``, which Delta's readers and vacuum leave alone. A file is
    there whole or not at all, and named after its partition. Rows are found by their input hash, so that windows of
    an attempt with other inputs are of use as far as texts are the same.
    """

    def __init__(self, lake: Lake, table: TableSpec, key: str) -> None:
        self._lake, self._folder, self._name, self.key = lake, _folder(table), hash_text(key), key
        self._known: set[str] = set()

    def write(self, batch: pa.RecordBatch, name: str | None = None) -> None:
        """Keep a window, whole or not at all; written again under the same name, it takes the first's place."""
        path = self._path(name or uuid.uuid4().hex)
        with lake_errors(f"the window {path!r} can't be staged", self._lake.root):
            self._lake.storage.write(path, bytes_of(batch))
        self._known.add(path)

    def read_window(self, name: str) -> pa.RecordBatch:
        """The window of that name. Raises ``LakeError`` where there is none, or it is damaged."""
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
        """All windows kept by earlier attempts at the partition; those that are damaged are as good as none."""
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
        """Forget the windows that were read or written here: they are committed."""
        with lake_errors(f"the staged windows in {self._folder!r} can't be removed", self._lake.root):
            for path in self._known:
                self._lake.storage.delete(path)
        self._known.clear()


def stale_windows(lake: Lake, table: TableSpec, age: timedelta = STALE_WINDOWS) -> list[StoredFile]:
    """Windows that were written so long ago: of killed runs after which nothing needed them."""
    before = utc_now() - age
    with lake_errors(f"the staged windows of {table.path!r} can't be listed", lake.root):
        return [file for file in lake.storage.files(_folder(table)) if file.modified_at < before]


def remove_windows(lake: Lake, windows: Iterable[StoredFile]) -> None:
    """Remove some of `stale_windows`."""
    with lake_errors("stale staged windows can't be removed", lake.root):
        for file in windows:
            lake.storage.delete(file.path)


def _folder(table: TableSpec) -> str:
    return f"{table.path}/_staging"


def bytes_of(batch: pa.RecordBatch) -> bytes:
    """A batch as the bytes of an Arrow file: columns are buffers in it, vectors little-endian float32."""
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, batch.schema) as stream:
        stream.write_batch(batch)
    return buffer.getvalue()


def batches_of(data: bytes) -> list[pa.RecordBatch]:
    """The batches of a window's bytes; all of them or an error."""
    with pa.ipc.open_stream(io.BytesIO(data)) as stream:
        batches = list(stream)
    for batch in batches:
        if not batch.schema.equals(VECTOR_ROWS):
            raise ValueError(f"its columns are {batch.schema.names}")
        batch.validate(full=True)
        if not all(map(_HASH.fullmatch, batch.column("input_hash").to_pylist())):
            raise ValueError("it has hashes that are none")
    return batches
