"""Runs a model in torch: SentenceTransformer's own modules, on batches that were tokenized beforehand."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from embed_assets.engine.backend import Fetched
from embed_assets.engine.backends import features as make
from embed_assets.engine.backends.attention import ATTENTION, register_attention
from embed_assets.engine.backends.cpu_memory import Trimmer, bound_operator_caches
from embed_assets.engine.backends.onednn import use_onednn_linears
from embed_assets.engine.backends.openvino_library import has_openvino, import_openvino
from embed_assets.engine.backends.parity import (
    MIN_COSINE,
    InaccurateError,
    check_tokenizer,
    min_cosine,
    reference_vectors,
)
from embed_assets.engine.backends.verdict import Verdict, recall, remember, verdict_key
from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.faults import is_out_of_memory, is_transient, reason_of
from embed_assets.engine.gpu import GpuMonitor, GpuUsage
from embed_assets.engine.hardware import cpu_workers, share_cores
from embed_assets.engine.metrics import ModelCost
from embed_assets.engine.model import LocalSpace, load_sentence_transformer
from embed_assets.engine.space import truncated_dimension
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.errors import ModelError

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

Path = Literal["packed", "padded", "encode"]
_log = logging.getLogger(__name__)


class TorchBackend:
    """One model on one device, run along one of three code paths.

    "packed": texts end to end, without padding. "padded": rectangles of texts of nearly equal length. "encode":
    SentenceTransformer's own loop, for models with unusual modules.
    """

    def __init__(
        self, space: LocalSpace, model: SentenceTransformer, precision: str, path: Path, cost: ModelCost
    ) -> None:
        self._model, self.path, self.precision, self.cost = model, path, precision, cost
        self.dimension = native_dimension(space, model)
        tokenizer: Any = model.tokenizer
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._pads_left = tokenizer.padding_side == "left"
        self._has_token_types = "token_type_ids" in tokenizer.model_input_names
        self._features = {"modality": "text"} | prompt_features(space, model)
        self._first_position = _first_position(model[0])
        self._device = model.device
        self._monitor = _gpu_monitor(model.device)
        self._trimmer = Trimmer() if model.device.type == "cpu" else None
        self.layout = Layout(is_packed=path == "packed")
        self.workers = cpu_workers() if self._device.type == "cpu" and path != "encode" else 1

    @property
    def device(self) -> str:
        """Name of the torch device."""
        return str(self._device)

    @property
    def name(self) -> str:
        """The code path, as in "torch-packed"."""
        return f"torch-{self.path}"

    def stop_on(self, event: threading.Event) -> None:
        """Does nothing: it waits for nothing but its own batch."""

    def enter_worker(self) -> None:
        """Bind the thread to the GPU or, on CPUs, to its share of the cores, so that workers do not wait for others."""
        import torch

        if self._device.type == "cpu":
            share_cores(self.workers)
        elif self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # pinning memory would otherwise open a context on the first GPU

    def new_buffer(self, rows: int) -> torch.Tensor:
        """Zeros on the device: float32, shape (rows, dimension)."""
        import torch

        return torch.zeros((rows, self.dimension), dtype=torch.float32, device=self._device)

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: torch.Tensor) -> None:
        """Compute a batch and write its vectors, not normalised, to its rows of `buffer`.

        Returns without waiting for the device.
        """
        import torch

        with torch.inference_mode():
            if self.path == "encode":
                chosen = [texts[row] for row in batch.rows]
                vectors = self._model.encode(
                    chosen, prompt="", batch_size=len(chosen), convert_to_tensor=True, show_progress_bar=False
                )
                rows = torch.from_numpy(batch.rows).to(self._device)
            elif self.path == "packed":
                array = make.packed_array(tokens, batch, self._first_position)
                longest = int(tokens.lengths[batch.rows[0]])
                features, rows = make.packed_features(self._to_device(array), batch, longest)
                vectors = self._through_modules(features)
            else:
                array, has_padding = make.padded_array(tokens, batch, self._pad_id, self._pads_left)
                features, rows = make.padded_features(self._to_device(array), batch, has_padding)
                vectors = self._through_modules(features)
            buffer.index_copy_(0, rows, vectors[:, : self.dimension].float())
        if self._trimmer is not None:
            self._trimmer.after_batch()

    def fetch(self, buffer: torch.Tensor) -> Fetched:
        """Scale the vectors to unit length on the device and copy them to main memory, on GPUs into pinned memory.

        This is the only time per window that the host waits for the device.
        """
        import torch

        with torch.inference_mode():
            norms = torch.linalg.vector_norm(buffer, dim=1)
            is_usable = torch.isfinite(norms) & (norms > 0)
            vectors = buffer / torch.where(is_usable, norms, 1)[:, None]
            if self._device.type == "cuda":
                host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
                host.copy_(vectors, non_blocking=True)
                torch.cuda.current_stream(self._device).synchronize()
                vectors = host
            return Fetched(vectors.cpu().numpy(), is_usable.cpu().numpy())

    def usage(self) -> GpuUsage | None:
        """How busy the GPU is; None on other devices."""
        return None if self._monitor is None else self._monitor.read()

    def release_memory(self) -> None:
        """Free what a failed batch still holds on the device."""
        import torch

        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()

    def _through_modules(self, features: dict[str, Any]) -> torch.Tensor:
        """Sentence embeddings: the transformer in its precision, later modules in float32. Shape (texts, dimension)."""
        import torch

        features |= self._features
        if self._has_token_types:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        for number, module in enumerate(self._model):
            mode = make.pooling_mode(module) if "cu_seq_lens_q" in features else None
            if mode is not None and "cls_token_embeddings" not in features:
                features["sentence_embedding"] = make.pool(features, mode)
                continue
            features = module(features)
            if number == 0:
                features["token_embeddings"] = features["token_embeddings"].float()
        vectors: torch.Tensor = features["sentence_embedding"]
        return vectors

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        import torch

        tensor = torch.from_numpy(array)
        if self._device.type != "cuda":
            return tensor.to(self._device)
        # From pinned memory the copy is asynchronous; torch keeps that memory until the copy is done.
        return tensor.pin_memory().to(self._device, non_blocking=True)


def load_torch_backend(space: LocalSpace, device: str, precision: str, compiles: bool) -> TorchBackend:
    """The model on the fastest path that reproduces SentenceTransformer's float32 vectors.

    Raises ``ModelError`` when the model can't be loaded, and ``InaccurateError`` when no path does: not even
    SentenceTransformer's own loop.
    """
    if device == "cpu":
        bound_operator_caches()
    key = verdict_key(space, device, precision, compiles)
    known = recall(key)
    choices = (True, False) if device == "cpu" and not compiles else (True,)
    for with_onednn in choices if known is None else (known.with_onednn,):
        model = _prepared(space, device)
        check = None if known else _Check.of(space, model, device, precision)
        transformer: Any = model[0]
        cost = cost_of(transformer.model)
        _specialize(model, precision, compiles, with_onednn)
        if check is None:
            assert known is not None
            return _known_to_match(space, model, precision, cost, known)
        backend = _first_matching(space, model, precision, cost, check)
        if backend is not None:
            if not check.disturbances:
                remember(key, Verdict(backend.path, with_onednn, check.skipped))
            return backend
    raise InaccurateError(
        f"the model {space.model!r} does not reproduce SentenceTransformer's float32 vectors with "
        f"EMBED_PRECISION={precision} on any path; set EMBED_PRECISION=float32 or choose another EMBED_MODEL"
    )


def _prepared(space: LocalSpace, device: str) -> SentenceTransformer:
    """The model in float32, once it is known to be one that can be run here. Raises ``ModelError``."""
    model = load_sentence_transformer(space, device)
    transformer: Any = model[0]
    if not hasattr(transformer, "model") or not getattr(model.tokenizer, "is_fast", False):
        raise ModelError(
            f"the model {space.model!r} must be a Transformer with a fast tokenizer, "
            f"got {type(transformer).__name__}; choose another EMBED_MODEL"
        )
    check_tokenizer(space, model.tokenizer)
    # Otherwise decoders keep the keys and values of all layers until the end of a pass: 7.5 GB for 64k tokens of a
    # model with 0.6 billion parameters.
    transformer.model.config.use_cache = False
    return model


def _specialize(model: SentenceTransformer, precision: str, compiles: bool, with_onednn: bool) -> None:
    """Convert the transformer to its precision and its fastest form, in place."""
    import torch

    transformer: Any = model[0]
    _convert(transformer.model, getattr(torch, precision))
    if compiles:
        if has_openvino():
            import_openvino()  # without telemetry, before torch's compiler imports it
        transformer.model = torch.compile(transformer.model, dynamic=True)
    elif model.device.type == "cpu" and with_onednn:
        use_onednn_linears(transformer.model)


@dataclass(frozen=True, slots=True)
class _Check:
    """What a path has to reproduce."""

    reference: np.ndarray
    """SentenceTransformer's vectors of the check texts."""
    min_cosine: float
    skipped: list[str] = field(default_factory=list)
    """Warnings about paths that did not reproduce them."""
    disturbances: list[str] = field(default_factory=list)
    """Errors of those paths that may be gone the next time, such as a full GPU: then nothing is remembered."""

    @classmethod
    def of(cls, space: LocalSpace, model: SentenceTransformer, device: str, precision: str) -> _Check:
        """The check of `model`, which is still in float32. Raises ``ModelError`` if it can't be run."""
        try:
            return cls(reference_vectors(space, model), MIN_COSINE[precision])
        except RuntimeError as error:
            raise ModelError(
                f"the model {space.model!r} could not be run on {device!r} in float32 for the self-check: "
                f"{reason_of(error)}; free memory there, or choose a smaller EMBED_MODEL"
            ) from error


