"""Runs a model in OpenVINO: float32 and bfloat16 converted from the torch module, int8 from a stored artifact."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from embed_assets.engine.backend import Fetched
from embed_assets.engine.backends import features as make
from embed_assets.engine.backends.openvino_library import import_openvino, without_telemetry
from embed_assets.engine.backends.parity import MIN_COSINE, check_tokenizer, min_cosine, reference_vectors
from embed_assets.engine.backends.torch_backend import cost_of, native_dimension, prompt_features
from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.faults import reason_of
from embed_assets.engine.hardware import available_cores, cpu_workers, share_cores
from embed_assets.engine.model import LocalSpace, load_sentence_transformer
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_KERNEL_WIDTH = 16
"""Tokens that the attention kernels process at a time; other widths are up to a tenth slower per token."""
_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
"""OpenVINO's precision hints. In int8, what is not quantized runs in float32."""


class OpenVinoBackend:
    """The transformer compiled by OpenVINO. Pooling and later modules run in torch, in float32."""

    device = "cpu"

    def __init__(self, space: LocalSpace, model: SentenceTransformer, graph: Any, precision: str) -> None:
        openvino = import_openvino()
        transformer: Any = model[0]
        self.precision, self.cost = precision, cost_of(transformer.model)
        self.dimension = native_dimension(space, model)
        self.layout = Layout(width_multiple=_KERNEL_WIDTH)
        self.workers = cpu_workers()
        tokenizer: Any = model.tokenizer
        self._pad_id, self._pads_left = int(tokenizer.pad_token_id or 0), tokenizer.padding_side == "left"
        self._features = prompt_features(space, model)
        self._modules = list(model)[1:]
        self._compiled = openvino.Core().compile_model(
            graph,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _HINTS[precision],
                "NUM_STREAMS": self.workers,
                "INFERENCE_NUM_THREADS": available_cores(),
            },
        )
        self._local = threading.local()

    @property
    def name(self) -> str:
        """The library that runs the transformer."""
        return "openvino"

    def stop_on(self, event: threading.Event) -> None:
        """Does nothing: it waits for nothing but its own batch."""

    def enter_worker(self) -> None:
        """Give the thread its share of the cores in torch. OpenVINO has a stream per worker already."""
        share_cores(self.workers)

    def new_buffer(self, rows: int) -> np.ndarray:
        """Zeros in main memory: float32, shape (rows, dimension)."""
        return np.zeros((rows, self.dimension), dtype=np.float32)

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: np.ndarray) -> None:
        """Compute a batch and write its vectors, not normalised, to its rows of `buffer`."""
        import torch

        ids = make.padded_ids(tokens, batch, self._pad_id, self._pads_left).astype(np.int64)
        mask = make.attention_mask(tokens, batch, self._pads_left)
        mask = np.ones(ids.shape, dtype=np.int64) if mask is None else mask.astype(np.int64)
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        hidden = self._local.request.infer({0: ids, 1: mask}, share_inputs=True, share_outputs=True)[0]
        features: dict[str, Any] = {
            "token_embeddings": torch.from_numpy(hidden),
            "attention_mask": torch.from_numpy(mask),
            **self._features,
        }
        with torch.inference_mode():
            for module in self._modules:
                features = module(features)
        buffer[batch.rows] = features["sentence_embedding"][:, : self.dimension].float().numpy()

    def fetch(self, buffer: np.ndarray) -> Fetched:
        """The vectors in the buffer, scaled to unit length."""
        return Fetched.normalized(buffer)

    def usage(self) -> None:
        """Always None: there is no GPU."""

    def release_memory(self) -> None:
        """Does nothing: OpenVINO manages its own memory pool."""


def load_openvino_backend(space: LocalSpace, precision: str) -> OpenVinoBackend:
    """The model in "float32" or "bfloat16". Raises ``ModelError`` when OpenVINO can't reproduce its vectors."""
    model = load_sentence_transformer(space, "cpu")
    try:
        graph = convert(model)
    except Exception as error:  # the converter raises many types for operators it does not support
        raise ModelError(
            f"OpenVINO can't convert the model {space.model!r}: {reason_of(error)}; it runs in torch"
        ) from error
    return checked_backend(space, model, graph, precision)


def load_int8_backend(space: LocalSpace, xml: bytes, weights: bytes) -> OpenVinoBackend:
    """The quantized model in the contents of OpenVINO's two files. Raises ``ModelError`` if it fails the self-check."""
    openvino = import_openvino()
    model = load_sentence_transformer(space, "cpu")
    graph = openvino.Core().read_model(io.BytesIO(xml), io.BytesIO(weights))
    return checked_backend(space, model, graph, "int8")


def checked_backend(space: LocalSpace, model: SentenceTransformer, graph: Any, precision: str) -> OpenVinoBackend:
    """The backend over `graph`, once it agrees with SentenceTransformer. Raises ``ModelError`` when it does not."""
    check_tokenizer(space, model.tokenizer)
    reference = reference_vectors(space, model)
    try:
        backend = OpenVinoBackend(space, model, graph, precision)
        cosine = min_cosine(backend, space, reference)
    except Exception as error:  # a graph that was traced wrongly fails in many ways
        raise ModelError(
            f"OpenVINO can't run the model {space.model!r}: {reason_of(error)}; it runs in torch"
        ) from error
    if cosine < MIN_COSINE[precision]:
        raise ModelError(
            f"OpenVINO's vectors of {space.model!r} in {precision} differ from SentenceTransformer's "
            f"(cosine {cosine:.5f}); set another EMBED_PRECISION"
        )
    transformer: Any = model[0]
    transformer.model = None  # frees the weights: the compiled graph has its own
    return backend


def convert(model: SentenceTransformer) -> Any:
    """The transformer as an OpenVINO graph, from ids and mask (int64, shape (texts, width)) to token embeddings.

    Whatever OpenVINO raises for an unsupported model passes through.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    openvino = import_openvino()
    transformer: Any = model[0]

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            features = {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}
            result: torch.Tensor = self.transformer(features)["token_embeddings"]
            return result

    example = torch.ones((2, 8), dtype=torch.int64)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # tracing causes warnings that do not matter here
    try:
        with torch.inference_mode(), warnings.catch_warnings(), without_telemetry():
            warnings.simplefilter("ignore")  # from torch too; the self-check finds tracing errors
            return openvino.convert_model(
                Traced().eval(), example_input={"input_ids": example, "attention_mask": example}
            )
    finally:
        transformers_logging.set_verbosity(before)
