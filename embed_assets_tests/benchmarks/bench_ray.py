"""The engine on Ray against itself in one process, and against a plain Ray Data script, on the same cores.

All three embed the same texts, in turns; rates are from the first text to the last, without start-up.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from embed_assets.engine.hardware import available_cores
from embed_assets.lake.staging import Staging
from embed_assets.lake.tables import CHUNK_TABLE
from embed_assets.sample import write_sample
from embed_assets.settings import load_settings
from embed_assets.stages.pipeline import Pipeline
from embed_assets_tests.ray.clusters import STORE_BYTES, windows_of

BATCH = 64
_TEXTS, _CHUNK_TOKENS = 5000, 96
_PLAIN_TEXTS = 1500
"""The plain script is slow, and as slow from the first batch to the last."""


class Encoder:
    """What one would write first: the model in an actor, a batch at a time."""

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


def plain_script(model: str, texts: Sequence[str], actors: int) -> float:
    """Seconds of the plain script, from the first batch's start to the last one's end."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    threads = available_cores() // actors
    rows = ray.data.from_arrow(pa.table({"text": list(texts)})).repartition(2 * actors).materialize()
    done = rows.map_batches(
        Encoder,
        fn_constructor_args=(model, threads),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=threads * 0.9,
    ).to_pandas()
    assert len(done) == len(texts)
    return float(done["ended"].max() - done["started"].min())


class Subject:
    """The engine, here or there."""

    def __init__(self, name: str, lake: str, texts: Sequence[str], **settings: str) -> None:
        self.name, self._texts = name, texts
        self._pipeline = Pipeline.from_settings(load_settings(lake=lake, **settings))
        self._pipeline.lake.create(CHUNK_TABLE)
        self._tokens = self._pipeline.space.tokenizer.count(list(texts))
        self.compute = self._pipeline.open_compute()
        started = time.perf_counter()
        self._embedder = self.compute.start(list(texts), len(texts))
        self.startup_seconds = time.perf_counter() - started
        self.run(texts[:512])  # tunes, on a worker, and warms up

    def run(self, texts: Sequence[str]) -> tuple[int, float]:
        """Tokens, and seconds they took, staging included."""
        staging = Staging(self._pipeline.lake, self._pipeline.embeddings_table, "p")
        embedder = self.compute.start(list(texts), len(self._texts))
        started = time.perf_counter()
        windows = windows_of(self.compute, zip(texts, self._tokens, strict=False), len(texts))
        tokens = sum(done.stats.tokens for done in embedder.embed(windows, staging, lambda texts, tokens: None))
        seconds = time.perf_counter() - started
        staging.clear()
        return tokens, seconds


def run(folder: Path | None, rounds: int = 2) -> None:
    """Print the table, for up to 5,000 chunks of the documents in a folder, by default the sample corpus."""
    with tempfile.TemporaryDirectory() as sample:
        if folder is None:
            write_sample(Path(sample))
        source = load_settings(source=str(folder or sample), chunk_tokens=_CHUNK_TOKENS)
        compare(Pipeline.from_settings(source).sample_chunks(_TEXTS), rounds)


def compare(texts: Sequence[str], rounds: int, **settings: str) -> None:
    """Print the table for these texts."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    space = Pipeline.from_settings(load_settings()).model_space
    model = str(space.directory)
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            address="local",
            num_cpus=available_cores(),
            object_store_memory=4 * STORE_BYTES,
            logging_level="ERROR",
            log_to_driver=False,
        )
        address = ray.get_runtime_context().gcs_address
        subjects = [
            Subject("this engine, one process", f"{folder}/local", texts, **settings),
            Subject("this engine on Ray", f"{folder}/ray", texts, compute="ray", ray_address=address, **settings),
        ]
        rates: dict[str, list[float]] = {}
        tokens = 0
        for _ in range(rounds):
            for subject in subjects:
                tokens, seconds = subject.run(texts)
                rates.setdefault(subject.name, []).append(tokens / seconds)
                print(f"{subject.name}: {tokens / seconds:,.0f} tokens/s", flush=True)
        for subject in subjects:
            print(f"{subject.name}: ready after {subject.startup_seconds:.1f} s")
            subject.compute.close()
        some = texts[:_PLAIN_TEXTS]
        some_tokens = sum(space.tokenizer.count(list(some)))
        for actors in (1, available_cores()):
            for _ in range(rounds):
                seconds = plain_script(model, some, actors)
                rates.setdefault(f"plain Ray Data script, {actors} actors", []).append(some_tokens / seconds)
        ray.shutdown()
    base = statistics.median(rates["this engine, one process"])
    for name, measured in rates.items():
        rate, each = statistics.median(measured), ", ".join(f"{r:,.0f}" for r in measured)
        print(f"{name}: {rate:,.0f} tokens/s, {rate / base:.2f} of one process ({each})")
