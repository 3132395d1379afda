"""The self-check at load: a fast path is used only if it reproduces SentenceTransformer's tokens and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from embed_assets.engine.backend import Fetched
from embed_assets.engine.batching import Batch, Layout, plan_batches
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_WORDS = ("model", "reads", "a long", "text", "whose", "words", "differ", "so that", "every", "position", "matters")
CHECK_TEXTS = (
    "The quick brown fox, naïve café 東京 🙂",
    "",
    "a",
    "x " * 600,
    " ".join(f"{_WORDS[(n * n + 3 * n) % len(_WORDS)]} {n % 97}" for n in range(600)),
    "Delta tables hold the vectors.",
    "مرحبا بالعالم\n\n  two  spaces",
    "a",
    "def add(a: int, b: int) -> int:\n    return a + b  # " + "sum " * 30,
)
"""Empty, one word, longer than most models read, several scripts, duplicates, and a mix of lengths."""

MIN_COSINE = {"float32": 0.99999, "bfloat16": 0.999, "float16": 0.999, "int8": 0.9}
"""Minimum cosine to SentenceTransformer in float32, for each precision.

Over chunks, all-MiniLM-L6-v2 was measured at 1.00000 (float32), 0.99995 (bfloat16) and 0.98966 (int8). The limits leave
room for deeper models and the odd texts above, while swapped rows or texts that see each other stay below them.
"""


_TINY_TOKENS = 4
"""Texts of up to this many tokens, special ones included, say little: rounding moves their vectors ten times as far."""
_TINY_SLACK = 10
"""How much farther they may be from the reference."""


class InaccurateError(ModelError):
    """The model's vectors in one precision differ too much from those in float32."""


class Forward(Protocol):
    """The part of a backend that the self-check needs."""

    @property
    def layout(self) -> Layout: ...

    def new_buffer(self, rows: int) -> Any: ...

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: Any) -> None: ...

    def fetch(self, buffer: Any) -> Fetched: ...


def reference_vectors(space: EmbeddingSpace, model: SentenceTransformer) -> np.ndarray:
    """SentenceTransformer's vectors of the check texts, computed one by one: unit norm, shape (texts, dimension)."""
    vectors = model.encode(list(CHECK_TEXTS), prompt=space.prompt, batch_size=1, normalize_embeddings=True)
    return np.asarray(vectors, dtype=np.float32)


def min_cosine(backend: Forward, space: EmbeddingSpace, reference: np.ndarray) -> float:
    """The lowest cosine to `reference` (shape (texts, dimension)), over each text alone and all in one batch.

    It exposes swapped rows and texts that attend to their neighbours in the batch. An unusable vector counts as -1.
    """
    texts = [space.prompt + text for text in CHECK_TEXTS]
    tokens = space.tokenizer.tokenize(texts, space.max_seq_length)
    slack = np.where(tokens.lengths <= _TINY_TOKENS, _TINY_SLACK, 1)
    worst = 1.0
    for budget in (1, len(texts) * space.max_seq_length):
        buffer = backend.new_buffer(len(texts))
        for batch in plan_batches(tokens.lengths, budget, backend.layout):
            backend.forward(texts, tokens, batch, buffer)
        fetched = backend.fetch(buffer)
        cosines = np.where(fetched.is_usable, (fetched.vectors * reference).sum(axis=1), -1.0)
        worst = min(worst, float((1 - (1 - cosines) / slack).min()))
    return worst


def check_tokenizer(space: EmbeddingSpace, tokenizer: Any) -> None:
    """Raise ``ModelError`` unless the loaded model's `tokenizer` gives the same ids as the space's tokenizer."""
    ours = space.tokenizer.tokenize(CHECK_TEXTS, space.max_seq_length)
    theirs = tokenizer(list(CHECK_TEXTS), truncation=True, max_length=space.max_seq_length)["input_ids"]
    for i, text in enumerate(CHECK_TEXTS):
        if ours.ids[ours.offsets[i] : ours.offsets[i + 1]].tolist() != list(theirs[i]):
            raise ModelError(
                f"the tokenizer.json of {space.model!r} gives other tokens than the loaded model for {text[:40]!r}; "
                "save the model again"
            )
