"""Models in OpenVINO, on CPUs: the int8 form that was quantized once, and the float ones of sentence-transformers."""

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
    """The space of the model in floating point: that of its int8 form is known once it was quantized."""
    return sentence_transformers.resolve(choice)


def load(space: EmbeddingSpace, options: EngineOptions) -> Backend:
    """The int8 form that the options hold, else the model in float32."""
    local = require_local(space, "OpenVINO")
    if options.quantized is not None:
        return load_int8_backend(local, options.quantized.xml, options.quantized.weights)
    return load_openvino_backend(local, "float32")
