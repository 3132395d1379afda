"""What went wrong in a forward pass, and whether trying again can help. Pure."""

from __future__ import annotations

from embed_assets.errors import UserError

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_alloc_failed",
)
_CERTAIN = (
    UserError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    NotImplementedError,
    AssertionError,
    ArithmeticError,
)
"""Errors of the program or its input: the same call fails again. A backend that raises ours has tried enough."""


def is_out_of_memory(error: BaseException) -> bool:
    """A device or the main memory was full: CUDA, MPS and the CPU's allocators say so in different words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def is_transient(error: BaseException) -> bool:
    """Trying again may help: the device or what lies between hiccuped."""
    return isinstance(error, Exception) and not isinstance(error, _CERTAIN) and not is_out_of_memory(error)


def reason_of(error: BaseException) -> str:
    """One line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
