"""Benchmarks the engine against ``SentenceTransformer.encode``, for speed and for agreement of the vectors.

All variants take turns in one process, so that a busy machine slows all of them; the medians are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from embed_assets.engine.backend import Backend
from embed_assets.engine.backends.openvino_backend import load_int8_backend, load_openvino_backend
from embed_assets.engine.backends.openvino_library import has_openvino
from embed_assets.engine.backends.quantization import CALIBRATION_TEXTS, quantize
from embed_assets.engine.backends.torch_backend import load_torch_backend
from embed_assets.engine.embedder import LocalEmbedder
from embed_assets.engine.engine import DEFAULT_BATCH_TOKENS
from embed_assets.engine.hardware import measure_gemm_gflops, resolve_device
from embed_assets.engine.model import LocalSpace, load_sentence_transformer, require_local
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.engine.tuning import measure_budget, sweet_spot
from embed_assets.errors import ModelError, SettingsError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BASELINE = "encode, batch 32"
_ENCODE_BATCHES = (8, 16, 32, 64)
"""Batch sizes tried for encode(), whose default is 32."""
_BUDGETS = (1024, 512, 2048)
"""Tokens per forward pass that are tried. The default comes first: another must be clearly faster to win."""


@dataclass(frozen=True, slots=True)
class Row:
    """Results of one variant on one set of texts."""

    name: str
    tokens_per_second: float
    ratio_to_encode: float
    """Speed relative to encode() at its default batch size."""
    ratio_to_best_encode: float
    """Speed relative to encode() at its fastest batch size for this set."""
    cosine_min: float
    """Worst cosine to encode()'s vectors."""
    cosine_mean: float
    """Mean cosine to encode()'s vectors."""
    gflops: float
    """Billions of floating-point operations per second, without padding."""
    roofline_percent: float
    """Percentage of the float32 matrix product measured in the same run; int8 can exceed 100."""


@dataclass(slots=True)
class SetReport:
    """Results of all variants on one set of texts."""

    texts: int
    tokens: int
    rows: list[Row] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """Results of a benchmark."""

    model: str
    device: str
    rounds: int
    ceiling_gflops: float
    """Best float32 matrix product measured between the rounds."""
    sets: dict[str, SetReport]
    left_out: list[str]
    """Variants that could not be measured here, and why."""


def run_benchmark(
    space: EmbeddingSpace,
    sets: Mapping[str, Sequence[str]],
    rounds: int,
    on_step: Callable[[str], None] = lambda step: None,
) -> Report:
    """Measure every variant on every set of texts, on the CPU.

    The int8 model is calibrated on the first set and discarded afterwards. `on_step` is called with a line about each
    step. Raises ``ModelError`` when the model can't be loaded, ``SettingsError`` for a set without texts or for a model
    whose files are not on this machine.
    """
    local = require_local(space, "a benchmark")
    if not all(sets.values()):
        raise SettingsError("a benchmark needs texts, got a folder without any; name one with documents")
    device = resolve_device("cpu")
    left_out = ["GPU: the engine is measured on the CPU here; 'embed-assets tune' measures a GPU where there is one"]
    on_step("loading the model in each library")
    embedders = _embedders(local, next(iter(sets.values())), left_out, on_step)
    model = load_sentence_transformer(local, "cpu")
    report = Report(space.model, device.description, rounds, 0.0, {}, left_out)
    for name, texts in sets.items():
        report.sets[name] = _measure_set(local, name, texts, embedders, model, rounds, report, on_step)
    for found in report.sets.values():
        found.rows = [
            replace(row, roofline_percent=round(100 * row.gflops / report.ceiling_gflops, 1)) for row in found.rows
        ]
    return report


def _embedders(
    space: LocalSpace,
    texts: Sequence[str],
    left_out: list[str],
    on_step: Callable[[str], None],
) -> dict[str, LocalEmbedder]:
    loaders: dict[str, Callable[[], Backend]] = {
        "torch float32": lambda: load_torch_backend(space, "cpu", "float32", False)
    }
    if has_openvino():

        def int8() -> Backend:
            on_step("quantizing to int8")
            quantized = quantize(space, texts[:CALIBRATION_TEXTS], [])
            return load_int8_backend(space, quantized.xml, quantized.weights)

        loaders |= {
            "openvino float32": lambda: load_openvino_backend(space, "float32"),
            "openvino bfloat16": lambda: load_openvino_backend(space, "bfloat16"),
            "openvino int8": int8,
        }
    else:
        left_out.append("OpenVINO: not installed; pip install 'embed-assets[cpu]'")
    found: dict[str, LocalEmbedder] = {}
    for name, load in loaders.items():
        try:
            found[name] = LocalEmbedder(load(), space.tokenizer, space.max_seq_length, DEFAULT_BATCH_TOKENS["cpu"])
        except ModelError as error:
            left_out.append(f"{name}: {error}")
    return found


def _measure_set(
    space: LocalSpace,
    name: str,
    texts: Sequence[str],
    embedders: Mapping[str, LocalEmbedder],
    model: SentenceTransformer,
    rounds: int,
    report: Report,
    on_step: Callable[[str], None],
) -> SetReport:
    trial = texts[::2]
    on_step(f"{name}: finding the best batch size and budgets")
    best_batch = min(_ENCODE_BATCHES, key=lambda size: _seconds(lambda: _encode(model, trial, size))[0])
    for embedder in embedders.values():
        points = [measure_budget(embedder, trial, budget) for budget in _BUDGETS]
        embedder.max_batch_tokens = sweet_spot(points).max_batch_tokens
    best_encode = f"encode, batch {best_batch}"
    runs: dict[str, Callable[[], np.ndarray]] = {BASELINE: lambda: _encode(model, texts, 32)}
    if best_batch != 32:
        runs[best_encode] = lambda: _encode(model, texts, best_batch)
    for library, embedder in embedders.items():
        label = f"{library}, {embedder.max_batch_tokens} tokens"
        runs[label] = lambda embedder=embedder: embedder.embed(texts).vectors  # type: ignore[misc]
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    vectors: dict[str, np.ndarray] = {}
    for number in range(rounds):
        on_step(f"{name}: round {number + 1} of {rounds}")
        for label, run in runs.items():
            report.ceiling_gflops = max(report.ceiling_gflops, measure_gemm_gflops("cpu", "float32", 0.1))
            elapsed, vectors[label] = _seconds(run)
            seconds[label].append(elapsed)
    medians = {label: statistics.median(found) for label, found in seconds.items()}
    lengths = space.tokenizer.tokenize(texts, space.max_seq_length).lengths
    tokens = int(lengths.sum())
    operations = next(iter(embedders.values())).backend.cost.operations(lengths)
    found = SetReport(len(texts), tokens)
    for label, median in medians.items():
        cosines = (vectors[label] * vectors[BASELINE]).sum(axis=1)
        found.rows.append(
            Row(
                label,
                round(tokens / median, 1),
                round(medians[BASELINE] / median, 3),
                round(medians[best_encode] / median, 3),
                round(float(cosines.min()), 6),
                round(float(cosines.mean()), 6),
                round(operations / median / 1e9, 1),
                0.0,
            )
        )
    return found


def _encode(model: SentenceTransformer, texts: Sequence[str], batch_size: int) -> np.ndarray:
    vectors = model.encode(
        list(texts), prompt="", batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
    )
    return np.asarray(vectors)


def _seconds(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    vectors = run()
    return time.perf_counter() - started, vectors
