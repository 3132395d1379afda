"""The configured model: its embedding space, its int8 version once quantized, and its engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from embed_assets.engine.backend import Embedder
from embed_assets.engine.backends.openvino_backend import load_int8_backend
from embed_assets.engine.backends.quantization import QuantizedModel, quantize
from embed_assets.engine.engine import Engine, EngineInfo, configured
from embed_assets.engine.model import require_local
from embed_assets.engine.process import ModelProcess
from embed_assets.engine.provider import EndpointOptions, EngineOptions
from embed_assets.engine.providers.catalog import provider_of, resolve_space
from embed_assets.engine.space import EmbeddingSpace, ModelChoice
from embed_assets.errors import ModelError, SettingsError
from embed_assets.lake.models import keep_model, read_model
from embed_assets.lake.tables import Lake
from embed_assets.records import hash_text
from embed_assets.settings import Settings


@dataclass(frozen=True)
class Model:
    """The model that embeds chunks. It is loaded on first use."""

    float_space: EmbeddingSpace
    """Embedding space of the original floating-point model."""
    options: EngineOptions
    """How the model runs, including its int8 version once it is quantized."""

    @classmethod
    def from_settings(cls, settings: Settings, lake: Lake) -> Model:
        """Resolve the model's files and, with EMBED_PRECISION=int8, read its quantized version from the lake.

        Raises ``ModelError``, ``SettingsError`` or ``LakeError``.
        """
        chosen = resolve_space(
            ModelChoice(
                settings.model,
                settings.revision,
                settings.prompt,
                settings.query_prompt,
                settings.truncate_dim,
                settings.trust_remote_code,
                settings.allow_pickled_weights,
                settings.endpoint,
            )
        )
        space = replace(chosen, context=settings.context)
        is_int8 = settings.precision == "int8"
        if is_int8 and settings.device not in ("auto", "cpu"):
            raise SettingsError(
                f"EMBED_PRECISION=int8 runs on CPUs, got EMBED_DEVICE={settings.device!r}; set EMBED_DEVICE=cpu"
            )
        device = "cpu" if is_int8 else settings.device
        endpoint = EndpointOptions(
            settings.endpoint_concurrency,
            settings.endpoint_batch_texts,
            settings.endpoint_requests_per_minute,
            settings.endpoint_tokens_per_minute,
        )
        budget = settings.max_batch_tokens
        options = EngineOptions(device, settings.precision, budget, settings.compile, endpoint=endpoint)
        return cls(space, options).refreshed(lake)

    @property
    def is_calibrated(self) -> bool:
        """Whether `space` is known: always, except with int8 before the model is quantized."""
        return self.options.precision != "int8" or self.options.quantized is not None

    @cached_property
    def space(self) -> EmbeddingSpace:
        """The space in which vectors are comparable. With int8 it is final only once the model is quantized."""
        if self.options.precision != "int8":
            return self.float_space
        made = self.options.quantized
        return self.float_space.quantized("" if made is None else made.artifact_hash)

    def refreshed(self, lake: Lake) -> Model:
        """This model, with its int8 version if another process has stored it meanwhile. Raises ``LakeError``."""
        if self.is_calibrated:
            return self
        require_local(self.float_space, "EMBED_PRECISION=int8")
        files = read_model(lake, self.float_space.name)
        return self if files is None else self._with(files)

    def calibrated(self, lake: Lake, texts: Sequence[str]) -> Model:
        """This model, quantized with `texts` as calibration data and stored in the lake for all later runs.

        Without texts there is nothing to calibrate on or to embed, and the model is returned unchanged.
        """
        if not texts:
            return self
        space = require_local(self.float_space, "EMBED_PRECISION=int8")
        made = quantize(space, [space.prompt + text for text in texts], [hash_text(space.prompt + t) for t in texts])
        # Raises if the quantized model is unusable.
        load_int8_backend(space.quantized(made.artifact_hash), made.xml, made.weights)
        return self._with(keep_model(lake, space.name, made.files))

    @cached_property
    def engine(self) -> Engine:
        """The engine that runs the model in this process. Raises ``ModelError`` if int8 is not quantized yet."""
        if not self.is_calibrated:
            raise ModelError(
                f"the int8 model of {self.float_space.model!r} does not exist yet; "
                "run 'embed-assets sync' on a source with documents, which creates it"
            )
        return Engine(self.space, self.options)

    @cached_property
    def process(self) -> ModelProcess | None:
        """The process that runs the model for `start`; None for kinds of models that need none."""
        if not self.is_calibrated or not provider_of(self.space.model, self.options).libraries:
            return None
        return ModelProcess(self.space, self.options)

    def start(self, texts: Sequence[str], expected: int) -> Embedder:
        """The loaded model, tuned if `expected` texts like `texts` justify it. Raises ``ModelError`` if it can't be."""
        if self.process is None:
            return self.engine.embedder_for(texts, expected)
        self.process.load(texts, expected)
        return self.process

    @property
    def info(self) -> EngineInfo:
        """Device and settings that the model runs with after `start`; before, those configured."""
        if self.process is not None:
            return self.process.info
        return self.engine.info if self.is_calibrated else configured(self.options)

    def _with(self, files: dict[str, bytes]) -> Model:
        return replace(self, options=replace(self.options, quantized=QuantizedModel.from_files(files)))
