"""Tokens per second of the engine against ``SentenceTransformer.encode``, interleaved, on the same chunks."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from embed_assets.corpus.chunking import ChunkOptions, split_documents
from embed_assets.engine.backends import load_embedder
from embed_assets.engine.model import load_sentence_transformer, resolve_space
from embed_assets_tests.benchmarks import documents
from embed_assets_tests.conftest import SAMPLE_MODEL


def run(folder: Path | None, chunks: int = 192, rounds: int = 3) -> None:
    """Print the medians of some rounds, their ratio, and the least cosine between the two."""
    texts, media_type = documents.load(folder, 24)
    space = resolve_space(SAMPLE_MODEL)
    split = split_documents(((t, media_type) for t in texts), space.tokenizer, ChunkOptions(256))
    corpus = [chunk.text for found in split for chunk in found][:chunks]
    tokens = sum(space.tokenizer.count(corpus))
    embedder, reference = load_embedder(space, "cpu"), load_sentence_transformer(space, "cpu")
    ours, theirs = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        vectors = embedder.embed(corpus).vectors
        ours.append(tokens / (time.perf_counter() - started))
        started = time.perf_counter()
        expected = reference.encode(corpus, normalize_embeddings=True)
        theirs.append(tokens / (time.perf_counter() - started))
    print(f"\n== embedding: {len(corpus)} chunks, {tokens:,} tokens, CPU float32, median of {rounds}, interleaved ==")
    print(f"embed_assets                 {statistics.median(ours):8,.0f} tokens/s")
    print(f"SentenceTransformer.encode   {statistics.median(theirs):8,.0f} tokens/s")
    ratio, cosine = statistics.median(ours) / statistics.median(theirs), (vectors * expected).sum(axis=1).min()
    print(f"ratio {ratio:.2f}, least cosine {cosine:.6f}")


if __name__ == "__main__":
    run(None)
