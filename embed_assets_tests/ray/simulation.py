"""A large job on a cluster of many nodes, simulated on one machine: planned, scheduled, and embedded by the fake model.

    python -m embed_assets_tests.ray.simulation [PARTITIONS] [CHUNKS_PER_PARTITION] [NODES]

What is real: the plan's arithmetic, windows, distribution, staging, results. What is not: the model, the corpus, and
the tables' commits, for which `embed_assets_tests/benchmarks/bench_memory.py` has figures.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from embed_assets.engine.capacity import Capacity, estimate_capacity
from embed_assets.engine.hardware import reset_peak_memory, resident_bytes
from embed_assets.engine.metrics import ModelCost
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import CHUNK_TABLE
from embed_assets.settings import load_settings
from embed_assets.stages.pipeline import Pipeline
from embed_assets_tests.ray.clusters import ray_cluster, windows_of

TOKENS_PER_TEXT = 9
BGE_BASE = ModelCost(12 * 12 * 768 * 768, 12 * 768)


@dataclass(frozen=True)
class Simulated:
    """What it came to."""

    partitions: int
    texts: int
    tokens: int
    windows: int
    workers: int
    seconds: float
    memory_before_bytes: int
    """Of the run's process."""
    peak_memory_bytes: int
    plan: Capacity
    """For bge-base on 8 A100, as `plan --count` would print it."""


def texts_of(partition: int, chunks: int) -> Iterator[tuple[str, int]]:
    """A partition's texts with their tokens, made up as they are asked for."""
    return ((f"chunk {n} of partition {partition} is here", TOKENS_PER_TEXT) for n in range(chunks))


def simulate(partitions: int, chunks: int, nodes: int) -> Simulated:
    """Embed so many partitions of so many chunks each on a cluster of so many nodes."""
    plan = estimate_capacity(
        BGE_BASE, partitions * chunks * TOKENS_PER_TEXT, TOKENS_PER_TEXT, "A100", devices=8, price_per_hour=1.5
    )
    with tempfile.TemporaryDirectory() as folder, ray_cluster(nodes) as cluster:
        settings = load_settings(
            lake=folder, model="fake:8", compute="ray", ray_address=cluster.address, ray_replicas=str(nodes)
        )
        pipeline = Pipeline.from_settings(settings)
        pipeline.lake.create(CHUNK_TABLE)
        compute = pipeline.open_compute()
        try:
            embedder = compute.start(["a text"], partitions * chunks)

            def embed(partition: int) -> tuple[int, int, int]:
                staging = Staging(pipeline.lake, pipeline.embeddings_table, f"p{partition}")
                texts = tokens = windows = 0
                one = compute.start(["a text"], chunks)
                for done in one.embed(
                    windows_of(compute, texts_of(partition, chunks), chunks), staging, lambda texts, tokens: None
                ):
                    texts, tokens, windows = texts + done.batch.num_rows, tokens + done.stats.tokens, windows + 1
                staging.clear()
                return texts, tokens, windows

            assert embedder.dimension == 8
            reset_peak_memory()
            before, started = resident_bytes(), time.perf_counter()
            with ThreadPoolExecutor(compute.most_partitions) as lanes:
                counts = [sum(column) for column in zip(*lanes.map(embed, range(partitions)), strict=True)]
            seconds = time.perf_counter() - started
            report = compute.report
            assert report is not None
            peak = resident_bytes(peak=True)
            return Simulated(partitions, *counts, len(report.workers), round(seconds, 1), before, peak, plan)
        finally:
            compute.close()


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    print(json.dumps(asdict(simulate(*(numbers + [1000, 10_000, 8][len(numbers) :]))), indent=2))
