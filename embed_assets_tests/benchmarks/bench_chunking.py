"""How fast texts are chunked on one core, and how many chunks an inserted sentence changes.

Peers: LangChain's recursive and Markdown splitters and semantic-text-splitter at 1,000 characters; greedy packing
of our own cuts. A changed chunk is one whose text is new: each costs an embedding.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from embed_assets.corpus.chunking import ChunkOptions, _Splitter, _Tokens, split_document, split_documents
from embed_assets.corpus.structure import find_structure
from embed_assets.engine.tokenization import ModelTokenizer
from embed_assets_tests.benchmarks import documents
from embed_assets_tests.conftest import SAMPLE_MODEL, resolve_space

OPTIONS = ChunkOptions(256)
SENTENCES = (
    "The compiler rejects this program because the lifetime of the borrowed value is too short.",
    "This was discussed at length in the earlier thread and nobody objected.",
    "We should therefore consider a different approach in this position, even though it costs more than the others.",
)
Splitter = Callable[[str], list[str]]


def run(folder: Path | None, edits: int = 4, sample: int = 200) -> None:
    """Print speed and locality."""
    print("\n== chunking: speed, one core (median of 5) ==")
    for name, environment in (("one core", {"RAYON_NUM_THREADS": "1"}), ("all cores", {})):
        command = [
            sys.executable,
            "-m",
            "embed_assets_tests.benchmarks.bench_chunking",
            *([str(folder)] if folder else []),
        ]
        if name == "one core" and hasattr(os, "sched_setaffinity"):
            command = ["taskset", "-c", "0", *command]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        print(f"{name}: {done.stdout.strip()}")
    print(f"\n== chunking: chunks changed by an inserted sentence ({sample} documents x {edits} places) ==")
    texts, media_type = documents.load(folder, sample)
    tokenizer = resolve_space(SAMPLE_MODEL).tokenizer
    plain = [documents.without_headings(text) for text in texts]
    for label, corpus, kind in (("with headings", texts, media_type), ("without headings", plain, "text/plain")):
        print(f"{label}:")
        for name, splitter in splitters(tokenizer, kind).items():
            chunks, changes = locality(splitter, corpus, edits)
            print(
                f"  {name:34} chunks {chunks:6}  changed: mean {statistics.mean(changes):.2f}, "
                f"95th percentile {np.percentile(changes, 95):.0f}"
            )


def splitters(tokenizer: ModelTokenizer, media_type: str) -> dict[str, Splitter]:
    """Our splitter, greedy packing of our cuts, and the installed peers, by name."""
    found: dict[str, Splitter] = {
        "embed_assets, 256 tokens": lambda text: [c.text for c in split_document(text, media_type, tokenizer, OPTIONS)],
        "greedy packing, 256 tokens": lambda text: greedy(text, media_type, tokenizer),
    }
    try:
        from langchain_text_splitters import MarkdownTextSplitter, RecursiveCharacterTextSplitter
        from semantic_text_splitter import MarkdownSplitter, TextSplitter
    except ImportError:
        print("  (peers are not installed: pip install 'embed-assets[bench]')")
        return found
    recursive = RecursiveCharacterTextSplitter(chunk_size=1000, chunk_overlap=0)
    markdown = MarkdownTextSplitter(chunk_size=1000, chunk_overlap=0)
    semantic = (MarkdownSplitter if media_type == "text/markdown" else TextSplitter)(1000)
    return found | {
        "LangChain recursive, 1,000 chars": recursive.split_text,
        "LangChain Markdown, 1,000 chars": markdown.split_text,
        "semantic-text-splitter, 1,000 chars": semantic.chunks,
    }


def greedy(text: str, media_type: str, tokenizer: ModelTokenizer) -> list[str]:
    """Chunks as full as possible, from the same cuts that our splitter chooses from."""
    tokens = _Tokens.join(text, [(0, len(text))], tokenizer.tokens([text]))
    cuts, _ = _Splitter(text, find_structure(text, media_type), tokens, tokenizer, OPTIONS)._cuts()
    bounds = [0, *cuts.tolist(), len(text)]
    before = tokens.index(np.array(bounds))
    chunks, first = [], 0
    for i in range(1, len(bounds)):
        if before[i] - before[first] > OPTIONS.max_tokens - tokenizer.special_tokens and i - 1 > first:
            chunks.append(text[bounds[first] : bounds[i - 1]])
            first = i - 1
    return [*chunks, text[bounds[first] :]]


def locality(splitter: Splitter, texts: list[str], edits: int) -> tuple[int, list[int]]:
    """(chunks of all texts, chunks changed by each edit)."""
    rng = random.Random(7)
    chunks, changes = 0, []
    for text in texts:
        before = splitter(text)
        known = set(before)
        chunks += len(before)
        for _ in range(edits):
            place = rng.randrange(len(text))
            while place < len(text) and not text[place].isspace():
                place += 1
            edited = f"{text[:place]} {rng.choice(SENTENCES)}{text[place:]}"
            changes.append(sum(chunk not in known for chunk in splitter(edited)))
    return chunks, changes


def measure_speed(folder: Path | None) -> None:
    """Print megabytes per second of chunking everything, tokenization included."""
    texts, media_type = documents.load(folder)
    tokenizer = resolve_space(SAMPLE_MODEL).tokenizer
    while sum(map(len, texts)) < 2_000_000:
        texts = texts + texts
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    speeds = []
    for _ in range(5):
        started = time.perf_counter()
        chunks = sum(
            len(found) for found in split_documents(((text, media_type) for text in texts), tokenizer, OPTIONS)
        )
        speeds.append(megabytes / (time.perf_counter() - started))
    print(f"{statistics.median(speeds):.2f} MB/s over {megabytes:.1f} MB, {chunks} chunks")


if __name__ == "__main__":
    measure_speed(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
