"""``fake:<dim>[@name][~texts_per_second]``: vectors computed from the text alone, for tests and dry runs."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.metrics import ModelCost
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.space import EmbeddingSpace, ModelChoice, truncated_dimension
from embed_assets.engine.tokenization import TokenizedTexts, word_tokenizer_json
from embed_assets.errors import SettingsError

libraries: Sequence[str] = ()
"""Empty: there is nothing to tune."""
MAX_LENGTH = 256
"""Tokens it reads, like the sample model."""
_FAKE = re.compile(r"fake:(?P<dimension>[1-9]\d{0,4})(?:@(?P<name>[\w.-]+))?(?:~(?P<speed>\d+(?:\.\d+)?))?")


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A parsed ``fake:`` setting."""

    dimension: int
    name: str = ""
    """Models of different names give different vectors."""
    texts_per_second: float = 0.0
    """Simulated speed; 0: as fast as possible."""

    @classmethod
    def parse(cls, model: str) -> FakeModel:
        """The fake model that a setting names. Raises ``SettingsError`` when it is malformed."""
        match = _FAKE.fullmatch(model)
        if match is None:
            raise SettingsError(
                f"a fake model is fake:<dim>[@name][~texts_per_second], got EMBED_MODEL={model!r}; correct it"
            )
        return cls(int(match["dimension"]), match["name"] or "", float(match["speed"] or 0))


def resolve(choice: ModelChoice) -> EmbeddingSpace:
    """The space of a fake model, identified by name and dimension.

    Raises ``SettingsError`` when the setting is malformed, or truncation exceeds the dimension.
    """
    fake = FakeModel.parse(choice.model)
    truncated_dimension(fake.dimension, choice.truncate_dim)
    return EmbeddingSpace(
        choice.model,
        weights_hash=f"fake:{fake.dimension}@{fake.name}",
        tokenizer_hash="words",
        modules_hash="fake",
        max_seq_length=MAX_LENGTH,
        prompt=choice.prompt or "",
        query_prompt=choice.query_prompt or "",
        truncate_dim=choice.truncate_dim,
        tokenizer_json=word_tokenizer_json(),
    )


def load(space: EmbeddingSpace, options: EngineOptions) -> FakeBackend:
    """The backend of a fake model. Ignores `options`."""
    return FakeBackend(FakeModel.parse(space.model), space.truncate_dim)


class FakeBackend:
    """Hashes texts instead of embedding them."""

    device = "cpu"
    precision = "float32"
    name = "fake"
    workers = 1
    cost = ModelCost()

    def __init__(self, model: FakeModel, truncate_dim: int | None = None, layout: Layout | None = None) -> None:
        self._model = model
        self.dimension = truncated_dimension(model.dimension, truncate_dim)
        self.layout = layout or Layout()

    def stop_on(self, event: threading.Event) -> None:
        """Does nothing: it never waits."""

    def enter_worker(self) -> None:
        """Does nothing: there is nothing to prepare."""

    def new_buffer(self, rows: int) -> np.ndarray:
        """Zeros: float32, shape (rows, dimension)."""
        return np.zeros((rows, self.dimension), dtype=np.float32)

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: np.ndarray) -> None:
        """Write the bytes of each text's hash, centred around zero, to its row of `buffer`."""
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
        """Always None: there is no GPU."""

    def release_memory(self) -> None:
        """Does nothing: it holds no memory."""
