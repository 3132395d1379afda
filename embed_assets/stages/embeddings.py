"""Rows of chunks -> rows of embeddings/<space>: what has a vector keeps it, what has none is embedded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import pyarrow as pa

from embed_assets.engine.metrics import EngineStats
from embed_assets.errors import LakeError
from embed_assets.lake.inputs import Inputs
from embed_assets.lake.reader import PartitionState, read_partition, read_rows, row_count, scan
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import CHUNK_TABLE, RAW, Lake, TableSpec, dimension_of
from embed_assets.lake.vectors import VECTOR_COLUMNS, VectorStore, vector_array
from embed_assets.lake.writer import Provenance, Replaced, replace_partition
from embed_assets.records import EMBEDDINGS, NOT_EMBEDDABLE, TIMESTAMP, Rejection, chunk_detail, hash_text
from embed_assets.scratch import DiskMap
from embed_assets.stages.rejections import Rejections, replace_rejections
from embed_assets.stages.windows import Compute, Window

_CHUNK_COLUMNS = (
    "chunk_id",
    "document_id",
    "chunk_index",
    "text",
    "heading_path",
    "char_start",
    "char_end",
    "token_count",
)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a partition's embedding is."""

    texts: int
    """Texts embedded so far."""
    expected: int
    """At most so many will be."""
    tokens: int
    seconds: float
    """Since the first one."""

    @property
    def tokens_per_second(self) -> float:
        """So far."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Of the partition's texts, from 0 to 1."""
        return min(1.0, self.texts / self.expected) if self.expected else 1.0


@dataclass(slots=True)
class Work:
    """What embedding a partition came to."""

    chunks: int = 0
    """Rows: chunks that have a vector."""
    embedded: int = 0
    """Texts the model made a vector of; identical ones once."""
    rejected_chunks: int = 0
    """Chunks the model can't embed; they are in rejected_documents, with the reason."""
    dropped: int = 0
    """Rows whose chunk is gone."""
    truncated: int = 0
    """Chunks of which the model saw only the beginning."""
    startup_seconds: float = 0.0
    """Time it took until the model was ready."""
    engine: EngineStats = field(default_factory=EngineStats)

    @property
    def reused(self) -> int:
        """Chunks whose vector was there already."""
        return self.chunks - self.embedded


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What became of a partition's rows."""

    replaced: Replaced
    work: Work


@dataclass(slots=True)
class _Inputs:
    """What is known of the inputs of a partition's chunks, by their hash."""

    store: VectorStore
    under_way: set[str] = field(default_factory=set)
    """With the model at present."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Why the model has no vector for it."""

    def is_missing(self, input_hash: str) -> bool:
        """It has no vector, and is not about to get one."""
        return input_hash not in self.store and input_hash not in self.under_way and input_hash not in self.rejected


def materialize_embeddings(
    lake: Lake,
    table: TableSpec,
    key: str,
    prompt: str,
    compute: Compute,
    provenance: Provenance,
    reuse_versions: Sequence[int],
    on_window: Callable[[int, int], None],
    on_progress: Callable[[Progress], None],
    rewrite: bool,
    known: Sequence[PartitionState] = (),
) -> Embeddings:
    """Give every chunk of the partition its vector and make them the partition's rows, in one commit.

    The model is started only when a text has no vector: in the partition, in windows staged by
    an attempt that was killed, or in `reuse_versions` of the whole table. Windows are staged as they finish;
    then `on_window` hears how many texts a window had, and how many tokens were embedded so far. In between,
    `on_progress` hears every few seconds how far it is.
    """
    read = Inputs(lake, key, [RAW, CHUNK_TABLE], known)
    staging = Staging(lake, table, key)
    work = Work()
    with read.watched(), VectorStore() as store, DiskMap() as previous, Rejections(key) as rejections:
        _load_previous(lake, table, key, store, previous, may_be_damaged=rewrite)
        for batch in staging.read():
            store.add(batch)
        inputs = _Inputs(store)
        most = max(1, row_count(lake, CHUNK_TABLE, key) - len(store))
        windows = _to_embed(lake, table, key, prompt, inputs, reuse_versions, compute, most)
        first = next(windows, None)
        if first is not None:
            started = time.perf_counter()
            expected = max(len(first.texts), most)
            embedder = compute.start(list(first.texts.values()), expected)
            _check_dimension(embedder.dimension, lake, table, store)
            ready = time.perf_counter()
            work.startup_seconds = ready - started

            def on_tick(texts: int, tokens: int) -> None:
                on_progress(Progress(texts, expected, tokens, time.perf_counter() - ready))

            for finished in embedder.embed(chain([first], windows), staging, on_tick):
                store.add(finished.batch)
                inputs.rejected |= finished.rejected
                inputs.under_way.difference_update(finished.window.texts)
                work.engine.add(finished.stats)
                work.embedded += finished.batch.num_rows
                on_window(finished.batch.num_rows, work.engine.tokens)
        rows = _rows(lake, table, key, prompt, inputs, previous, work, rejections)
        # A vector that had to be made again must be committed, even if its row looks the same but for that.
        rewrite = rewrite or work.embedded > 0
        replaced = replace_partition(lake, table, key, rows, provenance, store.dimension, rewrite, read.check)
        own = Inputs(lake, key, [table], [replaced.state])
        replace_rejections(lake, key, rejections, provenance, table.space, own.check)
        work.dropped += len(previous)
        work.rejected_chunks = rejections.count
    staging.clear()
    return Embeddings(replaced, work)


