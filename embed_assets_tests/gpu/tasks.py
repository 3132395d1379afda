"""What `make gpu` measures. Each task returns plain data, and may take at most as long as its limit."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import logging
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embed_assets.engine.backend import Backend, Window
from embed_assets.engine.backends.parity import CHECK_TEXTS
from embed_assets.engine.backends.torch_backend import load_torch_backend
from embed_assets.engine.embedder import LocalEmbedder
from embed_assets.engine.engine import Engine
from embed_assets.engine.metrics import EngineStats
from embed_assets.engine.model import LocalSpace, load_sentence_transformer, require_local
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.providers.sentence_transformers import resolve
from embed_assets.engine.space import ModelChoice
from embed_assets_tests.gpu.models import build_model, shape_of, texts_of

_WINDOW_TEXTS = 16_384
_PROBE_TEXTS = 256
"""Texts of a first, short measurement, which says how many fit into the time of the real one."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how large."""

    device: str
    is_small: bool
    """Tiny models and few texts: every line runs, on any machine, and no figure means anything."""
    folder: Path
    seconds: float
    """Of one timing."""

    def space(self, name: str) -> LocalSpace:
        """The model of a shape."""
        return require_local(resolve(ModelChoice(str(build_model(name, self.folder, self.is_small)))), "make gpu")

    def texts(self, name: str, kind: str, count: int) -> list[str]:
        """Texts for a model."""
        return texts_of(kind, min(count, 300) if self.is_small else count, shape_of(name, self.is_small).max_length)

    @property
    def precision(self) -> str:
        """The precision that is measured."""
        return "float32" if self.device == "cpu" else "bfloat16"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()


def environment(bench: Bench) -> dict[str, Any]:
    """Versions, the card, and its ceilings."""
    import sentence_transformers
    import torch
    import transformers
    from torch.nn.attention.varlen import varlen_attn

    found: dict[str, Any] = {
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, sentence_transformers)}
        | {"python": sys.version.split()[0]},
        "cores": len(os.sched_getaffinity(0)),
        "varlen_attn": [*inspect.signature(varlen_attn).parameters],
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
    }
    if bench.device != "cpu":
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": card.name, "gigabytes": round(card.total_memory / 2**30), "cuda": torch.version.cuda}
    size = 512 if bench.is_small else 8192
    for precision in ("bfloat16", "float32"):
        a, b = (torch.randn(size, size, device=bench.device).to(getattr(torch, precision)) for _ in range(2))
        found[f"matmul_{precision}_tflops"] = round(
            2 * size**3 / _median_seconds(bench, lambda a=a, b=b: a @ b) / 1e12, 2
        )
    big = torch.randn((1 << 20) if bench.is_small else (1 << 28), device=bench.device)
    other = torch.empty_like(big)
    found["copy_gigabytes_per_second"] = round(
        2 * big.nbytes / _median_seconds(bench, lambda: other.copy_(big)) / 1e9, 1
    )
    return found


def parity(bench: Bench, name: str) -> dict[str, Any]:
    """Cosines of the path the product chooses to `encode()` in float32, in each precision."""
    space = bench.space(name)
    texts = [*CHECK_TEXTS, *bench.texts(name, "mixed", 200)]
    reference = _encode(load_sentence_transformer(space, bench.device), texts, 16)
    found: dict[str, Any] = {}
    for precision in ("float32", "bfloat16") if bench.device == "cpu" else ("float32", "bfloat16", "float16"):
        with _warnings() as lines:
            backend = load_torch_backend(space, bench.device, precision, False)
        embedder = _over(backend, space, 16_384)
        together, alone = embedder.embed(texts).vectors, [embedder.embed([text]).vectors[0] for text in texts[:24]]
        found[precision] = {
            "path": backend.name,
            "cosine_min": round(float((together * reference).sum(axis=1).min()), 6),
            "cosine_mean": round(float((together * reference).sum(axis=1).mean()), 6),
            "alone_min": round(float((together[:24] * np.stack(alone)).sum(axis=1).min()), 6),
            "warnings": lines,
        }
        del backend, embedder
        gc.collect()
    return found


def survival(bench: Bench) -> dict[str, Any]:
    """Memory runs out in the middle: the same vectors, with a smaller budget and a warning."""
    import torch

    space, texts = bench.space("minilm"), bench.texts("minilm", "mixed", 12_000)
    backend = load_torch_backend(space, bench.device, bench.precision, False)
    expected = _over(backend, space, 16_384).embed(texts).vectors
    ballast = None
    if bench.device == "cpu":
        _refuse_batches_over(backend, 3000)
    else:
        torch.cuda.empty_cache()
        ballast = torch.empty(torch.cuda.mem_get_info()[0] - (3 << 30), dtype=torch.uint8, device=bench.device)
    embedder = _over(backend, space, 1 << 23)
    with _warnings() as lines:
        vectors = embedder.embed(texts).vectors
    del ballast
    cosine = float((vectors * expected).sum(axis=1).min())
    return {"cosine_min": round(cosine, 6), "budget_after": embedder.max_batch_tokens, "warnings": lines[:3]}


