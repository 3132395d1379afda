"""An embedding space: everything that changes a vector, so that equal spaces have comparable, reusable vectors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from embed_assets.engine.tokenization import ModelTokenizer
from embed_assets.errors import SettingsError
from embed_assets.records import hash_parts


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What the settings say of the model."""

    model: str
    revision: str | None = None
    prompt: str | None = None
    query_prompt: str | None = None
    truncate_dim: int | None = None
    trust_remote_code: bool = False
    allow_pickled_weights: bool = False
    endpoint: str = ""
    """Base URL of the server that has the model, for those that are on one."""


@dataclass(frozen=True)
class EmbeddingSpace:
    """Everything that changes a vector, and nothing else: not the device, not the batch."""

    model: str
    """The setting that names the model."""
    weights_hash: str
    tokenizer_hash: str
    modules_hash: str
    """Architecture, pooling, dense layers, normalisation."""
    max_seq_length: int
    """Tokens the model reads, special tokens included."""
    prompt: str
    """The exact string before every chunk."""
    query_prompt: str
    """The exact string before a search query; not part of the fingerprint, for it changes no stored vector."""
    truncate_dim: int | None
    tokenizer_json: str = field(repr=False)
    """Description of the tokenizer that texts are cut and counted with, as in a ``tokenizer.json``."""
    number_format: str = "float"
    """"int8:<artifact hash>" for a quantized model."""

    @cached_property
    def fingerprint(self) -> str:
        """32 hex characters that are equal exactly when the vectors are comparable and reusable."""
        parts = (self.weights_hash, self.tokenizer_hash, self.modules_hash, self.prompt, self.number_format)
        return hash_parts((*parts, str(self.max_seq_length), str(self.truncate_dim)))

    @property
    def name(self) -> str:
        """Name of the space's table: the model's slug and the fingerprint's first eight characters."""
        base = self.table_name.rstrip("/").rpartition("/")[2]
        slug = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-") or "model"
        return f"{slug[:48]}-{self.fingerprint[:8]}"

    @property
    def table_name(self) -> str:
        """What of the model's setting names it."""
        return self.model.partition("~")[0].removeprefix("package:")

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The model's tokenizer. Raises ``ModelError`` when it has no fast one."""
        return ModelTokenizer.from_description(self.tokenizer_json, self.model)

    def quantized(self, artifact_hash: str) -> Self:
        """The space of the model's int8 form that has this hash: its vectors are others, so it is another space."""
        return replace(self, number_format=f"int8:{artifact_hash}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the prompt takes from every chunk: one more than it has alone, for where it joins the text."""
        if not self.prompt:
            return 0
        return self.tokenizer.count([self.prompt])[0] - self.tokenizer.special_tokens + 1

    def describe(self) -> dict[str, str]:
        """The full description, for the table's properties."""
        values = {
            "model": self.model.partition("~")[0],
            "fingerprint": self.fingerprint,
            "weights": self.weights_hash,
            "tokenizer": self.tokenizer_hash,
            "modules": self.modules_hash,
            "max_seq_length": str(self.max_seq_length),
            "prompt": self.prompt,
            "truncate_dim": str(self.truncate_dim),
            "number_format": self.number_format,
        }
        return {f"embed_assets.{key}": value for key, value in values.items()}


def truncated_dimension(dimension: int, truncate_dim: int | None) -> int:
    """The length of a vector after truncation. Raises ``SettingsError`` when there is not that much of it."""
    if truncate_dim is not None and truncate_dim > dimension:
        raise SettingsError(
            f"TRUNCATE_DIM must be at most the model's {dimension} dimensions, got {truncate_dim}; "
            "lower EMBED_TRUNCATE_DIM"
        )
    return truncate_dim or dimension
