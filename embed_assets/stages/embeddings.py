"""Rows of chunks -> rows of embeddings/<space>: what has a vector keeps it, what has none is embedded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from embed_assets.engine.runner import Embedder
from embed_assets.errors import LakeError
from embed_assets.lake.reader import read_partition, read_rows, scan
from embed_assets.lake.tables import CHUNK_TABLE, RAW, Lake, TableSpec, dimension_of
from embed_assets.lake.vectors import VECTOR_COLUMNS, Staging, VectorStore, vector_array, vector_batch
from embed_assets.lake.writer import Provenance, Replaced, replace_partition
from embed_assets.records import EMBEDDINGS, TIMESTAMP, hash_text, utc_now

WINDOW_SECONDS = 30.0
"""A window is about that much work: what a kill costs."""
MAX_WINDOW_TEXTS = 32_768
_FIRST_WINDOW_TEXTS = 256
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


@dataclass(slots=True)
class Work:
    """What embedding a partition came to."""

    chunks: int = 0
    embedded: int = 0
    """Texts sent to the model; identical ones once."""
    dropped: int = 0
    """Rows whose chunk is gone."""
    tokens: int = 0
    """Tokens of the texts sent to the model."""
    padded_tokens: int = 0
    truncated: int = 0
    """Chunks of which the model saw only the beginning."""
    seconds: float = 0.0
    """Time the model took."""

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
class _Window:
    """Texts that wait to be embedded together."""

    texts: dict[str, str] = field(default_factory=dict)
    """Input by its hash: identical ones once."""
    size: int = _FIRST_WINDOW_TEXTS

    def adapt(self, texts: int, seconds: float) -> None:
        """Let the next window take about `WINDOW_SECONDS`, growing at most fourfold at a time."""
        wanted = int(texts / max(seconds, 1e-3) * WINDOW_SECONDS)
        self.size = max(1, min(wanted, self.size * 4, MAX_WINDOW_TEXTS))


def materialize_embeddings(
    lake: Lake,
    table: TableSpec,
    key: str,
    prompt: str,
    get_embedder: Callable[[], Embedder],
    provenance: Provenance,
    reuse_versions: Sequence[int],
    on_window: Callable[[int, int], None],
    rewrite: bool,
) -> Embeddings:
    """Give every chunk of the partition its vector and make them the partition's rows, in one commit.

    The model is asked for (`get_embedder`) only when a text has no vector: in the partition, in windows staged by
    an attempt that was killed, or in `reuse_versions` of the whole table. Windows are staged as they finish;
    then `on_window` hears how many texts a window had, and how many tokens were embedded so far.
    """
    staging = Staging(lake, table, key)
    work = Work()
    with VectorStore() as store:
        previous = _load_previous(lake, table, key, store, may_be_damaged=rewrite)
        for batch in staging.read():
            store.add(batch)
        for hashes, texts in _missing_windows(lake, key, prompt, store, window := _Window()):
            for version in reuse_versions:
                store.add_table(read_rows(lake, table, "input_hash", hashes, VECTOR_COLUMNS, version))
                hashes, texts = _without(hashes, texts, store)
            if texts:
                _embed_window(hashes, texts, _checked(get_embedder(), lake, table), store, staging, work, window)
                on_window(len(texts), work.tokens)
        rows = _rows(lake, key, prompt, store, previous, work)
        # A vector that had to be made again must be committed, even if its row looks the same but for that.
        rewrite = rewrite or work.embedded > 0
        replaced = replace_partition(lake, table, key, rows, provenance, store.dimension, rewrite)
        work.dropped = len(previous)
    staging.clear()
    return Embeddings(replaced, work)


def _load_previous(lake: Lake, table: TableSpec, key: str, store: VectorStore, may_be_damaged: bool) -> set[bytes]:
    """Fill the store with the vectors that the partition has; returns the ids of its chunks.

    Where the rows are to be made anew because they were found damaged, unreadable ones are embedded again.
    """
    ids: set[bytes] = set()
    try:
        for batch in read_partition(lake, table, key, [*VECTOR_COLUMNS, "chunk_id"]):
            store.add(batch)
            ids.update(bytes.fromhex(chunk_id) for chunk_id in batch.column("chunk_id").to_pylist())
    except LakeError:
        if not may_be_damaged:
            raise
    return ids


def _missing_windows(
    lake: Lake, key: str, prompt: str, store: VectorStore, window: _Window
) -> Iterator[tuple[list[str], list[str]]]:
    """Hashes and inputs of the chunks that have no vector in the store, a window at a time."""
    for batch in read_partition(lake, CHUNK_TABLE, key, ["text"]):
        for text in batch.column("text").to_pylist():
            input_text = prompt + text
            input_hash = hash_text(input_text)
            if input_hash not in store:
                window.texts.setdefault(input_hash, input_text)
                if len(window.texts) >= window.size:
                    yield list(window.texts), list(window.texts.values())
                    window.texts.clear()
    if window.texts:
        yield list(window.texts), list(window.texts.values())
        window.texts.clear()


def _without(hashes: list[str], texts: list[str], store: VectorStore) -> tuple[list[str], list[str]]:
    missing = [i for i, input_hash in enumerate(hashes) if input_hash not in store]
    return [hashes[i] for i in missing], [texts[i] for i in missing]


def _embed_window(
    hashes: list[str],
    texts: list[str],
    embedder: Embedder,
    store: VectorStore,
    staging: Staging,
    work: Work,
    window: _Window,
) -> None:
    started = time.perf_counter()
    embedded = embedder.embed(texts)
    window.adapt(len(texts), time.perf_counter() - started)
    batch = vector_batch(hashes, embedded.vectors, embedded.is_truncated, utc_now())
    staging.write(batch)
    store.add(batch)
    work.embedded += len(texts)
    work.tokens += embedded.tokens
    work.padded_tokens += embedded.padded_tokens
    work.seconds += embedded.seconds


def _checked(embedder: Embedder, lake: Lake, table: TableSpec) -> Embedder:
    """The embedder, unless the space's table holds vectors of another length."""
    delta = lake.open(table)
    stored = None if delta is None else dimension_of(delta)
    if stored not in (None, embedder.dimension):
        raise LakeError(
            f"a space's vectors must all have one dimension: the table {table.path!r} has {stored}, the model gives "
            f"{embedder.dimension}; move the table away or set EMBED_MODEL and EMBED_TRUNCATE_DIM as they were"
        )
    return embedder


def _rows(
    lake: Lake, key: str, prompt: str, store: VectorStore, previous: set[bytes], work: Work
) -> Iterator[pa.RecordBatch]:
    """The partition's rows, joined from chunks, documents and vectors. Takes every chunk it meets out of `previous`."""
    documents = {
        document_id: (uri, title)
        for batch in read_partition(lake, RAW, key, ["document_id", "uri", "title"])
        for document_id, uri, title in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    }
    for batch in read_partition(lake, CHUNK_TABLE, key, _CHUNK_COLUMNS):
        chunk = {name: batch.column(name) for name in _CHUNK_COLUMNS}
        hashes = [hash_text(prompt + text) for text in chunk["text"].to_pylist()]
        stored = store.get(hashes)
        origins = [documents.get(document_id) for document_id in chunk["document_id"].to_pylist()]
        if None in origins:
            lost = chunk["document_id"][origins.index(None)].as_py()
            raise LakeError(
                f"partition {key!r}: the chunks of {lost!r} have no document in raw_documents; "
                "materialize raw_documents and chunks again"
            )
        previous.difference_update(bytes.fromhex(chunk_id) for chunk_id in chunk["chunk_id"].to_pylist())
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
