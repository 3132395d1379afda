"""Runs the int8 form of sentence-transformers models, quantized once and stored in the lake, in OpenVINO on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

from embed_assets.engine.backend import Backend
from embed_assets.engine.backends.openvino_backend import load_int8_backend
from embed_assets.engine.model import LocalSpace, require_local
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.providers import sentence_transformers
from embed_assets.engine.space import EmbeddingSpace, ModelChoice

libraries: Sequence[str] = ("openvino",)


def resolve(choice: ModelChoice) -> LocalSpace:
    """The space of the model in floating point. The int8 form's space is known only after quantization."""
    return sentence_transformers.resolve(choice)


def load(space: EmbeddingSpace, options: EngineOptions) -> Backend:
    """The int8 form that `options` hold.

    Raises ``ModelError`` when the model can't be loaded, ``SettingsError`` when it is not on this machine or the extra
    `cpu` is not installed.
    """
    assert options.quantized is not None, "the catalog names this provider for options that hold an int8 form alone"
    return load_int8_backend(require_local(space, "OpenVINO"), options.quantized.xml, options.quantized.weights)
