"""Materialize embeddings/<space>: reuse the vectors of known texts and embed the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import TypeAlias

import pyarrow as pa

from embed_assets.engine.backend import EmbeddedWindow, Embedder, Window
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import CHUNK_TABLE, RAW, TableSpec
from embed_assets.lake.vectors import VECTOR_COLUMNS, VectorStore, hash_keys, vector_batch
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.records import utc_now
from embed_assets.stages.chunk_rows import ChunkInputs, ChunkRows
from embed_assets.stages.compute import Compute
from embed_assets.stages.outcome import SAMPLED, PartitionOutcome, Progress
from embed_assets.stages.partition_vectors import PartitionVectors, Target
from embed_assets.stages.rejections import Rejections, UnembeddedChunks, replace_rejections

OnProgress: TypeAlias = Callable[[Progress], None]


def materialize_embeddings(
    partition: PartitionSnapshot,
    chunks: ChunkRows,
    target: Target,
    compute: Compute,
    provenance: Provenance,
    outcome: PartitionOutcome,
    on_progress: OnProgress = lambda progress: None,
) -> Replaced:
    """Replace the partition's embeddings with one row for each of `chunks`, in one commit, and count them in `outcome`.

    If those are the chunks of changed documents, the rows of the other documents stay.

    Vectors are reused from the partition, from windows staged by a killed run and, if `target` says so, from the whole
    table. The model is loaded only if a text has no vector yet. Windows are staged as they finish; `on_progress` is
    called after each window and every few seconds. Raises ``SupersededError`` if another run replaced the chunks or
    documents meanwhile.
    """
    staging = Staging(partition.lake, target.table, partition.key)
    with partition.watched(RAW, CHUNK_TABLE), PartitionVectors(partition, chunks, target) as vectors:
        vectors.look_up(staging, chunks.changed, may_be_damaged=provenance.rewrite)
        for finished in _embed_missing(vectors, compute, outcome, on_progress):
            vectors.add(staged(staging, finished))
        replaced = _commit(vectors, chunks, provenance, outcome)
    if target.elsewhere is not None:
        target.elsewhere.add(vectors.keys())
    staging.clear()
    return replaced


def stage_embeddings(
    partition: PartitionSnapshot,
    chunks: ChunkInputs,
    target: Target,
    compute: Compute,
    outcome: PartitionOutcome,
    on_progress: OnProgress = lambda progress: None,
    may_be_damaged: bool = True,
) -> dict[str, str]:
    """Embed chunks, of which some may not be committed yet, and stage their vectors; count them in `outcome`.

    Whoever commits the embeddings finds the staged windows: `materialize_embeddings`, or `commit_embeddings`, which
    needs what is returned: why the model has no vector of an input, by input hash.
    """
    staging = Staging(partition.lake, target.table, partition.key)
    with PartitionVectors(partition, chunks, target) as vectors:
        vectors.look_up(staging, chunks.changed, may_be_damaged)
        for finished in _embed_missing(vectors, compute, outcome, on_progress):
            if finished.staged_as is None:
                staged(staging, finished)
        return vectors.rejected


def commit_embeddings(
    partition: PartitionSnapshot,
    chunks: ChunkRows,
    target: Target,
    rejected: Mapping[str, str],
    provenance: Provenance,
    outcome: PartitionOutcome,
) -> Replaced:
    """As `materialize_embeddings`, after `stage_embeddings`, perhaps on another machine: without a model.

    Raises a retryable ``LakeError`` if a vector is missing.
    """
    staging = Staging(partition.lake, target.table, partition.key)
    with partition.watched(RAW, CHUNK_TABLE), PartitionVectors(partition, chunks, target) as vectors:
        vectors.look_up(staging, chunks.changed, may_be_damaged=provenance.rewrite)
        vectors.rejected |= rejected
        vectors.require_all()
        replaced = _commit(vectors, chunks, provenance, outcome)
    staging.clear()
    return replaced


def _commit(
    vectors: PartitionVectors, chunks: ChunkRows, provenance: Provenance, outcome: PartitionOutcome
) -> Replaced:
    """Replace the partition's embeddings, and its rejected chunks."""
    partition, table = vectors.partition, vectors.target.table
    # Vectors that were embedded again must be committed even if all columns of the content hash are unchanged.
    provenance = provenance if not outcome.embedded else provenance.rewriting()
    with Rejections(partition.key) as rejections:
        replaced = partition.replace(
            table,
            vectors.join_rows(chunks, outcome, rejections),
            provenance,
            lambda: partition.require_current(RAW, CHUNK_TABLE),
            vectors.dimension,
            chunks.changed,
        )
        own = UnembeddedChunks(table.space, chunks.changed)
        kept = replace_rejections(partition, rejections, own, provenance, lambda: partition.require_current(table))
        outcome.rejected_chunks = rejections.count + kept
    if chunks.changed is not None:
        outcome.chunks, outcome.truncated = replaced.rows, _count_truncated(partition, table)
        outcome.stored = partial(partition.rows, table, SAMPLED)
    return replaced


