"""Estimates how long a device takes to embed a number of tokens, from its data sheet.

A forward pass multiplies matrices and moves activations through the device's memory. On a GPU the two hardly overlap,
so their times add up, and good engines reach about `_GPU_SHARE` of the resulting speed. The estimate is within a tenth
of published figures for bge-base on A10G and bge-large on L4 (benchmarks of Snowflake and infinity), and 40 % above
those for bge-base on H200. On CPUs it is the share of the cores' matrix product that this engine was measured to reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from embed_assets.engine.hardware import available_cores
from embed_assets.engine.metrics import ModelCost
from embed_assets.engine.model import LocalSpace
from embed_assets.engine.model_files import tokenizer_file
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.errors import ModelError, SettingsError

_GPU_SHARE = 0.8
"""Share of the speed by data sheet that is assumed, which fits the published figures named above."""
_BYTES_PER_WIDTH = 80
"""A layer writes and reads about 40 values of 2 bytes per token and unit of width."""
_CPU_SHARE = 0.8
"""Share of the cores' matrix product: float32 was measured to reach 78 to 84 % on two cores of an AMD EPYC (Zen 4)."""
_FEED_TOKENS_PER_SECOND = 670_000
"""What one core reads, chunks, commits and records: `make bench` (feed) measured 1.5 CPU seconds per million tokens of
Markdown with a WordPiece tokenizer, on an AMD EPYC (Zen 4). Parsing PDF takes several times as long."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """Figures from a device's data sheet."""

    name: str
    teraflops: float
    """Dense, at half precision. For CPU cores: at float32, measured."""
    float32_teraflops: float
    gigabytes_per_second: float
    """Memory bandwidth; 0 for CPU cores, whose caches hold the activations."""
    about: str
    """Full name."""


DEVICES = {
    spec.name.lower(): spec
    for spec in (
        DeviceSpec("T4", 65, 8.1, 320, "NVIDIA T4"),
        DeviceSpec("L4", 121, 30.3, 300, "NVIDIA L4"),
        DeviceSpec("A10", 125, 31.2, 600, "NVIDIA A10"),
        DeviceSpec("A10G", 70, 35, 600, "NVIDIA A10G as AWS offers it"),
        DeviceSpec("A100", 312, 19.5, 2039, "NVIDIA A100 80 GB SXM"),
        DeviceSpec("H100", 989, 66.9, 3350, "NVIDIA H100 SXM"),
        DeviceSpec("CPU", 0.113, 0.113, 0, "one core of an AMD EPYC (Zen 4)"),
    )
}
_CPU_FACTORS = {"bfloat16": 1.87, "int8": 2.71}
"""Speed relative to float32, on long chunks, measured by `embed-assets benchmark` on that core."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Estimated time and cost of a job."""

    device: str
    """Short name of the device, as in "A100"."""
    about: str
    """Full name of the device, and the number format."""
    devices: int
    tokens: int
    tokens_per_second: float
    """Speed of one device."""
    hours: float
    """Wall-clock time if all devices are always busy."""
    device_hours: float
    """Summed over the devices."""
    runs: int
    """Machines with `cores` that it takes to read and chunk as fast as the devices embed."""
    cores: int
    """Of this machine."""
    feed_cores: int
    """Cores that it takes to read and chunk as fast as the devices embed."""
    feed_hours: float
    """Wall-clock time of reading and chunking on this machine."""
    bottleneck: str
    """"devices", or "reading and chunking" where this machine's cores take longer for it than the devices."""
    price_per_hour: float | None
    """Price of one device; None if not given."""
    cost: float | None
    """Price of the whole job, in the currency of the price; None without a price."""


def estimate_capacity(
    cost: ModelCost,
    tokens: int,
    mean_tokens: float,
    device: str,
    precision: str = "auto",
    devices: int = 1,
    price_per_hour: float | None = None,
    cores: int | None = None,
) -> Capacity:
    """Estimate for `tokens` in texts of `mean_tokens` each, on `devices` devices of one kind, fed by `cores`.

    By default, those of this machine.

    Raises ``SettingsError`` for an unknown device, int8 on a GPU, or a model without files on this machine.
    """
    spec = DEVICES.get(device.lower())
    if spec is None:
        known = ", ".join(spec.name for spec in DEVICES.values())
        raise SettingsError(f"--device must be one of {known}, got {device!r}; name the nearest one")
    if not cost.linear_weights:
        raise SettingsError(
            "estimating a device's speed needs a model whose files are on this machine; set another EMBED_MODEL"
        )
    operations = 2.0 * cost.linear_weights + 4.0 * cost.attention_width * mean_tokens
    if spec.gigabytes_per_second:
        speed, number_format = _gpu_speed(spec, cost, operations, precision)
    else:
        number_format = "float32" if precision == "auto" else precision
        speed = _CPU_SHARE * spec.teraflops * 1e12 * _CPU_FACTORS.get(precision, 1.0) / operations
    device_hours = tokens / speed / 3600
    cores = cores or available_cores()
    feed_cores = math.ceil(speed * devices / _FEED_TOKENS_PER_SECOND)
    return Capacity(
        device=spec.name,
        about=f"{spec.about}, {number_format}",
        devices=devices,
        tokens=tokens,
        tokens_per_second=round(speed, 1),
        hours=device_hours / devices,
        device_hours=device_hours,
        runs=math.ceil(feed_cores / cores),
        cores=cores,
        feed_cores=feed_cores,
        feed_hours=tokens / (_FEED_TOKENS_PER_SECOND * cores) / 3600,
        bottleneck="devices" if feed_cores <= cores else "reading and chunking",
        price_per_hour=price_per_hour,
        cost=None if price_per_hour is None else round(device_hours * price_per_hour, 4),
    )


def _gpu_speed(spec: DeviceSpec, cost: ModelCost, operations: float, precision: str) -> tuple[float, str]:
    """Tokens per second of one GPU, and the number format."""
    if precision == "int8":
        raise SettingsError(
            f"EMBED_PRECISION=int8 runs on CPUs, got --device {spec.name}; set EMBED_PRECISION=auto, or --device CPU"
        )
    is_half = precision != "float32"
    half = "float16" if precision == "float16" or spec.name == "T4" else "bfloat16"
    moved = _BYTES_PER_WIDTH * cost.attention_width * (1 if is_half else 2)
    teraflops = spec.teraflops if is_half else spec.float32_teraflops
    seconds = operations / (teraflops * 1e12) + moved / (spec.gigabytes_per_second * 1e9)
    return _GPU_SHARE / seconds, half if is_half else "float32"


def cost_of_space(space: EmbeddingSpace) -> ModelCost:
    """The arithmetic of the space's model, read from its configuration without loading weights.

    All zeros for a model without files on this machine. Raises ``ModelError`` when the configuration can't be used.
    """
    if not isinstance(space, LocalSpace):
        return ModelCost()
    import torch
    from transformers import AutoConfig, AutoModel

    from embed_assets.engine.backends.torch_backend import cost_of

    directory = tokenizer_file(space.directory).parent
    options: dict[str, Any] = {"trust_remote_code": space.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, **options)
        make: Any = AutoModel.from_config
        with torch.device("meta"):
            return cost_of(make(config, **options))
    except Exception as error:
        raise ModelError(
            f"the size of {space.model!r} can't be derived from its config.json: {type(error).__name__}: {error}; "
            "leave --device out"
        ) from error
