"""The two things every model is behind: a `Backend` computes batches, an `Embedder` embeds windows of texts."""

from __future__ import annotations

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
    """Texts that are embedded together, prompt included: the unit of checkpointing and of distribution."""

    texts: Sequence[str]
    hashes: Sequence[str] = ()
    """Their input hashes, where somebody looks for the vectors by them."""


@dataclass(frozen=True, slots=True)
class EmbeddedWindow:
    """A window that was embedded."""

    window: Window
    vectors: np.ndarray
    """float32, shape (texts, dimension), unit norm, in the order of the texts; zeros for rejected ones."""
    is_truncated: np.ndarray
    """bool, shape (texts,)."""
    rejected: dict[int, str]
    """Rows of texts the model gave no usable vector for, and why."""
    stats: EngineStats
    staged_as: str | None = None
    """Name under which a worker elsewhere has staged the vectors; they are not in `vectors` then."""


OnTick = Callable[[int, int], None]
"""Called every few seconds with the texts and tokens of a partition that are done."""


class Embedder(Protocol):
    """A model that is ready."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def embed_windows(self, windows: Iterable[Window], on_tick: OnTick) -> Iterator[EmbeddedWindow]:
        """Embed the windows; they may come back in another order."""
        ...


class Backend(Protocol):
    """A model on its device."""

    precision: str
    dimension: int
    """Length of a vector."""
    layout: Layout
    workers: int
    """Batches that are computed at the same time."""

    @property
    def device(self) -> str:
        """Where it computes, as in "cuda:0"."""
        ...

    @property
    def name(self) -> str:
        """Library and path, as in "torch-packed"."""
        ...

    @property
    def cost(self) -> ModelCost:
        """Arithmetic of a pass, for the roofline."""
        ...

    def enter_worker(self) -> None:
        """Called once in each worker's thread, before its first batch."""
        ...

    def new_buffer(self, rows: int) -> Any:
        """Where a window's vectors are collected."""
        ...

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: Any) -> None:
        """Compute a batch, and put its vectors (not normalised) into its rows of `buffer`."""
        ...

    def fetch(self, buffer: Any) -> np.ndarray:
        """The collected vectors, float32 of shape (rows, dimension), in main memory."""
        ...

    def usage(self) -> GpuUsage | None:
        """How busy the GPU is, where there is one."""
        ...

    def release_memory(self) -> None:
        """Give back what a failed batch held."""
        ...
