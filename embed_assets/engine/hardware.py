"""What this machine has: cores, memory, and how fast it multiplies matrices."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores this process may use: its affinity, and a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores)


def available_memory_bytes() -> int | None:
    """Main memory this process could still take, a container's limit included; None where it can't be told."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
            if limit.strip().isdigit() and used.strip().isdigit():
                free = min(free, int(limit) - int(used))
            return max(0, free)
    return None


def resident_bytes(peak: bool = False) -> int:
    """Memory this process holds now, or held at most since `reset_peak_memory`; 0 where it can't be told."""
    name = "VmHWM:" if peak else "VmRSS:"
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_memory() -> None:
    """Let `resident_bytes(peak=True)` count from now on, where the system can."""
    with contextlib.suppress(OSError):  # another system, or no permission: the peak counts from the process's start
        Path("/proc/self/clear_refs").write_text("5", "ascii")


@cache
def cpu_name() -> str:
    """The processor's name, with what decides the speed of its arithmetic."""
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


def measure_gemm_gflops(device: str, dtype: Any, seconds: float = 0.4) -> float:
    """Billions of operations per second of a large matrix product: the ceiling for a model's arithmetic.

    On CPUs it is the better of torch's two libraries, for which one is faster depends on the processor.
    """
    import torch

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
