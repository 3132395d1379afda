"""Reads how busy a CUDA GPU is, through NVIDIA's management library (NVML)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuUsage:
    """One reading of a GPU."""

    utilization_percent: float
    """Percentage of NVML's last sample period (a second or less) in which a kernel ran."""
    memory_used_bytes: int
    """Bytes in use on the GPU, by all processes."""


class GpuMonitor:
    """Reads one GPU. After the first error of the library or driver it warns once and stops reading."""

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        """`uuid` is as torch reports it. `nvml` has the functions of ``pynvml``, which is imported when it is None."""
        self._nvml: Any = nvml
        self._handle: Any = None
        try:
            if nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        except Exception as error:  # NVML creates its error types at run time
            _log.warning("the GPU's utilization can't be read: %s: %s", type(error).__name__, error)

    def read(self) -> GpuUsage | None:
        """The current usage; None when it can't be read."""
        if self._handle is None:
            return None
        try:
            rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except Exception as error:
            _log.warning("the GPU's utilization can no longer be read: %s: %s", type(error).__name__, error)
            self._handle = None
            return None
        return GpuUsage(float(rates.gpu), int(memory.used))