def tuning(bench: Bench, name: str) -> dict[str, Any]:
    """What a run finds with its first window, and remembers."""
    engine = Engine(bench.space(name), EngineOptions(bench.device, bench.precision))
    started = time.perf_counter()
    found = engine.tune(bench.texts(name, "mixed", 48))
    points = {
        library: [(p.max_batch_tokens, round(p.tokens_per_second)) for p in ps] for library, ps in found.points.items()
    }
    seconds = round(time.perf_counter() - started, 1)
    return {"chosen": found.spot.max_batch_tokens, "seconds": seconds, "tokens_per_second": points}


def throughput(bench: Bench, name: str) -> dict[str, Any]:
    """Ours at the budgets that matter, against SentenceTransformer: float32, its best batch in half precision, and its
    flattened mode where flash-attn is there."""
    space = bench.space(name)
    kinds = {kind: bench.texts(name, kind, 40_000) for kind in ("512", "128", "mixed")}
    lengths = {k: space.tokenizer.tokenize(texts[:1000], space.max_seq_length).lengths for k, texts in kinds.items()}
    found: dict[str, Any] = {kind: {} for kind in kinds}
    for precision, batches in (("float32", (32,)), (bench.precision, (32, 128, 512))):
        speeds = _encode_speeds(bench, space, precision, batches, kinds, lengths)
        for kind in kinds:
            found[kind][f"encode_{precision}"] = speeds[kind] | found[kind].get(f"encode_{precision}", {})
    if importlib.util.find_spec("flash_attn") is not None:
        found["encode_flash"] = _flash_speeds(bench, space, kinds, lengths)
    backend = load_torch_backend(space, bench.device, bench.precision, False)
    for kind, texts in kinds.items():
        budgets = (512, 1024) if bench.is_small else (16_384, 65_536, 131_072)
        embedders = {b: _over(backend, space, b) for b in budgets}
        mean = float(lengths[kind].mean())
        found[kind]["ours"] = {b: _speed(bench, partial(_run, e), texts, mean) for b, e in embedders.items()}
        operations = backend.cost.operations(lengths[kind]) / float(lengths[kind].sum())
        found[kind]["gigaflop_per_token"] = round(operations / 1e9, 6)
    return found | {"path": backend.name}


def _encode_speeds(
    bench: Bench,
    space: LocalSpace,
    precision: str,
    batches: Sequence[int],
    kinds: dict[str, list[str]],
    lengths: dict[str, np.ndarray],
) -> dict[str, dict[int, int]]:
    """Tokens per second of SentenceTransformer, by kind of text and batch."""
    import torch

    model: Any = load_sentence_transformer(space, bench.device).to(getattr(torch, precision))
    return {
        kind: {b: _speed(bench, partial(_encode, model, batch=b), texts, float(lengths[kind].mean())) for b in batches}
        for kind, texts in kinds.items()
    }


def beside(bench: Bench) -> dict[str, Any]:
    """Our speed alone, and while all the host's cores but one are busy with other processes' work."""
    import subprocess

    space, texts = bench.space("minilm"), bench.texts("minilm", "128", 40_000)
    embedder = _over(load_torch_backend(space, bench.device, bench.precision, False), space, 16_384)
    mean = float(embedder.lengths(texts[:1000]).mean())
    alone = _speed(bench, lambda t: _run(embedder, t), texts, mean)
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: sum(range(10**6))"])
        for _ in range(max(1, len(os.sched_getaffinity(0)) - 1))
    ]
    try:
        return {"alone": alone, "beside_busy_cores": _speed(bench, lambda t: _run(embedder, t), texts, mean)}
    finally:
        for process in busy:
            process.kill()


def copies(bench: Bench, name: str) -> dict[str, Any]:
    """One copy of the model, and two that share the device."""
    space, texts = bench.space(name), bench.texts(name, "128", 30_000)
    budget = 1024 if bench.is_small else 65_536
    embedders = [
        _over(load_torch_backend(space, bench.device, bench.precision, False), space, budget) for _ in range(2)
    ]
    mean = float(embedders[0].lengths(texts[:1000]).mean())

    def both(chosen: Sequence[str]) -> None:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(_run, embedders, (chosen[::2], chosen[1::2])))

    return {"one": _speed(bench, lambda t: _run(embedders[0], t), texts, mean), "two": _speed(bench, both, texts, mean)}