def _count_truncated(partition: PartitionSnapshot, table: TableSpec) -> int:
    """Rows of the partition whose chunk was truncated."""
    columns = (batch.column("is_truncated") for batch in partition.rows(table, ["is_truncated"]))
    return sum(column.true_count for column in columns)


def _embed_missing(
    vectors: PartitionVectors, compute: Compute, outcome: PartitionOutcome, on_progress: OnProgress
) -> Iterator[EmbeddedWindow]:
    """Embed the inputs without a vector, window by window. Loads the model only if there is one."""
    windows = vectors.missing_windows(compute)
    if (first := next(windows, None)) is None:
        return
    embedder, on_tick = _start(compute, first, vectors, outcome, on_progress)
    for finished in embedder.embed_windows(chain([first], windows), on_tick):
        yield finished
        outcome.embedded += vectors.count(finished)
        compute.adapt(finished.stats)
        outcome.engine.add(finished.stats)
        on_tick(vectors.embedded, outcome.engine.tokens)


def _start(
    compute: Compute,
    first: Window,
    vectors: PartitionVectors,
    outcome: PartitionOutcome,
    on_progress: OnProgress,
) -> tuple[Embedder, Callable[[int, int], None]]:
    """An embedder for the partition's texts, and a callback that reports (texts, tokens) embedded so far."""
    started = time.perf_counter()
    expected = max(len(first.texts), vectors.max_missing)
    embedder = compute.start(vectors.partition.key, first.texts, expected)
    vectors.require_dimension(embedder.dimension)
    ready = time.perf_counter()
    outcome.startup_seconds = ready - started
    return embedder, lambda texts, tokens: on_progress(Progress(texts, expected, tokens, time.perf_counter() - ready))


def staged(staging: Staging, finished: EmbeddedWindow) -> pa.RecordBatch:
    """The window's rows with `VECTOR_COLUMNS`. Stages them now, unless a worker has done so already."""
    if finished.staged_as is not None:
        return staging.read_window(finished.staged_as)
    batch = window_rows(finished)
    if batch.num_rows:
        staging.write(batch)
    return batch


def window_rows(finished: EmbeddedWindow) -> pa.RecordBatch:
    """The vectors of a window as rows with `VECTOR_COLUMNS`, omitting rejected texts."""
    hashes = finished.window.hashes
    kept = [row for row in range(len(hashes)) if row not in finished.rejected]
    return vector_batch([hashes[i] for i in kept], finished.vectors[kept], finished.is_truncated[kept], utc_now())


def known_inputs(partition: PartitionSnapshot, table: TableSpec, test_vectors: bool) -> tuple[set[str], set[str]]:
    """Input hashes that have a vector already, and ids of the partition's embedded chunks.

    With `test_vectors`, the partition's vectors are read too, and unusable ones do not count.
    """
    with VectorStore() as store:
        columns = [*VECTOR_COLUMNS, "chunk_id"] if test_vectors else ["input_hash", "chunk_id"]
        hashes: set[str] = set()
        ids: set[str] = set()
        for batch in partition.rows(table, columns):
            found = batch.column("input_hash").to_pylist()
            if test_vectors:
                store.add(batch)
                is_known = store.has(hash_keys(batch.column("input_hash"))).tolist()
                found = [input_hash for input_hash, known in zip(found, is_known, strict=True) if known]
            hashes.update(found)
            ids.update(batch.column("chunk_id").to_pylist())
    for batch in Staging(partition.lake, table, partition.key).read():
        hashes.update(batch.column("input_hash").to_pylist())
    return hashes, ids
