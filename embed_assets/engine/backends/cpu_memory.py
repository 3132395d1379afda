"""Keeps the memory of models on CPUs bounded.

Batches have hundreds of shapes, and for each one oneDNN compiles operators and the allocator cuts its heap anew.
Together they made a process with all-MiniLM-L6-v2 grow from 1 to 3.7 GB in four minutes.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

_CACHED = "32"
"""Operators that torch and oneDNN each keep, in place of 1,024. With fewer, batches take no longer."""
_TRIM_SECONDS = 10.0
"""The process above then stays between 0.9 and 1.8 GB."""


def bound_operator_caches() -> None:
    """Have torch keep few of oneDNN's operators, unless the user's environment says how many.

    To be called before the first operator runs. See https://github.com/pytorch/pytorch/issues/27971.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", _CACHED)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _CACHED)


class Trimmer:
    """Returns memory that was freed to the operating system, every few seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._trim, self._clock = _malloc_trim(), clock
        self._last = clock()

    def after_batch(self) -> None:
        """Trim the heap if it is time to; from any thread."""
        now = self._clock()
        if self._trim is not None and now - self._last > _TRIM_SECONDS:
            self._last = now
            self._trim(0)


def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function; None with another C library."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return None
    return found