def _load_previous(
    lake: Lake, table: TableSpec, key: str, store: VectorStore, previous: DiskMap, may_be_damaged: bool
) -> None:
    """Fill `store` with the vectors that the partition has, and `previous` with the ids of its chunks.

    Where the rows are to be made anew because they were found damaged, unreadable ones are embedded again.
    """
    try:
        for batch in read_partition(lake, table, key, [*VECTOR_COLUMNS, "chunk_id"]):
            store.add(batch)
            previous.add((bytes.fromhex(chunk_id),) for chunk_id in batch.column("chunk_id").to_pylist())
    except LakeError:
        if not may_be_damaged:
            raise


def _to_embed(
    lake: Lake,
    table: TableSpec,
    key: str,
    prompt: str,
    inputs: _Inputs,
    reuse_versions: Sequence[int],
    compute: Compute,
    expected: int,
) -> Iterator[Window]:
    """Windows of inputs that the model must embed: no vector is stored, or was in `reuse_versions`."""
    for found in _missing(lake, key, prompt, inputs, compute, expected):
        for version in reuse_versions:
            inputs.store.add_table(read_rows(lake, table, "input_hash", list(found), VECTOR_COLUMNS, version))
            found = {input_hash: text for input_hash, text in found.items() if input_hash not in inputs.store}
        if found:
            inputs.under_way.update(found)
            yield Window(found)


def _missing(
    lake: Lake, key: str, prompt: str, inputs: _Inputs, compute: Compute, expected: int
) -> Iterator[dict[str, str]]:
    """Windows of inputs by their hash that have no vector in the store; identical ones once."""
    found: dict[str, str] = {}
    tokens = 0
    for batch in read_partition(lake, CHUNK_TABLE, key, ["text", "token_count"]):
        for text, count in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            input_text = prompt + text
            input_hash = hash_text(input_text)
            if input_hash not in found and inputs.is_missing(input_hash):
                found[input_hash] = input_text
                tokens += count
                if compute.is_full(len(found), tokens, expected):
                    yield found
                    found, tokens = {}, 0
    if found:
        yield found


def _check_dimension(dimension: int, lake: Lake, table: TableSpec, store: VectorStore) -> None:
    """Raise ``LakeError`` where the space's table or its staged windows hold vectors of another length."""
    delta = lake.open(table)
    stored = None if delta is None else dimension_of(delta)
    if stored not in (None, dimension):
        raise LakeError(
            f"a space's vectors must all have one dimension: the table {table.path!r} has {stored}, the model gives "
            f"{dimension}; move the table away or set EMBED_MODEL and EMBED_TRUNCATE_DIM as they were"
        )
    if store.dimension not in (None, dimension):
        raise LakeError(
            f"a space's vectors must all have one dimension: windows staged in '{lake.uri(table)}/_staging' have "
            f"{store.dimension}, the model gives {dimension}; remove that folder"
        )


