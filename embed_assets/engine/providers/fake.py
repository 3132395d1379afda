"""``fake:<dim>[@name][~texts_per_second][+MODEL]``: vectors computed from the text alone, for tests and measurements.

With ``+MODEL``, texts are chunked and tokenized as for that model, so that everything but the model can be measured.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embed_assets.engine.backend import Fetched
from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.metrics import ModelCost
from embed_assets.engine.model import TokenizerFiles
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.space import EmbeddingSpace, ModelChoice, truncated_dimension
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import SettingsError

libraries: Sequence[str] = ()
"""Empty: there is nothing to tune."""
MAX_LENGTH = 256
"""Tokens it reads, like the sample model."""
_FAKE = re.compile(
    r"(?P<identity>fake:(?P<dimension>[1-9]\d{0,4})(?:@(?P<name>[\w.-]+))?)(?:~(?P<speed>\d+(?:\.\d+)?))?(?:\+(?P<model>.+))?"
)


@dataclass(frozen=True)
class FakeSpace(EmbeddingSpace):
    """The space of a fake model. Its `model` leaves the speed out."""

    dimension: int = 0
    name_in_vectors: str = ""
    """Models of different names give different vectors."""
    texts_per_second: float = 0.0
    """Simulated speed; 0: as fast as possible."""

    @property
    def table_name(self) -> str:
        """The setting without the model that lends its tokenizer."""
        return self.model.partition("+")[0]


def resolve(choice: ModelChoice) -> FakeSpace:
    """The space of a fake model, identified by name, dimension and tokenizer.

    Raises ``SettingsError`` when the setting is malformed or truncation exceeds the dimension, ``ModelError`` when the
    model that lends its tokenizer can't be found.
    """
    match = _FAKE.fullmatch(choice.model)
    if match is None:
        raise SettingsError(
            f"a fake model is fake:<dim>[@name][~texts_per_second][+MODEL], got {choice.model!r}; correct EMBED_MODEL"
        )
    dimension, name = int(match["dimension"]), match["name"] or ""
    truncated_dimension(dimension, choice.truncate_dim)
    lender = match["model"]
    files = TokenizerFiles.of(lender or "", MAX_LENGTH)
    return FakeSpace(
        match["identity"] + (f"+{lender}" if lender else ""),
        weights_hash=f"fake:{dimension}@{name}",
        tokenizer_hash=files.hash,
        modules_hash="fake",
        max_seq_length=files.max_seq_length,
        prompt=choice.prompt or "",
        query_prompt=choice.query_prompt or "",
        truncate_dim=choice.truncate_dim,
        tokenizer_json=files.description,
        dimension=dimension,
        name_in_vectors=name,
        texts_per_second=float(match["speed"] or 0),
    )


def load(space: EmbeddingSpace, options: EngineOptions) -> FakeBackend:
    """The backend of a fake model. Ignores `options`."""
    assert isinstance(space, FakeSpace)
    return FakeBackend(space)


class FakeBackend:
    """Hashes texts instead of embedding them."""

    device = "cpu"
    precision = "float32"
    name = "fake"
    workers = 1
    cost = ModelCost()

    def __init__(self, space: FakeSpace, layout: Layout | None = None) -> None:
        self._space = space
        self.dimension = truncated_dimension(space.dimension, space.truncate_dim)
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
        if self._space.texts_per_second:
            time.sleep(len(batch.rows) / self._space.texts_per_second)
        prefix = self._space.name_in_vectors.encode() + b"\0"
        size = self._space.dimension
        data = b"".join(
            hashlib.shake_128(prefix + texts[row].encode("utf-8", "surrogatepass")).digest(size) for row in batch.rows
        )
        vectors = np.frombuffer(data, dtype=np.uint8).reshape(len(batch.rows), size).astype(np.float32) - 127.5
        buffer[batch.rows] = vectors[:, : self.dimension]

    def fetch(self, buffer: np.ndarray) -> Fetched:
        """The vectors in the buffer, scaled to unit length."""
        return Fetched.normalized(buffer)

    def usage(self) -> None:
        """Always None: there is no GPU."""

    def release_memory(self) -> None:
        """Does nothing: it holds no memory."""
