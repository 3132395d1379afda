"""Materialize embeddings/<space>: reuse the vectors of known texts and embed the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa

from embed_assets.engine.backend import EmbeddedWindow, Embedder, Window
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import LakeError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import (
    CHUNK_TABLE,
    MOST_VALUES,
    RAW,
    TableSpec,
    dimension_of,
    is_one_of,
    partition_predicate,
)
from embed_assets.lake.vectors import VECTOR_COLUMNS, HashIndex, VectorStore, hash_keys, vector_array, vector_batch
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.records import EMBEDDINGS, NOT_EMBEDDABLE, TIMESTAMP, Rejection, chunk_detail, utc_now
from embed_assets.stages.chunk_rows import ROWS, ChunkInputs, ChunkRows
from embed_assets.stages.compute import Compute
from embed_assets.stages.elsewhere import Elsewhere
from embed_assets.stages.outcome import SAMPLED, PartitionOutcome, Progress, Sample
from embed_assets.stages.rejections import Rejections, UnembeddedChunks, replace_rejections


@dataclass(frozen=True, slots=True)
class Target:
    """Where vectors are stored, and what is embedded."""

    table: TableSpec
    """Embeddings table of the space."""
    prompt: str
    """Exact string before every chunk."""
    elsewhere: Elsewhere | None = None
    """Vectors of the whole table; None to reuse only those of the partition."""


def materialize_embeddings(
    partition: PartitionSnapshot,
    chunks: ChunkRows,
    target: Target,
    compute: Compute,
    provenance: Provenance,
    outcome: PartitionOutcome,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Replaced:
    """Replace the partition's embeddings with one row for each of `chunks`, in one commit, and count them in `outcome`.

    If those are the chunks of changed documents, the rows of the other documents stay.

    Vectors are reused from the partition, from windows staged by a killed run and, if `target` says so, from the whole
    table. The model is loaded only if a text has no vector yet. Windows are staged as they finish; `on_progress` is
    called after each window and every few seconds. Raises ``SupersededError`` if another run replaced the chunks or
    documents meanwhile.
    """
    staging = Staging(partition.lake, target.table, partition.key)
    with (
        partition.watched(RAW, CHUNK_TABLE),
        _Vectors(partition, chunks, target) as vectors,
        Rejections(partition.key) as rejections,
    ):
        vectors.look_up(staging, chunks.changed, may_be_damaged=provenance.rewrite)
        _embed_missing(vectors, staging, compute, outcome, on_progress)
        # Vectors that were embedded again must be committed even if all columns of the content hash are unchanged.
        provenance = provenance if not outcome.embedded else provenance.rewriting()
        rows = vectors.join_rows(chunks, outcome, rejections)
        replaced = partition.replace(
            target.table,
            rows,
            provenance,
            lambda: partition.require_current(RAW, CHUNK_TABLE),
            vectors.dimension,
            chunks.changed,
        )
        own = UnembeddedChunks(target.table.space, chunks.changed)
        kept = replace_rejections(
            partition, rejections, own, provenance, lambda: partition.require_current(target.table)
        )
        outcome.rejected_chunks = rejections.count + kept
        if chunks.changed is not None:
            outcome.chunks, outcome.truncated = replaced.rows, _count_truncated(partition, target.table)
            outcome.stored = partial(partition.rows, target.table, SAMPLED)
    if target.elsewhere is not None:
        target.elsewhere.add(vectors.keys())
    staging.clear()
    return replaced


def _count_truncated(partition: PartitionSnapshot, table: TableSpec) -> int:
    """Rows of the partition whose chunk was truncated."""
    columns = (batch.column("is_truncated") for batch in partition.rows(table, ["is_truncated"]))
    return sum(column.true_count for column in columns)


def embed_ahead(
    partition: PartitionSnapshot,
    chunks: ChunkInputs,
    target: Target,
    compute: Compute,
    outcome: PartitionOutcome,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Embed chunks that are not committed yet, and stage their vectors; count them in `outcome`.

    `materialize_embeddings` finds the staged windows when the chunks are in the lake.
    """
    staging = Staging(partition.lake, target.table, partition.key)
    with _Vectors(partition, chunks, target) as vectors:
        vectors.look_up(staging, None, may_be_damaged=True)
        _embed_missing(vectors, staging, compute, outcome, on_progress)


