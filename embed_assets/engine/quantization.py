"""A model in int8: calibrated once, kept as bytes, the same ones for everybody."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embed_assets.engine import features as make
from embed_assets.engine.batching import Layout, plan_batches
from embed_assets.engine.model import EmbeddingSpace, load_sentence_transformer
from embed_assets.engine.openvino_backend import convert, require_openvino
from embed_assets.errors import ModelError

CALIBRATION_TEXTS = 128
"""Enough for the ranges of activations to settle; more changed nothing measurable."""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """OpenVINO's two files of a quantized transformer, and what they were calibrated on."""

    xml: bytes
    weights: bytes
    sample: tuple[str, ...]
    """Input hashes of the chunks that it was calibrated on."""
    made_with: str
    """Versions of the libraries."""

    @property
    def artifact_hash(self) -> str:
        """blake2b-128 hex over both files: part of the int8 space's fingerprint."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.xml, self.weights):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()


def quantize(space: EmbeddingSpace, texts: Sequence[str], hashes: Sequence[str]) -> QuantizedModel:
    """Quantize the transformer of `space` after training, with NNCF: weights and activations of its matrix products.

    `texts` (prompt included) are what the ranges are calibrated on, `hashes` their input hashes.
    Raises ``ModelError`` when the model can't be converted, ``SettingsError`` without the extra `cpu`.
    """
    require_openvino()
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    model = load_sentence_transformer(space, "cpu")
    tokenizer: Any = model.tokenizer
    pad_id, pads_left = int(tokenizer.pad_token_id or 0), tokenizer.padding_side == "left"
    tokens = space.tokenizer.copy().tokenize(texts, space.max_seq_length)

    def inputs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # Batches of one: padding would be calibrated on as well.
        for batch in plan_batches(tokens.lengths, 1, Layout()):
            ids = make.padded_ids(tokens, batch, pad_id, pads_left).astype(np.int64)
            yield ids, np.ones_like(ids)

    try:
        graph = nncf.quantize(
            convert(model),
            nncf.Dataset(list(inputs())),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(texts),
        )
    except Exception as error:  # converter and quantizer raise many types
        raise ModelError(
            f"the model {space.model!r} can't be quantized: {type(error).__name__}: {error}; set EMBED_PRECISION=auto"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "model.xml"
        openvino.save_model(graph, xml, compress_to_fp16=False)
        versions = f"openvino {openvino.__version__}, nncf {nncf.__version__}"
        return QuantizedModel(xml.read_bytes(), xml.with_suffix(".bin").read_bytes(), tuple(hashes), versions)