def feed(bench: Bench) -> dict[str, Any]:
    """Tokens per second that this host can read, split and tokenize; and of a whole sync, where the packages are."""
    if missing := [m for m in ("pydantic_settings", "fsspec", "chardet") if importlib.util.find_spec(m) is None]:
        return {"skipped": f"needs {', '.join(missing)}"}
    from embed_assets.corpus.source import Source
    from embed_assets.engine.hardware import available_cores
    from embed_assets.stages.preparing import open_preparation

    space = bench.space("minilm")
    landing = bench.folder / "landing"
    shutil.rmtree(landing, ignore_errors=True)
    for i, text in enumerate(bench.texts("minilm", "512", 20_000)):
        file = landing / f"p{i % 8}/{i // 16}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(f"# Part {i}\n\n{text}\n\n")
    from embed_assets.corpus.chunking import ChunkOptions
    from embed_assets.corpus.options import ParseOptions
    from embed_assets.stages.corpus import Corpus

    source = Source(str(landing), "folder")
    corpus = Corpus(source, ParseOptions(), ChunkOptions(space.max_seq_length), space.model_input)
    partitions = list(source.partitions().values())
    found: dict[str, Any] = {}
    for processes in sorted({1, max(1, available_cores() // 2), available_cores()}):
        started, tokens = time.perf_counter(), 0
        with open_preparation(corpus, partitions, True, processes) as preparation:
            for files in partitions:
                prepared = preparation.take(files)
                tokens += sum(int(batch.column("token_count").to_numpy().sum()) for f in prepared.chunks for batch in f)
                prepared.remove()
        found[f"{processes} processes"] = round(tokens / (time.perf_counter() - started))
    return found | {"sync": _sync(bench, landing)}


def _sync(bench: Bench, landing: Path) -> Any:
    import json
    import subprocess

    if importlib.util.find_spec("dagster") is None or importlib.util.find_spec("deltalake") is None:
        return "skipped: needs dagster and deltalake"
    project = bench.folder / "project"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir()
    shutil.copy(Path(__file__).parent.parent.parent / "dagster.yaml", project)
    settings = {
        "EMBED_SOURCE": str(landing),
        "EMBED_MODEL": str(bench.space("minilm").directory),
        "EMBED_DEVICE": bench.device,
    }
    command = [sys.executable, "-m", "embed_assets.cli", "sync", "--json"]
    done = subprocess.run(command, cwd=project, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"failed: {done.stderr[-500:]}"
    answer = json.loads(done.stdout)
    return {"tokens": answer["tokens"], "tokens_per_second": round(answer["tokens"] / answer["seconds"])}


def _over(backend: Backend, space: LocalSpace, budget: int) -> LocalEmbedder:
    """An embedder over a backend."""
    return LocalEmbedder(backend, space.tokenizer, space.max_seq_length, budget)


def _run(embedder: LocalEmbedder, texts: Sequence[str]) -> EngineStats:
    """All texts through the engine, in windows."""
    total = EngineStats()
    windows = (Window(texts[i : i + _WINDOW_TEXTS]) for i in range(0, len(texts), _WINDOW_TEXTS))
    for done in embedder.embed_windows(windows):
        total.add(done.stats)
    return total


def _encode(model: Any, texts: Sequence[str], batch: int) -> np.ndarray:
    vectors = model.encode(list(texts), batch_size=batch, normalize_embeddings=True, show_progress_bar=False, prompt="")
    return np.asarray(vectors, dtype=np.float32)


def _flash_speeds(
    bench: Bench, space: LocalSpace, kinds: dict[str, list[str]], lengths: dict[str, np.ndarray]
) -> dict[str, Any]:
    """SentenceTransformer in bfloat16 with flash-attn, which packs texts without padding."""
    import torch
    from sentence_transformers import SentenceTransformer

    options = {"dtype": torch.bfloat16, "attn_implementation": "flash_attention_2"}
    try:
        model = SentenceTransformer(str(space.directory), device=bench.device, model_kwargs=options)
        return {
            k: _speed(bench, lambda t: _encode(model, t, 128), texts, float(lengths[k].mean()))
            for k, texts in kinds.items()
        }
    except Exception as error:  # it is measured where it works
        return {"error": f"{type(error).__name__}: {error}"}


def _speed(bench: Bench, run: Callable[[list[str]], object], texts: list[str], mean_tokens: float) -> int:
    """Tokens per second on as many of the texts as take about the time of a timing."""
    probe = texts[:_PROBE_TEXTS]
    run(probe)
    elapsed = _seconds(bench, lambda: run(probe))
    count = max(len(probe), min(len(texts), int(len(probe) * bench.seconds / max(elapsed, 1e-4))))
    return round(len(texts[:count]) * mean_tokens / _seconds(bench, lambda: run(texts[:count])))


def _seconds(bench: Bench, run: Callable[[], object]) -> float:
    bench.synchronize()
    started = time.perf_counter()
    run()
    bench.synchronize()
    return time.perf_counter() - started


def _median_seconds(bench: Bench, run: Callable[[], object]) -> float:
    run()
    return statistics.median(_seconds(bench, run) for _ in range(5))


def _refuse_batches_over(backend: Any, limit: int) -> None:
    """Make the backend run out of memory, as a GPU does."""
    import torch

    forward = backend.forward

    def tight(texts: Any, tokens: Any, batch: Any, buffer: Any) -> None:
        if batch.tokens > limit:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB")
        forward(texts, tokens, batch, buffer)

    backend.forward = tight


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The engine's warnings inside the block."""
    lines: list[str] = []
    lock = threading.Lock()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with lock:
                lines.append(record.getMessage()[:300])

    handler, logger = Handler(logging.WARNING), logging.getLogger("embed_assets")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
