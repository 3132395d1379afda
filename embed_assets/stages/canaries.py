"""Canaries: fixed sentences whose vectors tell whether an engine still gives what it gave when a space was new."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa

from embed_assets.engine.backend import EmbeddedWindow, Embedder, Window
from embed_assets.engine.backends.parity import MIN_COSINE
from embed_assets.errors import LakeError
from embed_assets.lake.nearest import vectors_of
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import TableSpec, lake_errors
from embed_assets.lake.vectors import vector_array
from embed_assets.records import VECTOR, hash_text
from embed_assets.stages.compute import Compute
from embed_assets.stages.embeddings import staged
from embed_assets.stages.pipeline import Pipeline

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A table of embeddings is kept in step with its documents.",
    "Water boils at 100 degrees Celsius at sea level.",
    "def add(a: int, b: int) -> int:\n    return a + b",
    "Die Würde des Menschen ist unantastbar.",
    "El perro corre por el parque todas las mañanas.",
    "機械学習は人工知能の一分野です。",
    "SELECT name FROM users WHERE id = 42;",
)
"""Prose, code and several scripts: what one change of a tokenizer or a weight leaves alone, another does not."""
LIMIT = 0.9999
"""Least cosine in float32. Batches of other texts moved a vector by less than 0.00001."""
_KEY = "_canaries"
_SCHEMA = pa.schema([pa.field("text", pa.string(), False), pa.field("precision", pa.string()), ("embedding", VECTOR)])


def keep_canaries(pipeline: Pipeline, compute: Compute) -> None:
    """Embed the canaries of a space that has none yet, by what embeds its chunks, and keep them beside its table.

    Raises ``UserError`` if they can't be embedded or written.
    """
    path = _path(pipeline.embeddings_table)
    if pipeline.lake.storage.has(path):
        return
    texts = _texts(pipeline)
    embedder = compute.start(_KEY, texts, len(texts))
    staging = Staging(pipeline.lake, pipeline.embeddings_table, _KEY)
    window = Window(texts, [hash_text(text) for text in texts])
    [vectors] = [_vectors_of(found, staging) for found in embedder.embed_windows([window], _silent)]
    staging.clear()
    _write(pipeline, vectors, compute.info.precision)


def canary_cosine(pipeline: Pipeline, embedder: Embedder, precision: str) -> tuple[float, float] | None:
    """(the lowest cosine of a canary to its vector at the space's birth, the limit that `precision` justifies).

    None if the space has no canaries: they are kept now. Raises ``LakeError`` or ``EmbeddingError``.
    """
    [found] = list(embedder.embed_windows([Window(_texts(pipeline))], _silent))
    path = _path(pipeline.embeddings_table)
    if not pipeline.lake.storage.has(path):
        _write(pipeline, found.vectors, precision)
        return None
    with lake_errors(f"the canaries {path!r} can't be read", pipeline.lake.root):
        table = pa.ipc.open_file(io.BytesIO(pipeline.lake.storage.read(path))).read_all()
    [kept] = table.to_batches()
    before = vectors_of(kept)
    if before.shape != found.vectors.shape:
        raise LakeError(
            f"canaries must have the vectors of their space, {path!r} has {before.shape}, the model gives "
            f"{found.vectors.shape}; remove the file, and another one is kept"
        )
    limit = least_cosine(precision, str(table.column("precision")[0]))
    return float(np.einsum("ij,ij->i", before, found.vectors).min()), limit


def least_cosine(*precisions: str) -> float:
    """The cosine that two vectors of a text must have at least, by the arithmetic that they were made in."""
    return min([LIMIT, *(MIN_COSINE.get(name, LIMIT) for name in precisions)])


def _texts(pipeline: Pipeline) -> list[str]:
    return [pipeline.model.space.prompt + text for text in SENTENCES]


def _path(table: TableSpec) -> str:
    return f"{table.path}/_canaries/vectors.ipc"


def _vectors_of(found: EmbeddedWindow, staging: Staging) -> np.ndarray:
    rows = staged(staging, found)
    order = {input_hash: i for i, input_hash in enumerate(rows.column("input_hash").to_pylist())}
    return np.asarray(vectors_of(rows)[[order[input_hash] for input_hash in found.window.hashes]])


def _write(pipeline: Pipeline, vectors: np.ndarray, precision: str) -> None:
    lake, path = pipeline.lake, _path(pipeline.embeddings_table)
    lake.require_writable()
    columns = [pa.array(SENTENCES), pa.array([precision] * len(SENTENCES)), vector_array(vectors)]
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
    with lake_errors(f"the canaries {path!r} can't be written", lake.root):
        lake.storage.write(path, sink.getvalue())


def _silent(texts: int, tokens: int) -> None:
    """Progress of a few sentences is not worth a report."""
