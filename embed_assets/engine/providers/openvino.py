"""Runs sentence-transformers models in OpenVINO on CPUs: the stored int8 form, or the original in float32."""

from __future__ import annotations

from collections.abc import Sequence

from embed_assets.engine.backend import Backend
from embed_assets.engine.backends.openvino_backend import load_int8_backend, load_openvino_backend
from embed_assets.engine.model import LocalSpace, require_local
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.providers import sentence_transformers
from embed_assets.engine.space import EmbeddingSpace, ModelChoice

libraries: Sequence[str] = ("openvino",)


def resolve(choice: ModelChoice) -> LocalSpace:
    """The space of the model in floating point. The int8 form's space is known only after quantization."""
    return sentence_transformers.resolve(choice)


def load(space: EmbeddingSpace, options: EngineOptions) -> Backend:
    """The int8 form if `options` holds one, otherwise the model in float32.

    Raises ``ModelError`` when the model can't be loaded, ``SettingsError`` when it is not on this machine or the extra
    `cpu` is not installed.
    """
    local = require_local(space, "OpenVINO")
    if options.quantized is not None:
        return load_int8_backend(local, options.quantized.xml, options.quantized.weights)
    return load_openvino_backend(local, "float32")