def _rows(
    lake: Lake,
    table: TableSpec,
    key: str,
    prompt: str,
    inputs: _Inputs,
    previous: DiskMap,
    work: Work,
    rejections: Rejections,
) -> Iterator[pa.RecordBatch]:
    """The partition's rows, joined from chunks, documents and vectors.

    Chunks that `previous` has are not dropped; chunks without a vector go to `rejections`.
    """
    with DiskMap("uri", "title") as documents:
        for batch in read_partition(lake, RAW, key, ["document_id", "uri", "title"]):
            documents.add(zip(*(column.to_pylist() for column in batch.columns), strict=True))
        for batch in read_partition(lake, CHUNK_TABLE, key, _CHUNK_COLUMNS):
            hashes = [hash_text(prompt + text) for text in batch.column("text").to_pylist()]
            origins = list(documents.get(batch.column("document_id").to_pylist()))
            if None in origins:
                lost = batch.column("document_id")[origins.index(None)].as_py()
                raise LakeError(
                    f"partition {key!r}: the chunks of {lost!r} have no document in raw_documents; "
                    "materialize raw_documents and chunks again"
                )
            if inputs.rejected:
                for rejection in _rejections(table.space, batch, hashes, inputs.rejected, origins):
                    rejections.add(rejection)
                kept = [i for i, input_hash in enumerate(hashes) if input_hash not in inputs.rejected]
                batch, hashes = batch.take(pa.array(kept, pa.int64())), [hashes[i] for i in kept]
                origins = [origins[i] for i in kept]
                if not hashes:
                    continue
            chunk = {name: batch.column(name) for name in _CHUNK_COLUMNS}
            stored = inputs.store.get(hashes)
            ids = [bytes.fromhex(chunk_id) for chunk_id in chunk["chunk_id"].to_pylist()]
            work.dropped -= sum(row is not None for row in previous.get(ids))
            work.chunks += batch.num_rows
            work.truncated += sum(stored.is_truncated)
            columns = chunk | {
                "partition_key": pa.array([key] * batch.num_rows, pa.string()),
                "uri": pa.array([origin[0] for origin in origins if origin], pa.string()),
                "title": pa.array([origin[1] for origin in origins if origin], pa.string()),
                "is_truncated": pa.array(stored.is_truncated, pa.bool_()),
                "input_hash": pa.array(hashes, pa.string()),
                "embedding": vector_array(stored.vectors),
                "embedded_at": pa.array(stored.embedded_at, pa.int64()).cast(TIMESTAMP),
            }
            yield pa.RecordBatch.from_arrays([columns[name] for name in EMBEDDINGS.names], schema=EMBEDDINGS)


def _rejections(
    space: str,
    batch: pa.RecordBatch,
    hashes: Sequence[str],
    rejected: Mapping[str, str],
    origins: Sequence[tuple[str, str] | None],
) -> Iterator[Rejection]:
    ids, owners = batch.column("chunk_id").to_pylist(), batch.column("document_id").to_pylist()
    for chunk_id, document_id, input_hash, origin in zip(ids, owners, hashes, origins, strict=True):
        if input_hash in rejected:
            detail = chunk_detail(space, chunk_id, rejected[input_hash])
            yield Rejection(document_id, origin[0] if origin else "", NOT_EMBEDDABLE, detail)


def known_inputs(
    lake: Lake, table: TableSpec, key: str, reuse_table: bool, test_vectors: bool
) -> tuple[set[str], set[str]]:
    """Input hashes that have a vector already, and the ids of the partition's embedded chunks.

    With `test_vectors`, vectors that are of no use do not count.
    """
    with VectorStore() as store:
        columns = [*VECTOR_COLUMNS, "chunk_id"] if test_vectors else ["input_hash", "chunk_id"]
        hashes: set[str] = set()
        ids: set[str] = set()
        for batch in read_partition(lake, table, key, columns):
            found = batch.column("input_hash").to_pylist()
            if test_vectors:
                store.add(batch)
                found = [input_hash for input_hash in found if input_hash in store]
            hashes.update(found)
            ids.update(batch.column("chunk_id").to_pylist())
    for batch in Staging(lake, table, key).read():
        hashes.update(batch.column("input_hash").to_pylist())
    if reuse_table:
        for batch in scan(lake, table, ["input_hash"]):
            hashes.update(batch.column("input_hash").to_pylist())
    return hashes, ids
