"""The engine on Ray against itself in one process, and against a plain Ray Data script, on the same cores.

All embed the same texts, alternating; rates are measured from the first text to the last, without start-up.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from embed_assets.engine.hardware import available_cores
from embed_assets.engine.metrics import EngineStats
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import CHUNK_TABLE
from embed_assets.sample import write_sample
from embed_assets.settings import load_settings
from embed_assets.stages.embeddings import staged
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.remote import open_compute
from embed_assets_tests.cluster.clusters import STORE_BYTES, windows_of

BATCH = 64
_TEXTS, _CHUNK_TOKENS = 5000, 96
_ROUNDS = 3


class Encoder:
    """The obvious first attempt: the model in an actor, one batch at a time."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self._model = SentenceTransformer(model, device="cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        started = time.time()
        vectors = self._model.encode(list(batch["text"]), normalize_embeddings=True)
        count = len(vectors)
        return {"embedding": vectors, "started": [started] * count, "ended": [time.time()] * count}


@dataclass(frozen=True)
class PlainScript:
    """`map_batches` over `SentenceTransformer.encode`."""

    actors: int
    model: str

    @property
    def name(self) -> str:
        """Name with the number of actors and threads."""
        return f"plain script, actors x threads: {self.actors} x {available_cores() // self.actors}"

    def seconds(self, texts: Sequence[str]) -> float:
        """Seconds from the start of the first batch to the end of the last, without loading the model."""
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        threads = available_cores() // self.actors
        rows = ray.data.from_arrow(pa.table({"text": list(texts)})).repartition(2 * self.actors).materialize()
        done = rows.map_batches(
            Encoder,
            fn_constructor_args=(self.model, threads),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=self.actors),
            num_cpus=threads * 0.9,  # leaves some CPU for reading
        ).to_pandas()
        assert len(done) == len(texts)
        return float(done["ended"].max() - done["started"].min())


class Subject:
    """The engine, in this process or on Ray."""

    def __init__(self, name: str, lake: str, texts: Sequence[str], **settings: str) -> None:
        self.name = name
        self._pipeline = Pipeline.from_settings(load_settings(lake=lake, **settings))
        self._pipeline.lake.create(CHUNK_TABLE)
        self._tokens = self._pipeline.model.space.tokenizer.count(list(texts))
        self.stats = EngineStats()
        started = time.perf_counter()
        self.compute = open_compute(self._pipeline)
        self.compute.start("p", list(texts), len(texts))
        self.seconds(texts[:512])  # tunes the engine and warms it up
        self.startup_seconds = time.perf_counter() - started

    def seconds(self, texts: Sequence[str]) -> float:
        """Seconds to embed the texts, staging included."""
        staging = Staging(self._pipeline.lake, self._pipeline.embeddings_table, "p")
        embedder = self.compute.start("p", list(texts), len(self._tokens))
        windows = windows_of(self.compute, zip(texts, self._tokens, strict=False), len(texts))
        started = time.perf_counter()
        for done in embedder.embed_windows(windows, lambda *_: None):
            staged(staging, done)
            self.compute.adapt(done.stats)
            self.stats.add(done.stats)
        seconds = time.perf_counter() - started
        staging.clear()
        return seconds


def run(folder: Path | None, rounds: int = _ROUNDS) -> None:
    """Print the table, for up to 5,000 chunks of the documents in a folder, by default the sample corpus."""
    with tempfile.TemporaryDirectory() as sample:
        if folder is None:
            write_sample(Path(sample))
        source = load_settings(source=str(folder or sample), chunk_tokens=_CHUNK_TOKENS)
        compare(Pipeline.from_settings(source).corpus.sample(_TEXTS), rounds)


def compare(texts: Sequence[str], rounds: int) -> None:
    """Print the table for these texts."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    space = Pipeline.from_settings(load_settings()).model.float_space
    tokens, cores = sum(space.tokenizer.count(list(texts))), available_cores()
    with tempfile.TemporaryDirectory() as folder:
        # Twice the cores: the engine's worker keeps its CPUs while the plain script runs.
        options = {"num_cpus": 2 * cores, "object_store_memory": 4 * STORE_BYTES, "include_dashboard": False}
        ray.init(address="local", logging_level="ERROR", log_to_driver=False, **options)
        on_ray = {
            "compute": "ray",
            "ray_address": ray.get_runtime_context().gcs_address,
            "ray_replicas": "1",
            "ray_cpus_per_replica": str(cores),
        }
        engines = [
            Subject("this engine, one process", f"{folder}/local", texts),
            Subject("this engine on Ray", f"{folder}/ray", texts, **on_ray),
        ]
        plain = [PlainScript(actors, str(space.directory)) for actors in sorted({1, cores})]
        rates: dict[str, list[float]] = {subject.name: [] for subject in (*engines, *plain)}
        for _ in range(rounds):
            for subject in (*engines, *plain):
                rates[subject.name].append(tokens / subject.seconds(texts))
                print(f"{subject.name}: {rates[subject.name][-1]:,.0f} tokens/s", flush=True)
        for engine in engines:
            waited = engine.stats.tokenizer_wait_percent
            print(
                f"{engine.name}: ready after {engine.startup_seconds:.1f} s, {waited:.1f} % waiting for the tokenizer"
            )
            engine.compute.close()
        ray.shutdown()
    print(f"{len(texts):,} texts, {tokens:,} tokens, medians of {rounds} rounds")
    mine, base = rates[engines[1].name], rates[engines[0].name]
    for name, measured in rates.items():
        of_local = statistics.median(r / b for r, b in zip(measured, base, strict=True))
        ray_gains = statistics.median(m / r for m, r in zip(mine, measured, strict=True))
        print(
            f"{name}: {statistics.median(measured):,.0f} tokens/s, {of_local:.2f} of one process; "
            f"this engine on Ray is {ray_gains:.2f} times that"
        )
