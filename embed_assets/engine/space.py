"""Defines an embedding space: everything that changes a vector. Equal spaces have comparable, reusable vectors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from embed_assets.engine.inputs import CONTEXT_TOKENS, ModelInput
from embed_assets.engine.tokenization import ModelTokenizer
from embed_assets.errors import SettingsError
from embed_assets.records import hash_parts


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The settings that choose a model."""

    model: str
    """EMBED_MODEL: a folder, a Hub id, or a name with a provider's prefix."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None: the default branch."""
    prompt: str | None = None
    """Text before every chunk, or the name of one of the model's prompts; None: the model's default."""
    query_prompt: str | None = None
    """Text before every query, or the name of one of the model's prompts; None: the model's default."""
    truncate_dim: int | None = None
    """Dimensions to keep; None: all."""
    trust_remote_code: bool = False
    """Whether code inside the model's directory may run."""
    allow_pickled_weights: bool = False
    """Whether pickled weights may be loaded, which can run code."""
    endpoint: str = ""
    """Base URL of the server that runs the model; empty for models that run here."""


@dataclass(frozen=True)
class EmbeddingSpace:
    """Everything that changes a vector, and nothing that does not, such as the device or the batch size."""

    model: str
    """The setting that names the model."""
    weights_hash: str
    tokenizer_hash: str
    modules_hash: str
    """Hash over architecture, pooling, dense layers and normalisation."""
    max_seq_length: int
    """Tokens that the model reads, including special tokens; the rest of a text is truncated."""
    prompt: str
    """The exact text put before every chunk."""
    query_prompt: str
    """The exact text put before a search query. Not part of the fingerprint: it changes no stored vector."""
    truncate_dim: int | None
    """Dimensions that are kept; None: all."""
    tokenizer_json: str = field(repr=False)
    """Contents of a ``tokenizer.json``: the tokenizer that cuts texts and counts tokens."""
    number_format: str = "float"
    """"float", or "int8:<artifact hash>" for a quantized model."""
    context: str = ""
    """What is put between prompt and text: "title", "headings", "title,headings", or nothing."""

    @property
    def is_remote(self) -> bool:
        """Whether a server elsewhere runs the model."""
        return False

    @cached_property
    def fingerprint(self) -> str:
        """32 hex characters that are equal exactly when the vectors are comparable and reusable."""
        parts = [self.weights_hash, self.tokenizer_hash, self.modules_hash, self.prompt, self.number_format]
        parts += [str(self.max_seq_length), str(self.truncate_dim)]
        return hash_parts([*parts, f"context:{self.context}"] if self.context else parts)

    @property
    def name(self) -> str:
        """Name of the space's table: the model's slug and the fingerprint's first eight characters."""
        base = self.table_name.rstrip("/").rpartition("/")[2]
        slug = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-") or "model"
        return f"{slug[:48]}-{self.fingerprint[:8]}"

    @property
    def table_name(self) -> str:
        """The part of the model's setting that names its table."""
        return self.model.removeprefix("package:")

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The model's tokenizer. Raises ``ModelError`` when it has no fast one."""
        return ModelTokenizer.from_description(self.tokenizer_json, self.model)

    def quantized(self, artifact_hash: str) -> Self:
        """The space of the int8 model with this hash. Its vectors differ, so it is a space of its own."""
        return replace(self, number_format=f"int8:{artifact_hash}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the prompt takes from every chunk: its own, and one more for the seam between prompt and text."""
        if not self.prompt:
            return 0
        return self.tokenizer.count([self.prompt])[0] - self.tokenizer.special_tokens + 1

    @property
    def context_tokens(self) -> int:
        """Tokens that are kept free for the context in every chunk; 0 without one."""
        return min(CONTEXT_TOKENS, self.max_seq_length // 4) if self.context else 0

    @cached_property
    def model_input(self) -> ModelInput:
        """How a chunk becomes the model's input."""
        parts = self.context.split(",")
        return ModelInput(self.tokenizer, self.prompt, "title" in parts, "headings" in parts, self.context_tokens)

    def describe(self) -> dict[str, str]:
        """Table properties that describe the space, with keys that begin with ``embed_assets.``."""
        values = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "weights": self.weights_hash,
            "tokenizer": self.tokenizer_hash,
            "modules": self.modules_hash,
            "max_seq_length": str(self.max_seq_length),
            "prompt": self.prompt,
            "context": self.context,
            "truncate_dim": str(self.truncate_dim),
            "number_format": self.number_format,
        }
        return {f"embed_assets.{key}": value for key, value in values.items()}


def truncated_dimension(dimension: int, truncate_dim: int | None) -> int:
    """The length of a vector after truncation. Raises ``SettingsError`` when `truncate_dim` exceeds `dimension`."""
    if truncate_dim is not None and truncate_dim > dimension:
        raise SettingsError(
            f"TRUNCATE_DIM must be at most the model's {dimension} dimensions, got {truncate_dim}; "
            "lower EMBED_TRUNCATE_DIM"
        )
    return truncate_dim or dimension
