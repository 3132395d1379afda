"""A model that is none: vectors that depend on the text alone, at a speed of one's choice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np

from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.metrics import ModelCost
from embed_assets.engine.model import FakeModel, truncated_dimension
from embed_assets.engine.tokenization import TokenizedTexts


class FakeBackend:
    """For tests and dry runs."""

    device = "cpu"
    precision = "float32"
    name = "fake"
    workers = 1
    cost = ModelCost()

    def __init__(self, model: FakeModel, truncate_dim: int | None = None, layout: Layout | None = None) -> None:
        self._model = model
        self.dimension = truncated_dimension(model.dimension, truncate_dim)
        self.layout = layout or Layout()

    def enter_worker(self) -> None:
        """Nothing to prepare."""

    def new_buffer(self, rows: int) -> np.ndarray:
        """float32, shape (rows, dimension)."""
        return np.zeros((rows, self.dimension), dtype=np.float32)

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: np.ndarray) -> None:
        """The bytes of a hash of each text, centred."""
        if self._model.texts_per_second:
            time.sleep(len(batch.rows) / self._model.texts_per_second)
        prefix = self._model.name.encode() + b"\0"
        size = self._model.dimension
        data = b"".join(
            hashlib.shake_128(prefix + texts[row].encode("utf-8", "surrogatepass")).digest(size) for row in batch.rows
        )
        vectors = np.frombuffer(data, dtype=np.uint8).reshape(len(batch.rows), size).astype(np.float32) - 127.5
        buffer[batch.rows] = vectors[:, : self.dimension]

    def fetch(self, buffer: np.ndarray) -> np.ndarray:
        """The buffer itself."""
        return buffer

    def usage(self) -> None:
        """There is no GPU."""

    def release_memory(self) -> None:
        """It holds none."""
