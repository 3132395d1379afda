"""Maps models to their providers."""

from __future__ import annotations

from collections.abc import Mapping

from embed_assets.engine.provider import EngineOptions, Provider
from embed_assets.engine.providers import fake, openai, openvino, sentence_transformers
from embed_assets.engine.space import EmbeddingSpace, ModelChoice

_BY_PREFIX: Mapping[str, Provider] = {"fake": fake, "openai": openai}
"""Providers by the word before the colon in the model's setting; all other models are sentence-transformers'."""


def provider_of(model: str, options: EngineOptions | None = None) -> Provider:
    """The provider of the model that a setting names, when it runs with these options."""
    if options is not None and options.quantized is not None:
        return openvino
    return _BY_PREFIX.get(model.partition(":")[0], sentence_transformers)


def resolve_space(choice: ModelChoice) -> EmbeddingSpace:
    """The embedding space that the settings name, without loading the model.

    Raises ``SettingsError`` for an invalid name, ``ModelError`` when the model can't be found, has no safetensors
    weights or no fast tokenizer.
    """
    return provider_of(choice.model).resolve(choice)
