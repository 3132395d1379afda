"""Precision policy, tuning, metrics and advice, and the GPU monitor, tested without hardware."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embed_assets.engine.gpu import GpuMonitor
from embed_assets.engine.hardware import Device
from embed_assets.engine.metrics import EngineStats, ModelCost, advise
from embed_assets.engine.precision import precisions_for
from embed_assets.engine.tuning import (
    LARGEST_BUDGET,
    Memory,
    Point,
    Tuned,
    recall,
    remember,
    sweep,
    sweet_spot,
    tuning_key,
)
from embed_assets.errors import SettingsError
from embed_assets_tests.conftest import resolve_space


@pytest.mark.parametrize(
    ("setting", "device", "capability", "model_type", "precisions"),
    [
        ("auto", "cpu", None, "bert", ["float32"]),
        ("auto", "mps", None, "bert", ["float32"]),
        ("auto", "cuda", (9, 0), "gemma3_text", ["bfloat16", "float32"]),
        ("auto", "cuda", (8, 0), "bert", ["bfloat16", "float16", "float32"]),
        ("auto", "cuda", (7, 5), "bert", ["float16", "float32"]),
        ("auto", "cuda", (7, 5), "xlm-roberta", ["float16", "float32"]),
        ("auto", "cuda", (7, 5), "qwen3", ["float32"]),
        ("auto", "cuda", (6, 1), "bert", ["float32"]),
        ("float32", "cuda", (9, 0), "bert", ["float32"]),
        ("float16", "cuda", (9, 0), "qwen3", ["float16"]),
        ("bfloat16", "cpu", None, "bert", ["bfloat16"]),
    ],
)
def test_precisions(
    setting: str, device: str, capability: tuple[int, int] | None, model_type: str, precisions: list[str]
) -> None:
    assert precisions_for(setting, device, capability, model_type) == precisions


def test_precisions_that_a_device_lacks_are_refused() -> None:
    with pytest.raises(SettingsError, match="EMBED_PRECISION=float16 needs a GPU"):
        precisions_for("float16", "cpu", None, "bert")


def measured(knee: int, gain: float = 2.0) -> Callable[[int], Point]:
    """Throughput that grows up to `knee` and falls slowly after it."""

    def measure(budget: int) -> Point:
        speed = 100 * gain ** np.log2(min(budget, knee)) * (0.99 ** max(0.0, np.log2(budget / knee)))
        return Point(budget, float(speed), 0.0)

    return measure


@given(st.sampled_from([2**n for n in range(9, 16)]))
def test_a_sweep_stops_at_the_knee(knee: int) -> None:
    points = sweep(measured(knee), 512, LARGEST_BUDGET, False, lambda point: None)
    assert sweet_spot(points).max_batch_tokens == knee
    assert [point.max_batch_tokens for point in points] == [2**n for n in range(9, int(np.log2(knee)) + 2)]


def test_a_full_sweep_shows_the_fall_and_memory_ends_it() -> None:
    shown: list[Point] = []
    points = sweep(measured(1024), 256, LARGEST_BUDGET, True, shown.append)
    assert [point.max_batch_tokens for point in points] == [256, 512, 1024, 2048, 4096, 8192] and shown == points
    points = sweep(measured(1 << 20), 512, 3000, False, lambda point: None)
    assert max(point.max_batch_tokens for point in points) <= 3000
    assert len(sweep(measured(64), 512, 100, False, lambda point: None)) == 1  # even if nothing seems to fit


def test_less_than_three_percent_does_not_count_as_gain() -> None:
    points = [Point(512, 1000, 0), Point(1024, 1025, 0), Point(2048, 1035, 0), Point(4096, 900, 0)]
    assert sweet_spot(points).max_batch_tokens == 2048  # 3.5 % faster than the first, in total
    assert sweet_spot(points[:2]).max_batch_tokens == 512


@given(st.floats(1e6, 1e10), st.floats(1.0, 1e6), st.integers(64, 1000), st.integers(1001, 100_000))
def test_the_memory_model_recovers_the_line(base: float, slope: float, few: int, many: int) -> None:
    memory = Memory.from_probes(few, int(base + slope * few), many, int(base + slope * many))
    assert memory.bytes_per_token == pytest.approx(slope, rel=0.05, abs=0.1)
    free = 10**11
    assert memory.fits(free) == LARGEST_BUDGET or memory.fits(free) * memory.bytes_per_token <= 0.8 * free


def test_unknown_memory_sets_no_limit() -> None:
    assert Memory(1e9, 1000.0).fits(None) == LARGEST_BUDGET
    assert Memory(1e9, 0.0).fits(10) == LARGEST_BUDGET
    assert Memory(1e9, 1000.0).fits(1_000_000, workers=2) == 400
    assert Memory(1e9, 1000.0).fits(0) == 1


def test_tunings_are_remembered_per_model_device_precision_and_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu = Device("cpu", "cpu", "a processor")
    key = tuning_key(resolve_space("fake:8"), cpu, "float32")
    assert recall(key) is None
    remember(key, Tuned("torch", 2048, 1234.5))
    assert recall(key) == Tuned("torch", 2048, 1234.5)
    others = {
        tuning_key(resolve_space("fake:16"), cpu, "float32"),
        tuning_key(resolve_space("fake:8"), Device("cpu", "cpu", "another"), "float32"),
        tuning_key(resolve_space("fake:8"), cpu, "bfloat16"),
    }
    assert len(others) == 3 and key not in others
    (tmp_path / "embed_assets" / "tuning" / f"{key}.json").write_text("{broken")
    assert recall(key) is None


def test_operations_count_weights_and_attention() -> None:
    cost = ModelCost(linear_weights=10, attention_width=3)
    assert cost.operations(np.array([2, 4])) == 2 * 10 * 6 + 4 * 3 * (4 + 16)


def stats(**values: Any) -> EngineStats:
    return EngineStats(
        **{"texts": 10, "tokens": 1000, "padded_tokens": 1000, "operations": 1e9, "seconds": 1.0} | values
    )


@pytest.mark.parametrize(
    ("found", "ceiling", "device", "words"),
    [
        (stats(tokenizer_wait_seconds=1.0), 2.0, "cuda", "tokenizer-bound: the device waited 50 %"),
        (stats(input_wait_seconds=1.0), 2.0, "cpu", "input-bound: the device waited 50 %"),
        (stats(padded_tokens=2000), 2.0, "cpu", "padding: 50 % of the computed tokens"),
        (stats(), 100.0, "cuda", "the model is small for it: raise EMBED_MAX_BATCH_TOKENS"),
        (stats(), 3.0, "cpu", "memory-bound: 33 %"),
        (stats(), 1.25, "cpu", "device-bound: 80 % .* EMBED_PRECISION=int8"),
        (stats(), 0.0, "cuda", "device-bound: the device is always busy"),
    ],
)
def test_advice(found: EngineStats, ceiling: float, device: str, words: str) -> None:
    import re

    line = advise(found, ceiling, device, "float32", 1024)
    assert re.search(words, line) and "\n" not in line


def test_nothing_embedded_needs_no_advice_and_divides_by_nothing() -> None:
    empty = EngineStats()
    assert advise(empty, 0.0, "cpu", "float32", 1024) == ""
    assert (empty.tokens_per_second, empty.padding_percent, empty.gflops, empty.tokenizer_wait_percent) == (0, 0, 0, 0)
    assert empty.roofline_percent(0.0) == 0 and empty.gpu_percent == 0


def test_stats_are_summed_and_memory_is_the_peak() -> None:
    total = stats(gpu_readings=1, gpu_percent_sum=50.0, gpu_memory_bytes=7)
    total.add(stats(gpu_readings=1, gpu_percent_sum=100.0, gpu_memory_bytes=5))
    assert (total.tokens, total.seconds, total.gpu_percent, total.gpu_memory_bytes) == (2000, 2.0, 75.0, 7)


class Nvml:
    """The part of NVIDIA's library that the monitor uses."""

    def __init__(self) -> None:
        self.is_lost = False

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        assert handle == "GPU-1234"
        if self.is_lost:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=123, total=456)


def test_the_gpu_monitor_reads_and_warns_when_it_gives_up(logged: list[str]) -> None:
    nvml = Nvml()
    monitor = GpuMonitor("1234", nvml)
    usage = monitor.read()
    assert usage is not None and (usage.utilization_percent, usage.memory_used_bytes) == (87.0, 123)
    nvml.is_lost = True
    assert monitor.read() is None and "GPU is lost" in " ".join(logged)
    nvml.is_lost = False
    assert monitor.read() is None  # it does not try again


def test_no_driver_is_no_error() -> None:
    assert GpuMonitor("1234").read() is None
