"""Materialize embeddings/<space>: reuse the vectors of known texts and embed the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import pyarrow as pa

from embed_assets.engine.backend import EmbeddedWindow, Embedder, Window
from embed_assets.errors import LakeError
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import CHUNK_TABLE, RAW, TableSpec, dimension_of, is_one_of
from embed_assets.lake.vectors import VECTOR_COLUMNS, VectorStore, vector_array, vector_batch
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.records import EMBEDDINGS, NOT_EMBEDDABLE, TIMESTAMP, Rejection, chunk_detail, hash_text, utc_now
from embed_assets.scratch import DiskMap
from embed_assets.stages.compute import Compute
from embed_assets.stages.outcome import PartitionOutcome, Progress
from embed_assets.stages.rejections import Rejections, replace_rejections

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
class Target:
    """Where vectors are stored, and what is embedded."""

    table: TableSpec
    """Embeddings table of the space."""
    prompt: str
    """Exact string before every chunk."""
    at_start: Snapshot | None = None
    """Snapshot of the lake from before this process changed it, for reusing vectors of the whole table; None to reuse
    only those of the partition."""

    def input_hash(self, text: str) -> str:
        """Hash of the model's input for a chunk's text."""
        return hash_text(self.prompt + text)


def materialize_embeddings(
    partition: PartitionSnapshot,
    target: Target,
    compute: Compute,
    provenance: Provenance,
    outcome: PartitionOutcome,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Replaced:
    """Replace the partition's embeddings with one row per chunk, in one commit, and count them in `outcome`.

    Vectors are reused from the partition, from windows staged by a killed run and, if `target` says so, from the whole
    table. The model is loaded only if a text has no vector yet. Windows are staged as they finish; `on_progress` is
    called after each window and every few seconds. Raises ``SupersededError`` if another run replaced the chunks or
    documents meanwhile.
    """
    staging = Staging(partition.lake, target.table, partition.key)
    with (
        partition.watched(RAW, CHUNK_TABLE),
        _Vectors(partition, target) as vectors,
        Rejections(partition.key) as rejections,
    ):
        vectors.look_up(staging, may_be_damaged=provenance.rewrite)
        windows = vectors.missing_windows(compute)
        if (first := next(windows, None)) is not None:
            embedder, on_tick = _start(compute, first, vectors, outcome, on_progress)
            for finished in embedder.embed_windows(chain([first], windows), on_tick):
                vectors.add(finished, staged(staging, finished))
                compute.adapt(finished.stats)
                outcome.engine.add(finished.stats)
                outcome.embedded = vectors.embedded
                on_tick(vectors.embedded, outcome.engine.tokens)
        # Vectors that were embedded again must be committed even if all columns of the content hash are unchanged.
        provenance = provenance if not outcome.embedded else provenance.rewriting()
        rows = vectors.join_rows(outcome, rejections)
        replaced = partition.replace(
            target.table, rows, provenance, lambda: partition.require_current(RAW, CHUNK_TABLE), vectors.dimension
        )
        replace_rejections(
            partition, rejections, provenance, lambda: partition.require_current(target.table), target.table.space
        )
        outcome.rejected_chunks = rejections.count
    staging.clear()
    return replaced


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
    """The vectors of a partition's chunks: those available, those being embedded and those that were rejected."""

    partition: PartitionSnapshot
    target: Target
    embedded: int = 0
    """Texts embedded so far."""
    max_missing: int = 1
    """Upper limit for the texts to embed."""
    _store: VectorStore = field(default_factory=VectorStore)
    _previous: DiskMap = field(default_factory=DiskMap)
    """Ids of the chunks in the partition's previous embeddings."""
    _under_way: set[str] = field(default_factory=set)
    """Input hashes of the windows being embedded."""
    _rejected: dict[str, str] = field(default_factory=dict)
    """Why inputs were rejected, by input hash."""

    def __enter__(self) -> _Vectors:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()
        self._previous.close()

    @property
    def dimension(self) -> int | None:
        """Length of the vectors; None while there are none."""
        return self._store.dimension

    def look_up(self, staging: Staging, may_be_damaged: bool) -> None:
        """Load the partition's existing vectors and those staged by earlier attempts.

        With `may_be_damaged`, unreadable rows are skipped, so that their texts are embedded again; otherwise they raise
        ``LakeError``.
        """
        try:
            for batch in self.partition.rows(self.target.table, [*VECTOR_COLUMNS, "chunk_id"]):
                self._store.add(batch)
                self._previous.add((bytes.fromhex(chunk_id),) for chunk_id in batch.column("chunk_id").to_pylist())
        except LakeError:
            if not may_be_damaged:
                raise
        for batch in staging.read():
            self._store.add(batch)
        self.max_missing = max(1, self.partition.count(CHUNK_TABLE) - len(self._store))

    def missing_windows(self, compute: Compute) -> Iterator[Window]:
        """Windows of inputs without a vector, each distinct input once."""
        for found in self._missing(compute):
            for tables in self._whole_tables():
                where = is_one_of("input_hash", found)
                for batch in tables.rows(self.target.table, VECTOR_COLUMNS, where):
                    self._store.add(batch)
                found = {input_hash: text for input_hash, text in found.items() if input_hash not in self._store}
                if not found:
                    break
            if found:
                self._under_way.update(found)
                yield Window(list(found.values()), list(found))

    def add(self, finished: EmbeddedWindow, batch: pa.RecordBatch) -> None:
        """Record an embedded window; `batch` are its rows with `VECTOR_COLUMNS`."""
        hashes = finished.window.hashes
        self._store.add(batch)
        self._rejected |= {hashes[row]: reason for row, reason in finished.rejected.items()}
        self._under_way.difference_update(hashes)
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

    def join_rows(self, outcome: PartitionOutcome, rejections: Rejections) -> Iterator[pa.RecordBatch]:
        """The partition's new rows, joined from chunks, documents and vectors. Counts them in `outcome`.

        Chunks whose input was rejected are added to `rejections` instead. Raises ``LakeError`` for a chunk without a
        document.
        """
        outcome.chunks = outcome.truncated = 0
        outcome.dropped = len(self._previous)
        with DiskMap("uri", "title") as documents:
            for batch in self.partition.rows(RAW, ["document_id", "uri", "title"]):
                documents.add(zip(*(column.to_pylist() for column in batch.columns), strict=True))
            for batch in self.partition.rows(CHUNK_TABLE, _CHUNK_COLUMNS):
                rows = self._without_rejected(_Chunks.of(batch, self.target, documents, self.partition.key), rejections)
                if rows.batch.num_rows:
                    yield self._joined(rows, outcome)

    def _missing(self, compute: Compute) -> Iterator[dict[str, str]]:
        """Windows of inputs, by hash, that have no vector, are not being embedded and were not rejected."""
        found: dict[str, str] = {}
        tokens = 0
        for batch in self.partition.rows(CHUNK_TABLE, ["text", "token_count"]):
            for text, count in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                input_hash = self.target.input_hash(text)
                if input_hash not in found and not self._is_known(input_hash):
                    found[input_hash] = self.target.prompt + text
                    tokens += count
                    if compute.is_full(len(found), tokens, self.max_missing):
                        yield found
                        found, tokens = {}, 0
        if found:
            yield found

    def _is_known(self, input_hash: str) -> bool:
        return input_hash in self._store or input_hash in self._under_way or input_hash in self._rejected

    def _whole_tables(self) -> tuple[Snapshot, ...]:
        """Snapshots of the whole table to look in: today's, and the one at the process's start if it is another."""
        at_start, now, table = self.target.at_start, self.partition.tables, self.target.table
        if at_start is None:
            return ()
        return (now,) if at_start.version(table) == now.version(table) else (now, at_start)

    def _without_rejected(self, chunks: _Chunks, rejections: Rejections) -> _Chunks:
        """The chunks that have a vector. The others are added to `rejections`."""
        if not self._rejected:
            return chunks
        kept = []
        columns = (chunks.batch.column(name).to_pylist() for name in ("chunk_id", "document_id"))
        for row, (chunk_id, document_id, input_hash) in enumerate(zip(*columns, chunks.hashes, strict=True)):
            if input_hash in self._rejected:
                detail = chunk_detail(self.target.table.space, chunk_id, self._rejected[input_hash])
                rejections.add(Rejection(document_id, chunks.origins[row][0], NOT_EMBEDDABLE, detail))
            else:
                kept.append(row)
        return chunks.take(kept)

    def _joined(self, chunks: _Chunks, outcome: PartitionOutcome) -> pa.RecordBatch:
        stored = self._store.get(chunks.hashes)
        chunk = {name: chunks.batch.column(name) for name in _CHUNK_COLUMNS}
        ids = [bytes.fromhex(chunk_id) for chunk_id in chunk["chunk_id"].to_pylist()]
        outcome.dropped -= sum(row is not None for row in self._previous.get(ids))
        outcome.chunks += len(ids)
        outcome.truncated += sum(stored.is_truncated)
        columns = chunk | {
            "partition_key": pa.array([self.partition.key] * len(ids), pa.string()),
            "uri": pa.array([uri for uri, _ in chunks.origins], pa.string()),
            "title": pa.array([title for _, title in chunks.origins], pa.string()),
            "is_truncated": pa.array(stored.is_truncated, pa.bool_()),
            "input_hash": pa.array(chunks.hashes, pa.string()),
            "embedding": vector_array(stored.vectors),
            "embedded_at": pa.array(stored.embedded_at, pa.int64()).cast(TIMESTAMP),
        }
        return pa.RecordBatch.from_arrays([columns[name] for name in EMBEDDINGS.names], schema=EMBEDDINGS)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Some rows of the chunks table, with the attributes needed to join them."""

    batch: pa.RecordBatch
    hashes: Sequence[str]
    """Input hash of each chunk."""
    origins: Sequence[tuple[str, str]]
    """uri and title of each chunk's document."""

    @classmethod
    def of(cls, batch: pa.RecordBatch, target: Target, documents: DiskMap, key: str) -> _Chunks:
        """Look up the chunks' documents in `documents`. `key` is the partition's, for error messages.

        Raises ``LakeError`` if a document is missing.
        """
        origins: list[tuple[str, str]] = []
        for document_id, found in zip(
            batch.column("document_id").to_pylist(), documents.get(batch.column("document_id").to_pylist()), strict=True
        ):
            if found is None:
                raise LakeError(
                    f"partition {key!r}: the chunks of {document_id!r} have no document in raw_documents; "
                    "materialize raw_documents and chunks again"
                )
            origins.append((found[0], found[1]))
        return cls(batch, [target.input_hash(text) for text in batch.column("text").to_pylist()], origins)

    def take(self, rows: Sequence[int]) -> _Chunks:
        """The chunks at the given row numbers."""
        batch = self.batch.take(pa.array(rows, pa.int64()))
        return _Chunks(batch, [self.hashes[i] for i in rows], [self.origins[i] for i in rows])


def known_inputs(partition: PartitionSnapshot, target: Target, test_vectors: bool) -> tuple[set[str], set[str]]:
    """Input hashes that have a vector already, and ids of the partition's embedded chunks.

    With `test_vectors`, the partition's vectors are read too, and unusable ones do not count.
    """
    table = target.table
    with VectorStore() as store:
        columns = [*VECTOR_COLUMNS, "chunk_id"] if test_vectors else ["input_hash", "chunk_id"]
        hashes: set[str] = set()
        ids: set[str] = set()
        for batch in partition.rows(table, columns):
            found = batch.column("input_hash").to_pylist()
            if test_vectors:
                store.add(batch)
                found = [input_hash for input_hash in found if input_hash in store]
            hashes.update(found)
            ids.update(batch.column("chunk_id").to_pylist())
    for batch in Staging(partition.lake, table, partition.key).read():
        hashes.update(batch.column("input_hash").to_pylist())
    if target.at_start is not None:
        for batch in partition.tables.rows(table, ["input_hash"]):
            hashes.update(batch.column("input_hash").to_pylist())
    return hashes, ids
