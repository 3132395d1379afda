"""Finds the fastest library and token budget per forward pass for a model on this machine, and caches the result."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from embed_assets.engine import user_cache
from embed_assets.engine.embedder import LocalEmbedder
from embed_assets.engine.hardware import Device
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.records import hash_parts

MIN_GAIN = 0.03
"""Relative gain in throughput a larger budget must bring. Less is not worth its memory, and ends the search."""
MEMORY_SHARE = 0.8
"""Share of the free memory that batches may take; the rest is left to fragmentation and other processes."""
LARGEST_BUDGET = 1 << 18
"""Tokens at which a search ends where memory sets no limit: at several times fewer, any GPU is busy."""
_MEMORY_BUDGETS = {"cuda": (4096, 32_768)}
"""Tokens of the two memory probes, by kind of device: far enough apart to show a slope, small enough to fit."""
_OTHER_MEMORY_BUDGETS = (512, 4096)
"""The same for other kinds."""
_SAMPLE_BATCHES = 4
"""Full batches per pass: with fewer, a larger budget could not show whether it is faster."""
_REPEATS = 3
"""Passes per budget, for a median that one disturbed pass does not move."""
_PROBE_SECONDS = 0.5
"""Time per pass above which passes are dropped, so that slow models are tuned in seconds too."""
_VERSION = "2"
"""Part of the cache key: a new value discards cached tunings."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A tuning result, valid until model, device, precision or a library changes."""

    library: str
    """"torch" or "openvino"."""
    max_batch_tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory of a batch as a linear function of its tokens, fitted to two probes."""

    base_bytes: float
    """Weights, libraries and everything else that does not grow with the batch."""
    bytes_per_token: float

    @classmethod
    def from_probes(cls, few: int, few_bytes: int, many: int, many_bytes: int) -> Memory:
        """The line through the peaks, in bytes, of two batches of `few` and `many` tokens."""
        slope = max(0.0, (many_bytes - few_bytes) / (many - few))
        return cls(max(0.0, few_bytes - slope * few), slope)

    def fits(self, free_bytes: int | None, workers: int = 1) -> int:
        """Maximum tokens of a batch when `workers` concurrent batches share the free memory; at least 1."""
        if free_bytes is None or self.bytes_per_token <= 0:
            return LARGEST_BUDGET
        return max(1, min(LARGEST_BUDGET, int(MEMORY_SHARE * free_bytes / self.bytes_per_token / workers)))


@dataclass(frozen=True, slots=True)
class Point:
    """Measurement of one budget in a sweep."""

    max_batch_tokens: int
    tokens_per_second: float
    padding_percent: float


def sweet_spot(points: Sequence[Point]) -> Point:
    """The smallest budget after which no larger one gained `MIN_GAIN`. Raises ``IndexError`` without points."""
    best = points[0]
    for point in points[1:]:
        if point.tokens_per_second > best.tokens_per_second * (1 + MIN_GAIN):
            best = point
    return best


def sweep(
    measure: Callable[[int], Point], first: int, largest: int, is_full: bool, on_point: Callable[[Point], None]
) -> list[Point]:
    """Double the budget from `first` up to `largest` until throughput gains less than `MIN_GAIN`.

    A full sweep goes two steps further, to show the decline. `on_point` is called with each measurement.
    """
    points: list[Point] = []
    budget, steps_without_gain = first, 0
    while budget <= largest or not points:
        points.append(measure(min(budget, largest)))
        on_point(points[-1])
        steps_without_gain = 0 if sweet_spot(points) is points[-1] else steps_without_gain + 1
        if steps_without_gain > (2 if is_full else 0):
            break
        budget *= 2
    return points


@dataclass(frozen=True, slots=True)
class Tuning:
    """Everything that tuning measured."""

    library: str
    """The fastest library."""
    spot: Point
    """The best budget of that library."""
    points: dict[str, list[Point]]
    """The sweep of each library."""
    memory: dict[str, Memory]
    """Memory needed with each library."""
    free_bytes: int | None
    """Free on the device after tuning; None where unknown."""
    workers: dict[str, int]
    """Concurrent batches with each library."""


def measure_budget(embedder: LocalEmbedder, texts: Sequence[str], budget: int) -> Point:
    """Median throughput of a few passes over texts like `texts`, without tokenizing, with a budget.

    The texts are repeated to fill several batches. Leaves the embedder's own budget unchanged.
    """
    sample = repeated(texts, embedder, _SAMPLE_BATCHES * budget * embedder.backend.workers)
    before, embedder.max_batch_tokens = embedder.max_batch_tokens, budget
    speeds: list[float] = []
    padding = 0.0
    try:
        started = time.perf_counter()
        while len(speeds) < _REPEATS and (not speeds or time.perf_counter() - started < _REPEATS * _PROBE_SECONDS):
            stats = embedder.embed(sample).stats
            speeds.append(stats.tokens_per_second)
            padding = stats.padding_percent
    finally:
        embedder.max_batch_tokens = before
    return Point(budget, statistics.median(speeds), padding)


def measure_memory(embedder: LocalEmbedder, texts: Sequence[str], device: Device) -> Memory:
    """Memory that batches need, from the peaks of two budgets over the longest texts."""
    budgets = _MEMORY_BUDGETS.get(device.kind, _OTHER_MEMORY_BUDGETS)
    longest = sorted(texts, key=len, reverse=True)[: max(1, len(texts) // 4)]
    longest = repeated(longest, embedder, max(budgets) * embedder.backend.workers)
    peaks: dict[int, int] = {}
    before = embedder.max_batch_tokens
    try:
        for budget in budgets:
            embedder.max_batch_tokens = budget
            device.reset_peak()
            embedder.embed(longest)
            peaks[budget] = device.peak_bytes()
    finally:
        embedder.max_batch_tokens = before
    (few, few_bytes), (many, many_bytes) = peaks.items()
    workers = embedder.backend.workers
    return Memory.from_probes(few * workers, few_bytes, many * workers, many_bytes)


def repeated(texts: Sequence[str], embedder: LocalEmbedder, tokens: int) -> list[str]:
    """The texts as often as it takes for at least so many tokens; a part of the texts if they have more."""
    lengths = embedder.lengths(texts)
    rounds = max(1, -(-tokens // max(1, int(lengths.sum()))))
    if rounds > 1:
        return [*texts] * rounds
    return list(texts[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1])


def tuning_key(space: EmbeddingSpace, device: Device, precision: str, compiles: bool = False) -> str:
    """Cache key of a tuning: everything that can change which library and budget are fastest."""
    libraries = [f"{name} {_version(name)}" for name in ("torch", "transformers", "openvino", "embed-assets")]
    return hash_parts(
        (_VERSION, space.fingerprint, device.kind, device.description, precision, str(compiles), *libraries)
    )


def recall(key: str) -> Tuned | None:
    """The tuning cached on this machine for `key`; None when there is none."""
    try:
        values = json.loads(user_cache.read("tuning", f"{key}.json") or "")
        return Tuned(str(values["library"]), int(values["max_batch_tokens"]), float(values["tokens_per_second"]))
    except (ValueError, KeyError, TypeError):
        return None


def remember(key: str, tuned: Tuned) -> None:
    """Cache a tuning for later processes."""
    user_cache.write("tuning", f"{key}.json", json.dumps(asdict(tuned)))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
