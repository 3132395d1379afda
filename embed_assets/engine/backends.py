"""The model behind the runner: torch through SentenceTransformer's own modules, or a fake without any."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from embed_assets.engine.model import (
    EmbeddingSpace,
    FakeModel,
    load_sentence_transformer,
    parse_fake,
    truncated_dimension,
)
from embed_assets.engine.runner import Embedder
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_PROBE_TEXTS = ("", "a", "The quick brown fox, naïve café 東京 🙂", "x " * 600)


def load_embedder(space: EmbeddingSpace, device: str = "auto", max_batch_tokens: int | None = None) -> Embedder:
    """The model of `space`, loaded. Raises ``ModelError`` or ``SettingsError`` when it can't be."""
    fake = parse_fake(space.model)
    if fake is not None:
        backend: FakeBackend | TorchBackend = FakeBackend(fake, space.truncate_dim)
    else:
        backend = TorchBackend(space, load_sentence_transformer(space, device))
    return Embedder(backend, space.tokenizer, space.max_seq_length, max_batch_tokens)


class FakeBackend:
    """Vectors that depend on the text alone, at a speed of one's choice."""

    device = "cpu"
    precision = "float32"

    def __init__(self, model: FakeModel, truncate_dim: int | None = None) -> None:
        self._model = model
        self.dimension = truncated_dimension(model.dimension, truncate_dim)

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, rows: np.ndarray) -> np.ndarray:
        """float32, shape (rows, dimension): the bytes of a hash of each text, centred."""
        if self._model.texts_per_second:
            time.sleep(len(rows) / self._model.texts_per_second)
        prefix = self._model.name.encode() + b"\0"
        size = self._model.dimension
        data = b"".join(
            hashlib.shake_128(prefix + texts[row].encode("utf-8", "surrogatepass")).digest(size) for row in rows
        )
        vectors = np.frombuffer(data, dtype=np.uint8).reshape(len(rows), size).astype(np.float32) - 127.5
        return np.asarray(vectors[:, : self.dimension])


class TorchBackend:
    """A SentenceTransformer's own modules, fed with padded batches that were tokenized outside."""

    precision = "float32"

    def __init__(self, space: EmbeddingSpace, model: SentenceTransformer) -> None:
        self._model = model
        self._space = space
        transformer: Any = model[0]
        tokenizer: Any = getattr(model, "tokenizer", None)
        if not hasattr(transformer, "model") or not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the model {space.model!r} must be a Transformer with a fast tokenizer, "
                f"got {type(transformer).__name__}; choose another EMBED_MODEL"
            )
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._pads_left = tokenizer.padding_side == "left"
        self._inputs = frozenset(tokenizer.model_input_names)
        self._features = {"modality": "text"} | self._prompt_features(transformer)
        native = model.get_embedding_dimension()
        if native is None:
            raise ModelError(f"the model {space.model!r} does not tell its dimension; choose another EMBED_MODEL")
        self.dimension = truncated_dimension(int(native), space.truncate_dim)
        self._check_tokenizer(tokenizer)

    @property
    def device(self) -> str:
        """Name of the torch device."""
        return str(self._model.device)

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, rows: np.ndarray) -> np.ndarray:
        """float32, shape (rows, dimension): one forward pass over the rows, padded to the longest."""
        import torch

        lengths = tokens.lengths[rows]
        width = max(1, int(lengths.max()))
        ids = np.full((len(rows), width), self._pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            place = slice(width - length, width) if self._pads_left else slice(0, length)
            ids[i, place] = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]
            mask[i, place] = 1
        features: dict[str, Any] = dict(self._features)
        device = self._model.device
        features["input_ids"] = torch.from_numpy(ids).to(device)
        features["attention_mask"] = torch.from_numpy(mask).to(device)
        if "token_type_ids" in self._inputs:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        with torch.inference_mode():
            vectors = self._model(features)["sentence_embedding"]
        return np.asarray(vectors[:, : self.dimension].float().cpu().numpy())

    def _prompt_features(self, transformer: Any) -> dict[str, Any]:
        """Where pooling leaves the prompt out (Instructor models), it must know the prompt's length."""
        excludes = any(getattr(module, "include_prompt", True) is False for module in self._model)
        if not (self._space.prompt and excludes):
            return {}
        length = transformer._get_prompt_length(self._space.prompt)
        return {} if length is None else {"prompt_length": length}

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """The tokenizer of the loaded model must give the ids that ours gives."""
        ours = self._space.tokenizer.tokenize(_PROBE_TEXTS, self._space.max_seq_length)
        theirs = tokenizer(list(_PROBE_TEXTS), truncation=True, max_length=self._space.max_seq_length)["input_ids"]
        for i, text in enumerate(_PROBE_TEXTS):
            if ours.ids[ours.offsets[i] : ours.offsets[i + 1]].tolist() != list(theirs[i]):
                raise ModelError(
                    f"the tokenizer.json of {self._space.model!r} gives other tokens than the loaded model "
                    f"for {text[:40]!r}; save the model again"
                )
