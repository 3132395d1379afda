"""Does int8 find the same documents? Queries are ends of documents' first chunks; the other chunks should be found."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from embed_assets.corpus.chunking import ChunkOptions, split_documents
from embed_assets.engine.backends.openvino_backend import load_int8_backend
from embed_assets.engine.backends.quantization import CALIBRATION_TEXTS, quantize
from embed_assets.engine.backends.torch_backend import load_torch_backend
from embed_assets.engine.embedder import LocalEmbedder
from embed_assets.records import hash_text
from embed_assets_tests.benchmarks import documents
from embed_assets_tests.conftest import SAMPLE_MODEL, resolve_space

_QUERY_CHARACTERS = 200


def run(folder: Path | None, count: int = 500, chunks_per_document: int = 5) -> None:
    """Print nDCG@10 and the share of first hits that are right, in float32 and in int8."""
    texts, media_type = documents.load(folder, count)
    space = resolve_space(SAMPLE_MODEL)
    queries, chunks, owners = [], [], []
    for number, split in enumerate(
        split_documents(((t, media_type) for t in texts), space.tokenizer, ChunkOptions(256))
    ):
        if len(split) > 2:
            queries.append((number, split[0].text[-_QUERY_CHARACTERS:]))
            chunks += [chunk.text for chunk in split[1 : chunks_per_document + 1]]
            owners += [number] * len(split[1 : chunks_per_document + 1])
    sample = sorted(chunks, key=hash_text)[:CALIBRATION_TEXTS]
    made = quantize(space, sample, [])
    backends = {
        "float32": load_torch_backend(space, "cpu", "float32", False),
        "int8": load_int8_backend(space, made.xml, made.weights),
    }
    print(f"\n== retrieval: {len(queries)} queries over {len(chunks)} chunks, {len(sample)} of them calibrated on ==")
    for name, backend in backends.items():
        embedder = LocalEmbedder(backend, space.tokenizer, space.max_seq_length)
        scores = embedder.embed([text for _, text in queries]).vectors @ embedder.embed(chunks).vectors.T
        ranked = np.array(owners)[np.argsort(-scores, axis=1)[:, :10]]
        hits = ranked == np.array([number for number, _ in queries])[:, None]
        discounts = 1 / np.log2(np.arange(2, 12))
        ideal = np.array([discounts[: min(10, owners.count(number))].sum() for number, _ in queries])
        ndcg = ((hits * discounts).sum(axis=1) / ideal).mean()
        print(f"{name:8} nDCG@10 {ndcg:.4f}   first hit right {hits[:, 0].mean():.4f}")


if __name__ == "__main__":
    run(None)
