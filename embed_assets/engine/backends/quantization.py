"""Quantizes a model to int8, calibrated once and stored as bytes, so that every machine runs the same model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embed_assets.engine.backends import features as make
from embed_assets.engine.backends.openvino_backend import convert
from embed_assets.engine.backends.openvino_library import import_openvino, without_telemetry
from embed_assets.engine.backends.parity import CHECK_TEXTS
from embed_assets.engine.batching import Layout, plan_batches
from embed_assets.engine.faults import reason_of
from embed_assets.engine.model import LocalSpace, load_sentence_transformer
from embed_assets.errors import ModelError

CALIBRATION_TEXTS = 128
"""Enough for the ranges of the activations to settle; more made no measurable difference."""

_SMOOTHING = 0.8
"""How much of the activations' spread SmoothQuant moves into the weights.

Lower than NNCF's 0.95: on retrieval over Rust's RFCs, nDCG@10 stays that of float32, and the worst vectors are better
at the same mean."""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A quantized transformer: OpenVINO's two files, and how they were created."""

    xml: bytes
    """The graph."""
    weights: bytes
    sample: tuple[str, ...]
    """Input hashes of the chunks it was calibrated on."""
    made_with: str
    """Names and versions of the libraries that created it."""

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> QuantizedModel:
        """The model stored by `files`. Raises ``ModelError`` when it is incomplete or was changed."""
        try:
            about = json.loads(files["about.json"])
            model = cls(files["model.xml"], files["model.bin"], tuple(about["sample"]), str(about["made_with"]))
            hash_then = str(about["artifact_hash"])
        except (KeyError, ValueError, TypeError) as error:
            raise ModelError(
                f"the quantized model in the lake is incomplete ({type(error).__name__}: {error}); "
                "restore its table under models/"
            ) from error
        if model.artifact_hash != hash_then:
            raise ModelError(
                f"the quantized model in the lake must have the hash {hash_then}, got {model.artifact_hash}; "
                "restore its table under models/"
            )
        return model

    @property
    def files(self) -> dict[str, bytes]:
        """Contents of the model's files by name, for storage."""
        about = {"artifact_hash": self.artifact_hash, "sample": self.sample, "made_with": self.made_with}
        return {"model.xml": self.xml, "model.bin": self.weights, "about.json": json.dumps(about).encode()}

    @property
    def artifact_hash(self) -> str:
        """blake2b-128 hex over both files. Part of the int8 space's fingerprint."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.xml, self.weights):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()


def quantize(space: LocalSpace, texts: Sequence[str], hashes: Sequence[str]) -> QuantizedModel:
    """Quantize the weights and activations of the transformer's matrix products, after training, with NNCF.

    The ranges are calibrated on `texts` (prompt included), whose input hashes are `hashes`, and on the texts of the
    self-check: without those, texts unlike the corpus (empty, repetitive) fall out of the ranges.
    Raises ``ModelError`` when the model can't be converted, ``SettingsError`` without the extra `cpu`.
    """
    openvino = import_openvino()
    with without_telemetry():
        import nncf

    nncf.set_log_level(logging.ERROR)
    model = load_sentence_transformer(space, "cpu")
    tokenizer: Any = model.tokenizer
    pad_id, pads_left = int(tokenizer.pad_token_id or 0), tokenizer.padding_side == "left"
    calibrated_on = [*texts, *(space.prompt + text for text in CHECK_TEXTS)]
    tokens = space.tokenizer.copy().tokenize(calibrated_on, space.max_seq_length)

    def inputs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # Batches of one, so that the ranges are not calibrated on padding.
        for batch in plan_batches(tokens.lengths, 1, Layout()):
            ids = make.padded_ids(tokens, batch, pad_id, pads_left).astype(np.int64)
            yield ids, np.ones_like(ids)

    try:
        # NNCF draws progress bars on standard output, which is reserved for the command's answer.
        with contextlib.redirect_stdout(sys.stderr), without_telemetry():
            graph = nncf.quantize(
                convert(model),
                nncf.Dataset(list(inputs())),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(calibrated_on),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=_SMOOTHING)
                ),
            )
    except Exception as error:  # converter and quantizer raise many types
        raise ModelError(
            f"the model {space.model!r} can't be quantized: {reason_of(error)}; set EMBED_PRECISION=auto"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "model.xml"
        openvino.save_model(graph, xml, compress_to_fp16=False)
        versions = f"openvino {openvino.__version__}, nncf {nncf.__version__}"
        return QuantizedModel(xml.read_bytes(), xml.with_suffix(".bin").read_bytes(), tuple(hashes), versions)