def _paths(model: SentenceTransformer, precision: str) -> tuple[Path, ...]:
    """The paths to try, fastest first."""
    import torch

    kind, is_compiled = model.device.type, hasattr(model[0].model, "_orig_mod")
    # Flash attention needs tensor cores of the Ampere generation or later, and half precision.
    on_cuda = kind == "cuda" and torch.cuda.get_device_capability(model.device) >= (8, 0) and precision != "float32"
    can_pack = on_cuda or (kind == "cpu" and not is_compiled)
    return ("packed", "padded", "encode") if can_pack else ("padded", "encode")


def _known_to_match(
    space: LocalSpace, model: SentenceTransformer, precision: str, cost: ModelCost, known: Verdict
) -> TorchBackend:
    """The backend on the path that an earlier self-check found. Warns again about those that it skipped."""
    for line in known.skipped:
        _log.warning("%s", line)
    path: Path = next(path for path in _paths(model, precision) if path == known.path)
    if path == "packed":
        _use_attention(model[0].model, ATTENTION)
    return TorchBackend(space, model, precision, path, cost)


def _first_matching(
    space: LocalSpace, model: SentenceTransformer, precision: str, cost: ModelCost, check: _Check
) -> TorchBackend | None:
    """The first path that runs and agrees with `check`; None if there is none. Warns about each path it skips."""
    transformer: Any = model[0]
    usual_attention = transformer.model.config._attn_implementation
    for path in _paths(model, precision):
        try:
            _use_attention(transformer.model, ATTENTION if path == "packed" else usual_attention)
            backend = TorchBackend(space, model, precision, path, cost)
            cosine = min_cosine(backend, space, check.reference)
            if cosine >= check.min_cosine:
                return backend
            why = f"its vectors differ from SentenceTransformer's (cosine {cosine:.5f})"
        except (NotImplementedError, TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            why = reason_of(error)
            if is_out_of_memory(error) or is_transient(error):
                check.disturbances.append(why)
        check.skipped.append(f"the path torch-{path} is not used for {space.model} in {precision}: {why}")
        _log.warning("%s", check.skipped[-1])
    return None


def _convert(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert the model in place to `dtype`, as loading it in that type would.

    Computed buffers, such as rotary frequencies, stay in float32: rounding them distorts far positions.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


def _use_attention(model: Any, name: str) -> None:
    """Switch the transformer to the attention registered under `name`.

    Raises ``NotImplementedError`` for packed attention on a model that ignores registered functions.
    """
    if name == ATTENTION:
        register_attention()
        if not getattr(model, "is_backend_compatible", lambda: False)():
            raise NotImplementedError(f"{type(model).__name__} has its own attention")
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)


def cost_of(transformer: torch.nn.Module) -> ModelCost:
    """Arithmetic of a transformers model: linear layers (except a pooler, which sees one token) and attention."""
    import torch

    linear = sum(
        module.weight.numel()
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    )
    config: Any = transformer.config
    heads, layers = getattr(config, "num_attention_heads", 0), getattr(config, "num_hidden_layers", 0)
    hidden = getattr(config, "hidden_size", 0)
    head_size = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
    return ModelCost(linear, int(layers * heads * head_size))


def native_dimension(space: LocalSpace, model: SentenceTransformer) -> int:
    """Length of a vector after truncation. Raises ``ModelError`` when the model does not state its dimension."""
    native = model.get_embedding_dimension()
    if native is None:
        raise ModelError(f"the model {space.model!r} does not state its dimension; choose another EMBED_MODEL")
    return truncated_dimension(int(native), space.truncate_dim)


def prompt_features(space: LocalSpace, model: SentenceTransformer) -> dict[str, Any]:
    """The prompt's length in tokens, for models whose pooling leaves the prompt out (Instructor); otherwise empty."""
    excludes = any(getattr(module, "include_prompt", True) is False for module in model)
    if not (space.prompt and excludes):
        return {}
    transformer: Any = model[0]
    length = transformer._get_prompt_length(space.prompt)
    return {} if length is None else {"prompt_length": length}


def _gpu_monitor(device: torch.device) -> GpuMonitor | None:
    import torch

    return GpuMonitor(str(torch.cuda.get_device_properties(device).uuid)) if device.type == "cuda" else None


def _first_position(transformer: Any) -> int:
    """Number of the first position: 0, or for relatives of RoBERTa the padding id plus one.

    Those are recognized by an embedding table of positions beside a padding id. Positions from 0 would silently spoil
    their vectors: https://github.com/huggingface/transformers/issues/47496.
    """
    import torch

    for module in transformer.model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            return padding + 1
    return 0
