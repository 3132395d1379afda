"""How busy a CUDA GPU is, from NVIDIA's management library."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuUsage:
    """One reading."""

    utilization_percent: float
    """Share of the last second or less in which a kernel ran."""
    memory_used_bytes: int
    """By all processes."""


class GpuMonitor:
    """Reads one GPU. It gives up for good, and says so once, where the library or the driver does not answer."""

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        """`uuid` as torch tells it; `nvml` has the functions of ``pynvml``, which is imported when it is None."""
        self._nvml: Any = nvml
        self._handle: Any = None
        try:
            if nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        except Exception as error:  # the library's errors have types of their own, made at run time
            _log.warning("the GPU's utilisation can't be read: %s: %s", type(error).__name__, error)

    def read(self) -> GpuUsage | None:
        """The present usage; None when it can't be told."""
        if self._handle is None:
            return None
        try:
            rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except Exception as error:
            _log.warning("the GPU's utilisation can't be read any more: %s: %s", type(error).__name__, error)
            self._handle = None
            return None
        return GpuUsage(float(rates.gpu), int(memory.used))
