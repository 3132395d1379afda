"""The interfaces every model implements: a `Backend` computes batches, an `Embedder` embeds windows of texts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.gpu import GpuUsage
from embed_assets.engine.metrics import EngineStats, ModelCost
from embed_assets.engine.tokenization import TokenizedTexts


@dataclass(frozen=True, slots=True)
class Window:
    """Texts that are embedded together: the unit of checkpointing and of distribution."""

    texts: Sequence[str]
    """With the prompt in front of each."""
    hashes: Sequence[str] = ()
    """Input hash of each text, where results are looked up by it; empty otherwise."""
    tokens: TokenizedTexts | None = None
    """The texts' tokens without truncation, where they are known already."""


@dataclass(frozen=True, slots=True)
class EmbeddedWindow:
    """A window and its results."""

    window: Window
    vectors: np.ndarray
    """float32, shape (texts, dimension), unit norm, in the order of the texts; zeros for rejected ones."""
    is_truncated: np.ndarray
    """bool, shape (texts,): whether the text was longer than the model reads."""
    rejected: dict[int, str]
    """Row to reason, for texts without a usable vector."""
    stats: EngineStats
    staged_as: str | None = None
    """Name under which a remote worker staged the vectors; `vectors` does not hold them in that case."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Vectors of a window, from the device."""

    vectors: np.ndarray
    """float32, shape (rows, dimension), unit norm; undefined in rows that are not usable."""
    is_usable: np.ndarray
    """bool, shape (rows,): whether the vector that the model gave is finite and not zero."""

    @classmethod
    def normalized(cls, raw: np.ndarray) -> Fetched:
        """The vectors in `raw`, float32 of shape (rows, dimension), scaled to unit length."""
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.linalg.norm(raw, axis=1, keepdims=True)
            is_usable = np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)
            return cls(np.asarray(raw / np.where(is_usable[:, None], norms, 1), dtype=np.float32), is_usable)


OnTick = Callable[[int, int], None]
"""Progress callback, called every few seconds with the number of texts and of tokens embedded so far."""


class Embedder(Protocol):
    """A loaded model that embeds windows of texts."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def embed_windows(self, windows: Iterable[Window], on_tick: OnTick) -> Iterator[EmbeddedWindow]:
        """Yield each window with its vectors, not necessarily in the order of `windows`."""
        ...


class Backend(Protocol):
    """A loaded model on its device, which computes one batch per call."""

    precision: str
    """Arithmetic of the transformer, as in "bfloat16"."""
    dimension: int
    """Length of a vector."""
    layout: Layout
    """How its batches are laid out."""
    workers: int
    """Number of batches computed concurrently, each in a thread."""

    @property
    def device(self) -> str:
        """Name of the device, as in "cuda:0"."""
        ...

    @property
    def name(self) -> str:
        """Library and code path, as in "torch-packed"."""
        ...

    @property
    def cost(self) -> ModelCost:
        """Arithmetic of a forward pass, for the roofline."""
        ...

    def stop_on(self, event: threading.Event) -> None:
        """Called once, before the first batch: a backend that waits (for a server) stops waiting when the event is
        set."""
        ...

    def enter_worker(self) -> None:
        """Prepare a worker's thread; called once in each, before its first batch."""
        ...

    def new_buffer(self, rows: int) -> Any:
        """A buffer for the vectors of a window of `rows` texts."""
        ...

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: Any) -> None:
        """Compute a batch and write its vectors, not normalised, to its rows of `buffer`."""
        ...

    def fetch(self, buffer: Any) -> Fetched:
        """The vectors in `buffer`, scaled to unit length, in main memory."""
        ...

    def usage(self) -> GpuUsage | None:
        """How busy the GPU is; None without one."""
        ...

    def release_memory(self) -> None:
        """Free what a failed batch still holds on the device."""
        ...
