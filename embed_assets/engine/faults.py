"""Classifies errors of a forward pass: out of memory, transient or permanent. Pure functions."""

from __future__ import annotations

from embed_assets.errors import ModelError, UserError

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
"""Parts of the messages, in lower case, by which CUDA, MPS, cuBLAS, cuDNN and the CPU's allocators report it."""
_PERMANENT = (
    UserError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    NotImplementedError,
    AssertionError,
    ArithmeticError,
)
"""Errors of the program or its input: the same call fails again. A `UserError` comes from a backend that has
already retried."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or main memory was full, whichever allocator reports it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def is_transient(error: BaseException) -> bool:
    """Whether a retry may help, as after a hiccup of the device or of the connection to it."""
    return isinstance(error, Exception) and not isinstance(error, _PERMANENT) and not is_out_of_memory(error)


def is_models_fault(error: BaseException) -> bool:
    """Whether the model, or the way to it, is at fault and no text: a backend that says so has retried enough."""
    return isinstance(error, ModelError) or (isinstance(error, UserError) and error.is_retryable)


def reason_of(error: BaseException) -> str:
    """Type and message of an error on one line of at most 500 characters, enough for a log or a table cell."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
