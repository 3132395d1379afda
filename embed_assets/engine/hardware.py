"""Reads what this machine offers: cores, memory, devices, and how fast it multiplies matrices."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from embed_assets.engine import user_cache
from embed_assets.errors import SettingsError
from embed_assets.records import hash_parts

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_MAX_WORKERS = 4
"""More workers overlap more, but each holds its own activations and has fewer cores. Not measured above 2 cores."""
_CGROUP = Path("/sys/fs/cgroup")
"""Limits of the container, as cgroup v2 states them."""


@dataclass(slots=True)
class _Limits:
    """The part of the machine that this process may use."""

    cores: int | None = None
    """None: all."""
    gpu_share: float = 1.0
    """Share of the GPU's memory, up to 1."""


_limits = _Limits()


def limit_resources(cores: int | None, gpu_share: float) -> None:
    """Limit this process to so many cores and that share of the GPU's memory, from now on."""
    _limits.cores, _limits.gpu_share = cores, gpu_share


def available_cores() -> int:
    """Cores this process may use, by its affinity, the container's quota and `limit_resources`; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, min(cores, _limits.cores or cores))


def cpu_workers() -> int:
    """Number of batches to compute concurrently on this CPU. Each worker gets its share of the cores."""
    return min(_MAX_WORKERS, available_cores())


def share_cores(workers: int) -> None:
    """Make torch use one worker's share of the cores, out of `workers`, in the calling thread."""
    import torch

    torch.set_num_threads(max(1, available_cores() // workers))


def available_memory_bytes() -> int | None:
    """Bytes of main memory this process could still allocate, within the container's limit; None where unknown."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
            if limit.strip().isdigit() and used.strip().isdigit():
                free = min(free, int(limit) - int(used))
            return max(0, free)
    return None


def resident_bytes(peak: bool = False) -> int:
    """Bytes this process holds now or, with `peak`, held at most since `reset_peak_memory`; 0 where unknown."""
    name = "VmHWM:" if peak else "VmRSS:"
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_memory() -> None:
    """Reset the peak that `resident_bytes(peak=True)` reports. Does nothing where the system does not support it."""
    with contextlib.suppress(OSError):  # no Linux, or no permission: the peak counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5", "ascii")


@cache
def cpu_name() -> str:
    """The processor's name, with the instruction sets that decide its speed."""
    model, flags = platform.processor() or platform.machine(), ""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        if key.strip() == "flags":
            found = set(value.split())
            flags = " ".join(
                flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in found
            )
            break
    return f"{model} ({flags})" if flags else model


@dataclass(frozen=True, slots=True)
class Device:
    """A device that models run on."""

    name: str
    """torch's name, as in "cpu", "cuda:0" or "mps"."""
    kind: str
    """"cpu", "cuda" or "mps"."""
    description: str
    """What its speed depends on: the GPU's name, or the processor and its cores. Keys the cached measurements."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None for other kinds."""

    def free_bytes(self) -> int | None:
        """Bytes that are free on the device now; None where unknown."""
        if self.kind == "cpu":
            return available_memory_bytes()
        if self.kind == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info(self.name)
            return int(min(free, _limits.gpu_share * total - torch.cuda.memory_reserved(self.name)))
        return None

    def reset_peak(self) -> None:
        """Reset the peak that `peak_bytes` reports."""
        if self.kind == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.name)
        else:
            reset_peak_memory()

    def peak_bytes(self) -> int:
        """Maximum bytes this process held on the device since `reset_peak`."""
        if self.kind == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self.name))
        return resident_bytes(peak=True)

    def ceiling_gflops(self, precision: str) -> float:
        """Matrix-product ceiling in a precision, in billions of operations per second; 0 when it can't be measured.

        Measured once per machine, then read from the cache.
        """
        name = hash_parts((self.description, self.kind, precision))
        with contextlib.suppress(ValueError):
            return float(user_cache.read("ceilings", name) or "")
        # torch has no plain int8 product to measure. With VNNI, int8 does four times float32's operations per cycle.
        factor = 1 if precision != "int8" else 4 if "vnni" in self.description else 2
        try:
            ceiling = factor * measure_gemm_gflops(self.name, "float32" if precision == "int8" else precision)
        except RuntimeError as error:  # most likely out of memory
            _log.warning("the matrix-product ceiling of %s could not be measured: %s", self.name, error)
            return 0.0
        user_cache.write("ceilings", name, str(round(ceiling, 1)))
        return ceiling


def resolve_device(setting: str) -> Device:
    """The device that a setting names; "auto" takes the fastest available.

    Raises ``SettingsError`` for a name that torch does not know, or for CUDA where there is no GPU.
    """
    import torch

    name = setting
    if setting == "auto":
        from sentence_transformers.util import get_device_name

        name = str(get_device_name())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(
            f"EMBED_DEVICE must be auto, cpu, cuda, cuda:1, mps ..., got {setting!r}; correct it"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError(
                f"EMBED_DEVICE={setting!r} needs a CUDA GPU and a torch built for it; "
                "neither was found; set EMBED_DEVICE=auto"
            )
        index = device.index or 0
        if _limits.gpu_share < 1:
            # A replica over its share makes others run out of memory, which they can't prevent by smaller batches.
            torch.cuda.set_per_process_memory_fraction(_limits.gpu_share, index)
        return Device(name, "cuda", torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
    return Device(name, device.type, f"{cpu_name()} x {available_cores()}")


def measure_gemm_gflops(device: str, precision: str, seconds: float = 0.4) -> float:
    """Billions of operations per second of a large matrix product: the ceiling for a model's arithmetic.

    The best of the runs that fit into about `seconds`. On CPUs both of torch's libraries are tried for float32, since
    which one is faster depends on the processor. Raises ``RuntimeError`` when memory runs out.
    """
    import torch

    dtype = getattr(torch, precision)
    # The size of a layer of MiniLM on CPUs; large enough to fill any GPU.
    rows, inner, columns = (2048, 384, 1536) if device == "cpu" else (8192, 4096, 4096)
    a = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)

    def timed(product: Callable[[], torch.Tensor]) -> float:
        shortest = float("inf")
        product()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            started = time.perf_counter()
            product()
            _synchronize(device)
            shortest = min(shortest, time.perf_counter() - started)
        return 2 * rows * inner * columns / shortest / 1e9

    with torch.inference_mode():
        best = timed(lambda: torch.nn.functional.linear(a, weight))
        if device == "cpu" and dtype == torch.float32 and torch._C._has_mkldnn:
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            best = max(best, timed(lambda: torch.ops.mkldnn._linear_pointwise(a, reordered, None, "none", [], "")))
    return best


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device.startswith("mps"):
        torch.mps.synchronize()


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""
