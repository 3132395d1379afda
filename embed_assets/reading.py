"""Reads and searches a lake from Python: `read_embeddings`, `search` and `Searcher`, which `embed_assets` exports."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict, Unpack, overload

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable

from embed_assets.errors import LakeError
from embed_assets.lake.filters import Filter, filter_of
from embed_assets.lake.nearest import vectors_of
from embed_assets.lake.reader import files_by_partition
from embed_assets.lake.row_source import MappedRows, StoredRows
from embed_assets.lake.search import SearchResult
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.spaces import find_spaces, space_table
from embed_assets.lake.tables import Lake, TableSpec
from embed_assets.lake.widening import Width
from embed_assets.records import CopyKind
from embed_assets.scratch import ScratchFolder
from embed_assets.settings import Settings, load_settings
from embed_assets.stages.generations import pipeline_of
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.search import SearchOptions
from embed_assets.stages.search import search as search_space

if TYPE_CHECKING:
    import polars as pl

_EXPANSION = 1.5
"""Bytes of rows in memory per byte of their files: 1.4 of short texts with 384 dimensions."""
_MOST_OF_DISK = 0.5
"""Share of the free space in TMPDIR that copies of a table may take."""


class Vectors(NamedTuple):
    """Vectors and whose they are."""

    ids: pa.Table
    """The columns partition_key, document_id and chunk_id, a row per vector."""
    matrix: np.ndarray
    """float32, shape (rows, dimension), of unit norm."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The rows of a space at one version. Each call reads them anew."""

    lake: Lake
    space: str
    version: int
    """Version of the table."""
    where: str = ""
    """Condition that rows must meet; empty: all."""
    groups: tuple[str, ...] | None = None
    """Only rows that one of these groups may see; None: all."""

    @property
    def table(self) -> TableSpec:
        """The table, with its columns."""
        return self.lake.full(space_table(self.space))

    def arrow(self, columns: Sequence[str] | None = None) -> pa.RecordBatchReader:
        """The rows as a stream of Arrow batches, in no particular order. Raises ``LakeError`` if they can't be read."""
        schema = self.table.schema
        if unknown := [name for name in columns or () if name not in schema.names]:
            raise LakeError(f"embeddings have no column {unknown[0]!r}; they have {', '.join(schema.names)}")
        names = schema.names if columns is None else list(columns)
        return pa.RecordBatchReader.from_batches(pa.schema([schema.field(name) for name in names]), self._read(names))

    def polars(self) -> pl.LazyFrame:
        """The rows as a polars LazyFrame, which reads only the columns that are used. Needs polars."""
        import polars as pl
        from polars.io.plugins import register_io_source

        schema = self.table.schema

        def batches(
            columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
        ) -> Iterator[pl.DataFrame]:
            left = n_rows
            for batch in self._read(columns or schema.names):
                if left is not None and left <= 0:
                    return
                frame = pl.DataFrame(batch) if left is None else pl.DataFrame(batch.slice(0, left))
                left = None if left is None else left - len(frame)
                yield frame if predicate is None else frame.filter(predicate)

        if self._filter() is None:
            return pl.scan_delta(self._delta())
        return register_io_source(batches, schema=pl.DataFrame(schema.empty_table()).schema)

    def numpy(self) -> Vectors:
        """The vectors as a matrix, with their ids. Raises ``LakeError`` if they can't be read."""
        ids: list[pa.RecordBatch] = []
        matrix, rows = np.empty((0, 0), np.float32), 0
        for batch in self._read(["partition_key", "document_id", "chunk_id", "embedding"]):
            vectors = vectors_of(batch)
            if not rows:  # as large as it may get: memory is only taken for the rows that are filled
                matrix = np.empty((self._most_rows(), vectors.shape[1]), np.float32)
            matrix[rows : rows + len(vectors)] = vectors
            rows += len(vectors)
            ids.append(batch.select([0, 1, 2]))
        schema = pa.schema([self.table.schema.field(name) for name in ("partition_key", "document_id", "chunk_id")])
        return Vectors(pa.Table.from_batches(ids, schema), matrix[:rows])

    def _most_rows(self) -> int:
        """Rows of the table, of which the filter may leave out some."""
        files = files_by_partition(self.lake.root, self.table, self._delta())
        return sum(file.rows for some in files.values() for file in some)

    def _read(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with Snapshot(self.lake) as tables:
            tables.keep(self.table, self._delta())
            yield from StoredRows(tables, self.table).read(columns, self._filter())

    def _filter(self) -> Filter | None:
        return filter_of(self.where, self.groups, self.table.schema)

    def _delta(self) -> DeltaTable:
        found = self.lake.open_path(self.table.path, self.version)
        if found is None:
            raise LakeError(f"the space {self.space!r} has no table any more; 'embed-assets spaces' lists the others")
        return found


def read_embeddings(
    lake: str | None = None,
    *,
    space: str | None = None,
    version: int | None = None,
    where: str = "",
    groups: Sequence[str] | None = None,
) -> Embeddings:
    """The embeddings of a lake, by default of EMBED_LAKE, in its active space unless one is named.

    `version` is a version of the table, by default the newest; `where` a condition as `embed-assets search --where`
    takes it; with `groups`, only what one of them may see. No model is needed. Raises ``SettingsError`` for a wrong
    filter, ``LakeError`` if there is no such table.
    """
    found = Lake.from_settings(_settings(lake))
    chosen = space or find_spaces(found, "").active
    delta = None if chosen is None else found.open_path(space_table(chosen).path, version)
    if chosen is None or delta is None:
        what = "no embeddings" if space is None else f"no space {space!r}"
        raise LakeError(f"there are {what} in the lake {found.root!r}; run 'embed-assets sync', or name another lake")
    embeddings = Embeddings(found, chosen, int(delta.version()), where, None if groups is None else tuple(groups))
    embeddings._filter()
    return embeddings


class Searcher:
    """Searches a lake again and again: the model stays loaded, and the rows that were read are kept in local files.

    Each search sees the newest version of the active space. Threads can share it, and wait for one another. To be
    closed, or used as a context manager.
    """

    def __init__(self, lake: str | None = None) -> None:
        """`lake`, by default EMBED_LAKE, is searched with the model that made its vectors. Raises ``UserError``."""
        self._configured = Pipeline.from_settings(_settings(lake))
        self._pipelines: dict[str, Pipeline] = {}
        self._mapped: dict[str, MappedRows] = {}
        self._folder = ScratchFolder()
        self._lock = threading.Lock()

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the local files."""
        self._folder.close()

    def search(
        self, queries: Sequence[str], options: SearchOptions | None = None, space: str | None = None
    ) -> list[list[SearchResult]]:
        """Of each query the nearest chunks, best first; in the active space unless one is named.

        Raises ``SettingsError`` for a wrong filter, ``LakeError``, ``ModelError`` or ``EmbeddingError``.
        """
        with self._lock:
            pipeline = self._pipeline(space)
            return search_space(pipeline, queries, options or SearchOptions(), self._rows(pipeline))

    def _pipeline(self, space: str | None) -> Pipeline:
        """The pipeline of a space; its model stays loaded until another space is searched."""
        if space is None:
            space = find_spaces(self._configured.lake, self._configured.refreshed().model.space.name).active
        if space is None:
            root = self._configured.lake.root
            raise LakeError(f"there are no embeddings in the lake {root!r}; run 'embed-assets sync'")
        if space not in self._pipelines:
            self._pipelines = {space: pipeline_of(self._configured, space)}
            self._pipelines[space].require_embeddings()
        return self._pipelines[space]

    def _rows(self, pipeline: Pipeline) -> MappedRows | None:
        """Local copies of the space's rows; None if they would take too much of the disk."""
        table = pipeline.embeddings_table
        if table.space not in self._mapped:
            for mapped in self._mapped.values():
                mapped.keep_only(set())
            free = shutil.disk_usage(tempfile.gettempdir()).free
            is_small = _EXPANSION * _byte_size(pipeline.lake, table) < _MOST_OF_DISK * free
            self._mapped = {table.space: MappedRows(self._folder.path)} if is_small else {}
        return self._mapped.get(table.space)


def _settings(lake: str | None) -> Settings:
    """The settings as they are now, with this lake if one is named. Raises ``SettingsError``."""
    return load_settings() if lake is None else load_settings(lake=lake)


def _byte_size(lake: Lake, table: TableSpec) -> int:
    """Bytes of a table's files."""
    delta = lake.open(table)
    found = files_by_partition(lake.root, table, delta) if delta is not None else {}
    return sum(file.byte_size for files in found.values() for file in files)


_searchers: dict[str, Searcher] = {}
"""The searcher of `search`, by its settings."""
_searchers_lock = threading.Lock()


class SearchArguments(TypedDict, total=False):
    """What else `search` takes."""

    where: str
    """Condition on rows, as `embed-assets search --where` takes it."""
    groups: Sequence[str]
    """Search only what one of these groups may see."""
    space: str
    """The space to search; by default the active one."""
    distinct: bool
    """Whether to leave out chunks that repeat a better one, or nearly so."""
    context: Width
    """How far to widen results: by so many chunks, or to the "section"."""
    using: CopyKind
    """The copy to find candidates in; by default, the search is exact."""
    lake: str
    """By default EMBED_LAKE."""


@overload
def search(query: str, k: int = 10, **arguments: Unpack[SearchArguments]) -> list[SearchResult]: ...


@overload
def search(
    query: list[str] | tuple[str, ...], k: int = 10, **arguments: Unpack[SearchArguments]
) -> list[list[SearchResult]]: ...


def search(
    query: str | list[str] | tuple[str, ...], k: int = 10, **arguments: Unpack[SearchArguments]
) -> list[SearchResult] | list[list[SearchResult]]:
    """The `k` chunks nearest to a query, best first; of several queries, a list for each.

    Model and rows are kept for the next call. Raises ``SettingsError`` for a wrong filter, ``LakeError``,
    ``ModelError`` or ``EmbeddingError``.
    """
    lake, space = arguments.pop("lake", None), arguments.pop("space", None)
    options = SearchOptions(k, **arguments)  # type: ignore[misc]  # lake and space are out
    queries = [query] if isinstance(query, str) else list(query)
    found = _searcher(lake).search(queries, options, space)
    return found[0] if isinstance(query, str) else found


def _searcher(lake: str | None) -> Searcher:
    """The searcher of the settings as they are now."""
    settings = _settings(lake)
    key = f"{Lake.from_settings(settings).root} {settings.model_dump_json()}"  # the current folder may have changed
    with _searchers_lock:
        if key not in _searchers:
            while _searchers:
                _searchers.popitem()[1].close()
            _searchers[key] = Searcher(lake)
        return _searchers[key]


@atexit.register
def _close() -> None:
    for searcher in _searchers.values():
        searcher.close()
