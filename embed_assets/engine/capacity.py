"""What embedding a number of tokens takes on a device one does not have at hand: an estimate, from its data sheet.

A model's pass over a batch multiplies matrices, and moves what lies between the layers through the device's memory. On
a GPU the two hardly overlap, so their times add up; of that sum, well-made engines reach about `_GPU_SHARE`. The
estimate is within a tenth of what is published for bge-base on A10G and bge-large on L4 (Snowflake's and infinity's
benchmarks), and 40 % above it for bge-base on H200. On CPUs it is the share of the cores' matrix product that this
engine was measured to reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from embed_assets.engine.metrics import ModelCost
from embed_assets.engine.model import LocalSpace
from embed_assets.engine.model_files import tokenizer_file
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.errors import ModelError, SettingsError

_GPU_SHARE = 0.8
_BYTES_PER_WIDTH = 80
"""A layer writes and reads about 40 numbers of 2 bytes per token and unit of width."""
_CPU_SHARE = 0.8
_FEED_TOKENS_PER_SECOND = 500_000
"""What one run's process chunks: `make bench` measured 480,000 on one core of an AMD EPYC (Zen 4), 620,000 on two."""


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device's data sheet."""

    name: str
    teraflops: float
    """Dense, at half precision (CPU cores: at float32, measured)."""
    float32_teraflops: float
    gigabytes_per_second: float
    """Of its memory; 0 for CPU cores, whose caches hold what lies between layers."""
    about: str


DEVICES = {
    spec.name.lower(): spec
    for spec in (
        DeviceSpec("T4", 65, 8.1, 320, "NVIDIA T4"),
        DeviceSpec("L4", 121, 30.3, 300, "NVIDIA L4"),
        DeviceSpec("A10", 125, 31.2, 600, "NVIDIA A10"),
        DeviceSpec("A10G", 70, 35, 600, "NVIDIA A10G as AWS has it"),
        DeviceSpec("A100", 312, 19.5, 2039, "NVIDIA A100 80 GB SXM"),
        DeviceSpec("H100", 989, 66.9, 3350, "NVIDIA H100 SXM"),
        DeviceSpec("CPU", 0.113, 0.113, 0, "one core of an AMD EPYC (Zen 4)"),
    )
}
_CPU_FACTORS = {"bfloat16": 1.87, "int8": 2.71}
"""Against float32, on long chunks, by `embed-assets benchmark` on that core."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a job takes."""

    device: str
    about: str
    devices: int
    tokens: int
    tokens_per_second: float
    """Of one device."""
    hours: float
    """With all devices busy all the time."""
    device_hours: float
    runs: int
    """Runs at a time that it takes to keep all devices busy, where documents are still to be read and chunked."""
    price_per_hour: float | None
    """Of one device."""
    cost: float | None


def estimate_capacity(
    cost: ModelCost,
    tokens: int,
    mean_tokens: float,
    device: str,
    precision: str = "auto",
    devices: int = 1,
    price_per_hour: float | None = None,
) -> Capacity:
    """What so many tokens, in texts of `mean_tokens` each, take on `devices` of the kind. Raises ``SettingsError``."""
    spec = DEVICES.get(device.lower())
    if spec is None:
        known = ", ".join(spec.name for spec in DEVICES.values())
        raise SettingsError(f"--device must be one of {known}, got {device!r}; name the nearest one")
    if not cost.linear_weights:
        raise SettingsError("a device's speed is that of a model whose files are here; set another EMBED_MODEL")
    operations = 2.0 * cost.linear_weights + 4.0 * cost.attention_width * mean_tokens
    if spec.gigabytes_per_second:
        speed, number_format = _gpu_speed(spec, cost, operations, precision)
    else:
        number_format = "float32" if precision == "auto" else precision
        speed = _CPU_SHARE * spec.teraflops * 1e12 * _CPU_FACTORS.get(precision, 1.0) / operations
    device_hours = tokens / speed / 3600
    return Capacity(
        device=spec.name,
        about=f"{spec.about}, {number_format}",
        devices=devices,
        tokens=tokens,
        tokens_per_second=round(speed, 1),
        hours=device_hours / devices,
        device_hours=device_hours,
        runs=max(1, math.ceil(speed * devices / _FEED_TOKENS_PER_SECOND)),
        price_per_hour=price_per_hour,
        cost=None if price_per_hour is None else round(device_hours * price_per_hour, 4),
    )


def _gpu_speed(spec: DeviceSpec, cost: ModelCost, operations: float, precision: str) -> tuple[float, str]:
    """Tokens per second, and in which format."""
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
    """The arithmetic of the space's model, from its configuration: no weights are loaded. Raises ``ModelError``."""
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
            f"the size of {space.model!r} can't be told from its config.json: {type(error).__name__}: {error}; "
            "leave --device out"
        ) from error