def _embed_missing(
    vectors: _Vectors,
    staging: Staging,
    compute: Compute,
    outcome: PartitionOutcome,
    on_progress: Callable[[Progress], None],
) -> None:
    """Embed and stage the inputs without a vector, window by window. Loads the model only if there is one."""
    windows = vectors.missing_windows(compute)
    if (first := next(windows, None)) is None:
        return
    embedder, on_tick = _start(compute, first, vectors, outcome, on_progress)
    for finished in embedder.embed_windows(chain([first], windows), on_tick):
        batch = staged(staging, finished)
        vectors.add(finished, batch)
        compute.adapt(finished.stats)
        outcome.engine.add(finished.stats)
        outcome.embedded += batch.num_rows
        on_tick(vectors.embedded, outcome.engine.tokens)


def _start(
    compute: Compute,
    first: Window,
    vectors: _Vectors,
    outcome: PartitionOutcome,
    on_progress: Callable[[Progress], None],
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


@dataclass(slots=True)
class _Vectors:
    """The vectors of a partition's chunks: those available, those asked for and those that were rejected."""

    partition: PartitionSnapshot
    chunks: ChunkInputs
    target: Target
    embedded: int = 0
    """Texts embedded so far."""
    max_missing: int = 1
    """Upper limit for the texts to embed."""
    _store: VectorStore = field(default_factory=VectorStore)
    _previous: HashIndex = field(default_factory=HashIndex)
    """Ids of the chunks in the partition's previous embeddings."""
    _asked: HashIndex = field(default_factory=HashIndex)
    """Hashes of the inputs that were put into a window."""
    _rejected: dict[str, str] = field(default_factory=dict)
    """Why inputs were rejected, by input hash."""

    def __enter__(self) -> _Vectors:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    @property
    def dimension(self) -> int | None:
        """Length of the vectors; None while there are none."""
        return self._store.dimension

    def look_up(self, staging: Staging, changed: frozenset[str] | None, may_be_damaged: bool) -> None:
        """Load the partition's existing vectors, as far as `changed` documents need them, and staged ones.

        With `may_be_damaged`, unreadable rows are skipped, so that their texts are embedded again; otherwise they raise
        ``LakeError``.
        """
        try:
            for batch in self.partition.only(changed).rows(self.target.table, [*VECTOR_COLUMNS, "chunk_id"]):
                self._store.add(batch)
                self._previous.add_new(hash_keys(batch.column("chunk_id")))
        except LakeError:
            if not may_be_damaged:
                raise
        for batch in staging.read():
            self._store.add(batch)
        missing = self.chunks.count - len(self._store) if changed is None else self._look_up_others()
        self.max_missing = max(1, missing)

    def _look_up_others(self) -> int:
        """Load the vectors that unchanged documents have of the same texts: text may have moved between documents.

        Returns how many texts have no vector.
        """
        wanted = HashIndex()
        for batch in self.chunks.inputs():
            keys = hash_keys(batch.column("input_hash"))
            wanted.add_new(keys[~self._store.has(keys)])
        table, found = self.target.table, set[str]()
        for batch in self.partition.rows(table, ["input_hash"]) if len(wanted) else ():
            hashes = batch.column("input_hash")
            found.update(hashes.filter(pa.array(wanted.find(hash_keys(hashes)) >= 0)).to_pylist())
        where = partition_predicate(self.partition.key)
        if len(found) <= MOST_VALUES:
            where += f" AND {is_one_of('input_hash', sorted(found))}" if found else ""
        for batch in self.partition.tables.rows(table, VECTOR_COLUMNS, where) if found else ():
            is_wanted = wanted.find(hash_keys(batch.column("input_hash"))) >= 0
            self._store.add(batch.filter(pa.array(is_wanted)))
        return len(wanted) - len(found)

    def missing_windows(self, compute: Compute) -> Iterator[Window]:
        """Windows of inputs without a vector, each distinct input once."""
        for found in self._missing(compute):
            if self.target.elsewhere is not None:
                for batch in self.target.elsewhere.vectors(found.column("input_hash"), self.partition.tables):
                    self._store.add(batch)
                found = found.filter(pa.array(~self._store.has(hash_keys(found.column("input_hash")))))
            if found.num_rows:
                yield _window(found, self.target.prompt)

    def keys(self) -> np.ndarray:
        """The `hash_keys` of all inputs with a vector."""
        return self._store.keys()

    def add(self, finished: EmbeddedWindow, batch: pa.RecordBatch) -> None:
        """Record an embedded window; `batch` are its rows with `VECTOR_COLUMNS`."""
        self._store.add(batch)
        self._rejected |= {finished.window.hashes[row]: reason for row, reason in finished.rejected.items()}
        self.embedded += batch.num_rows

    def require_dimension(self, dimension: int) -> None:
        """Raise ``LakeError`` if the space's table or its staged windows have vectors of another length."""
        table, lake = self.target.table, self.partition.lake
        delta = self.partition.tables.table(table)
        stored = None if delta is None else dimension_of(delta)
        if stored not in (None, dimension):
            raise LakeError(
                f"a space's vectors must all have one dimension: the table {table.path!r} has {stored}, the model "
                f"gives {dimension}; move the table away or restore EMBED_MODEL and EMBED_TRUNCATE_DIM"
            )
        if self.dimension not in (None, dimension):
            raise LakeError(
                f"a space's vectors must all have one dimension: windows staged in '{lake.uri(table)}/_staging' have "
                f"{self.dimension}, the model gives {dimension}; remove that folder"
            )

    def join_rows(
        self, chunks: ChunkRows, outcome: PartitionOutcome, rejections: Rejections
    ) -> Iterator[pa.RecordBatch]:
        """The partition's new rows, joined from chunks, documents and vectors. Counts them in `outcome`.

        Chunks whose input was rejected are added to `rejections` instead. Raises ``LakeError`` for a chunk without a
        document.
        """
        outcome.chunks = outcome.truncated = 0
        outcome.sample = Sample()
        outcome.dropped = len(self._previous)
        for batch in chunks.rows():
            kept = self._without_rejected(batch, rejections)
            if kept.num_rows:
                yield self._joined(kept, outcome)

    def _missing(self, compute: Compute) -> Iterator[pa.RecordBatch]:
        """Batches with `INPUTS`, a window each, of inputs that have no vector and were in no window before."""
        parts: list[pa.RecordBatch] = []
        texts = tokens = 0
        for batch in self.chunks.inputs():
            keys = hash_keys(batch.column("input_hash"))
            new = np.flatnonzero(self._asked.is_new(keys) & ~self._store.has(keys))
            self._asked.add(keys[new])
            counts = batch.column("token_count").to_numpy()[new].tolist()
            first = 0
            for i, count in enumerate(counts):
                texts, tokens = texts + 1, tokens + count
                if compute.is_full(texts, tokens, self.max_missing):
                    yield _joined_batch([*parts, batch.take(pa.array(new[first : i + 1]))])
                    parts, texts, tokens, first = [], 0, 0, i + 1
            if first < len(new):
                parts.append(batch.take(pa.array(new[first:])))
        if parts:
            yield _joined_batch(parts)

    def _without_rejected(self, chunks: pa.RecordBatch, rejections: Rejections) -> pa.RecordBatch:
        """The chunks that have a vector. The others are added to `rejections`."""
        if not self._rejected:
            return chunks
        kept = []
        columns = (chunks.column(name).to_pylist() for name in ("chunk_id", "document_id", "uri", "input_hash"))
        for row, (chunk_id, document_id, uri, input_hash) in enumerate(zip(*columns, strict=True)):
            if input_hash in self._rejected:
                detail = chunk_detail(self.target.table.space, chunk_id, self._rejected[input_hash])
                rejections.add(Rejection(document_id, uri, NOT_EMBEDDABLE, detail))
            else:
                kept.append(row)
        return chunks.take(pa.array(kept, pa.int64()))

    def _joined(self, chunks: pa.RecordBatch, outcome: PartitionOutcome) -> pa.RecordBatch:
        stored = self._store.get(hash_keys(chunks.column("input_hash")))
        outcome.dropped -= int((self._previous.find(hash_keys(chunks.column("chunk_id"))) >= 0).sum())
        outcome.chunks += chunks.num_rows
        outcome.truncated += int(stored.is_truncated.sum())
        columns = {name: chunks.column(name) for name in ROWS} | {
            "partition_key": pa.repeat(pa.scalar(self.partition.key, pa.string()), chunks.num_rows),
            "is_truncated": pa.array(stored.is_truncated, pa.bool_()),
            "embedding": vector_array(stored.vectors),
            "embedded_at": pa.array(stored.embedded_at, pa.int64()).cast(TIMESTAMP),
        }
        rows = pa.RecordBatch.from_arrays([columns[name] for name in EMBEDDINGS.names], schema=EMBEDDINGS)
        outcome.sample.add(rows)
        return rows


def _joined_batch(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return parts[0] if len(parts) == 1 else pa.concat_batches(parts)


def _window(inputs: pa.RecordBatch, prompt: str) -> Window:
    """The window of a batch with `INPUTS`, tokenized if all token ids are known."""
    texts = [prompt + text for text in inputs.column("text").to_pylist()]
    tokens = TokenizedTexts.from_lists(inputs.column("input_ids"))
    return Window(texts, inputs.column("input_hash").to_pylist(), tokens)


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
