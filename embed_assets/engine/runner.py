"""Texts to vectors: tokenize a window, sort and pack it, run the batches, put the rows back in order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from embed_assets.engine.batching import pack_batches, padded_tokens
from embed_assets.engine.tokenization import ModelTokenizer, TokenizedTexts
from embed_assets.errors import EmbeddingError

DEFAULT_BATCH_TOKENS = 2048
"""On CPUs a small budget is fastest: activations stay in the cache."""


class Backend(Protocol):
    """The model on its device."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    @property
    def device(self) -> str: ...

    @property
    def precision(self) -> str: ...

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, rows: np.ndarray) -> np.ndarray:
        """float32 vectors of shape (rows, dimension) for the given rows of a window, in their order, not normalised."""
        ...


@dataclass(frozen=True, slots=True)
class EmbeddedTexts:
    """What came out of one window."""

    vectors: np.ndarray
    """float32, shape (texts, dimension), unit norm, in the order of the texts."""
    is_truncated: np.ndarray
    """bool, shape (texts,)."""
    tokens: int
    """Tokens of the texts themselves, special tokens included."""
    padded_tokens: int
    """Tokens the device computed."""
    seconds: float


class Embedder:
    """A model that is ready to embed."""

    def __init__(
        self, backend: Backend, tokenizer: ModelTokenizer, max_seq_length: int, max_batch_tokens: int | None = None
    ) -> None:
        self._backend, self._tokenizer, self._max_seq_length = backend, tokenizer, max_seq_length
        self.max_batch_tokens = max_batch_tokens or DEFAULT_BATCH_TOKENS

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self._backend.dimension

    @property
    def device(self) -> str:
        """Where the model runs."""
        return self._backend.device

    @property
    def precision(self) -> str:
        """Arithmetic of the model."""
        return self._backend.precision

    def embed(self, texts: Sequence[str]) -> EmbeddedTexts:
        """One unit-norm vector per text, prompt already included in the texts.

        Raises ``EmbeddingError`` when the model gives a vector that is not finite, naming the text.
        """
        started = time.perf_counter()
        tokens = self._tokenizer.tokenize(texts, self._max_seq_length)
        lengths = tokens.lengths
        batches = pack_batches(lengths, self.max_batch_tokens)
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for rows in batches:
            vectors[rows] = self._backend.forward(texts, tokens, rows)
        return EmbeddedTexts(
            _normalized(vectors, texts),
            tokens.is_truncated,
            int(lengths.sum()),
            padded_tokens(lengths, batches),
            time.perf_counter() - started,
        )


def _normalized(vectors: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The vectors at unit length; a zero vector stays zero, as in sentence-transformers."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        text = texts[int(np.flatnonzero(~finite)[0])]
        raise EmbeddingError(
            f"the model gave a vector that is not finite for the text {text[:80]!r}; "
            "try another EMBED_PRECISION or EMBED_MODEL"
        )
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)
