"""Each backend gives SentenceTransformer's vectors, and one that does not is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embed_assets.engine.backend import Fetched, Window
from embed_assets.engine.backends.attention import varlen_options
from embed_assets.engine.backends.features import pool, pooling_mode
from embed_assets.engine.backends.openvino_backend import load_int8_backend, load_openvino_backend
from embed_assets.engine.backends.openvino_library import import_openvino
from embed_assets.engine.backends.parity import CHECK_TEXTS, MIN_COSINE, InaccurateError, min_cosine, reference_vectors
from embed_assets.engine.backends.quantization import QuantizedModel, quantize
from embed_assets.engine.backends.torch_backend import TorchBackend, load_torch_backend
from embed_assets.engine.batching import Batch, Layout
from embed_assets.engine.embedder import LocalEmbedder
from embed_assets.engine.engine import Engine, default_gpu_budget
from embed_assets.engine.model import load_sentence_transformer
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.providers.sentence_transformers import first_accurate
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.engine.tokenization import TokenizedTexts
from embed_assets.engine.tuning import repeated
from embed_assets.errors import ModelError
from embed_assets_tests.conftest import SAMPLE_MODEL, resolve_space, topic
from embed_assets_tests.engine.models import small_model
from embed_assets_tests.engine.test_engine import HARD_TEXTS, cosines


def over(backend: Any, space: EmbeddingSpace, budget: int = 1024) -> LocalEmbedder:
    return LocalEmbedder(backend, space.tokenizer, space.max_seq_length, budget)


@pytest.fixture(scope="module")
def quantized(sample_space: EmbeddingSpace) -> QuantizedModel:
    texts = [part for name in ("try", "lambda", "types", "with") for part in topic(name).split("\n\n")][:48]
    return quantize(sample_space, texts, ["0" * 32] * len(texts))


class Backends:
    """The sample model in each library and precision, loaded when a test first asks for it."""

    def __init__(self, space: EmbeddingSpace, quantized: Callable[[], QuantizedModel]) -> None:
        self._loaders: dict[str, Callable[[], Any]] = {
            "torch": lambda: load_torch_backend(space, "cpu", "float32", False),
            "bfloat16": lambda: load_torch_backend(space, "cpu", "bfloat16", False),
            "openvino": lambda: load_openvino_backend(space, "float32"),
            "openvino bfloat16": lambda: load_openvino_backend(space, "bfloat16"),
            "int8": lambda: load_int8_backend(space, quantized().xml, quantized().weights),
        }
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name]()
        return self._loaded[name]


@pytest.fixture(scope="module")
def backends(sample_space: EmbeddingSpace, request: pytest.FixtureRequest) -> Backends:
    return Backends(sample_space, lambda: request.getfixturevalue("quantized"))


@pytest.fixture(scope="module")
def reference(sample_space: EmbeddingSpace) -> np.ndarray:
    model = load_sentence_transformer(sample_space, "cpu")
    return np.asarray(model.encode(HARD_TEXTS, batch_size=1, normalize_embeddings=True))


@pytest.mark.parametrize(
    ("name", "least", "mean"),
    [
        ("torch", 0.99999, 0.999999),
        ("openvino", 0.99999, 0.999999),
        ("bfloat16", 0.999, 0.9995),
        pytest.param("openvino bfloat16", 0.999, 0.9995, marks=pytest.mark.long),
        ("int8", 0.95, 0.98),
    ],
)
def test_vectors_of_hard_texts_match(
    backends: Backends, sample_space: EmbeddingSpace, reference: np.ndarray, name: str, least: float, mean: float
) -> None:
    found = cosines(over(backends[name], sample_space).embed(HARD_TEXTS).vectors, reference)
    assert found.min() > least and found.mean() > mean


@pytest.mark.parametrize(("name", "least"), [("torch", 1 - 1e-5), ("openvino", 1 - 1e-5), ("int8", 0.999)])
def test_batches_windows_budgets_and_order_change_no_vector(
    backends: Backends, sample_space: EmbeddingSpace, name: str, least: float
) -> None:
    """In int8 a difference in the last bit can change a rounding: rarely, and by little."""
    texts = [*HARD_TEXTS, *(part for part in topic("types").split("\n\n") if part.strip())][:60]
    expected = over(backends[name], sample_space, 100_000).embed(texts).vectors
    alone = over(backends[name], sample_space, 1).embed(texts).vectors
    small = over(backends[name], sample_space, 300)
    windows = [embedded.vectors for embedded in small.embed_windows(Window(texts[i : i + 7]) for i in range(0, 60, 7))]
    order = np.random.default_rng(3).permutation(len(texts))
    shuffled = small.embed([texts[i] for i in order]).vectors
    assert cosines(expected, alone).min() > least
    assert cosines(expected, np.concatenate(windows)).min() > least
    assert cosines(expected[order], shuffled).min() > least


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("torch", "torch-packed"),
        ("bfloat16", "torch-packed"),
        ("openvino", "openvino"),
        pytest.param("openvino bfloat16", "openvino", marks=pytest.mark.long),
        ("int8", "openvino"),
    ],
)
def test_the_fast_paths_are_taken(backends: Backends, name: str, path: str) -> None:
    assert backends[name].name == path


def test_backends_know_the_models_arithmetic(backends: Backends) -> None:
    assert backends["torch"].cost.linear_weights == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert backends["torch"].cost.attention_width == backends["openvino"].cost.attention_width == 6 * 384


class Wrong:
    """A backend with a mistake that the self-check must detect."""

    def __init__(self, right: TorchBackend, mistake: str) -> None:
        self._right, self._mistake, self.layout = right, mistake, right.layout

    def new_buffer(self, rows: int) -> Any:
        return self._right.new_buffer(rows)

    def forward(self, texts: Sequence[str], tokens: TokenizedTexts, batch: Batch, buffer: Any) -> None:
        if self._mistake == "wrong row" and len(batch.rows) > 1:
            batch = Batch(np.roll(batch.rows, 1), batch.width, batch.tokens)
            tokens = TokenizedTexts(tokens.ids, tokens.offsets, tokens.is_truncated)
            inner = self._right.new_buffer(len(texts))
            self._right.forward(texts, tokens, batch, inner)
            buffer[np.roll(batch.rows, 1)] = inner[batch.rows]
        elif self._mistake == "neighbours" and len(batch.rows) > 1:
            self._right.forward(texts, tokens, batch, buffer)
            buffer += 0.05 * buffer.mean(0)
        else:
            self._right.forward(texts, tokens, batch, buffer)

    def fetch(self, buffer: Any) -> Fetched:
        fetched: Fetched = self._right.fetch(buffer)
        if self._mistake == "not finite":
            fetched.is_usable[2] = False
        return fetched


@pytest.mark.parametrize("mistake", ["wrong row", "neighbours", "not finite"])
def test_the_self_check_detects(backends: Backends, sample_space: EmbeddingSpace, mistake: str) -> None:
    reference = reference_vectors(sample_space, load_sentence_transformer(sample_space, "cpu"))
    assert min_cosine(backends["torch"], sample_space, reference) > 0.99999
    assert min_cosine(Wrong(backends["torch"], mistake), sample_space, reference) < MIN_COSINE["float32"]


def test_the_self_check_detects_missing_boundaries_between_packed_texts(
    sample_space: EmbeddingSpace, caplog: pytest.LogCaptureFixture
) -> None:
    """Packing with transformers' ordinary attention lets texts see each other: the self-check must refuse it."""
    model = load_sentence_transformer(sample_space, "cpu")
    reference = reference_vectors(sample_space, model)
    packed: Any = load_torch_backend(sample_space, "cpu", "float32", False)
    packed._model[0].model.set_attn_implementation("sdpa")
    assert min_cosine(packed, sample_space, reference) < 0.99
    assert not caplog.text


def test_a_path_that_does_not_fit_the_model_is_refused_with_a_warning(tmp_path: Path, logged: list[str]) -> None:
    space = resolve_space(str(small_model(tmp_path, "mpnet")))
    backend = load_torch_backend(space, "cpu", "float32", False)
    assert backend.name == "torch-padded"
    assert any("the path torch-packed is not used" in x and "has its own attention" in x for x in logged)


@pytest.mark.parametrize("kind", ["bert", "xlmr", "qwen3", "modernbert", "mpnet"])
def test_openvino_runs_other_architectures_or_says_why_not(tmp_path: Path, kind: str) -> None:
    space = resolve_space(str(small_model(tmp_path, kind)), prompt="document")
    model = load_sentence_transformer(space, "cpu")
    expected = model.encode(HARD_TEXTS, prompt="passage: ", batch_size=1, normalize_embeddings=True)
    try:
        backend = load_openvino_backend(space, "float32")
    except ModelError as error:
        assert "OpenVINO" in str(error)
        return
    vectors = over(backend, space, 200).embed([space.prompt + text for text in HARD_TEXTS]).vectors
    assert cosines(vectors, np.asarray(expected)).min() > 0.99999


@pytest.mark.long
def test_compiled_models_give_the_same_vectors(tmp_path: Path) -> None:
    space = resolve_space(str(small_model(tmp_path, "bert")))
    plain = Engine(space, EngineOptions("cpu")).embedder.embed(HARD_TEXTS).vectors
    compiled = Engine(space, EngineOptions("cpu", compiles=True)).embedder
    assert compiled.backend.name == "torch-padded"
    assert cosines(plain, compiled.embed(HARD_TEXTS).vectors).min() > 0.99999


def test_check_texts_are_hard() -> None:
    assert "" in CHECK_TEXTS and len(set(CHECK_TEXTS)) < len(CHECK_TEXTS)
    assert max(len(text.split()) for text in CHECK_TEXTS) > 512


def test_openvino_telemetry_is_off() -> None:
    import_openvino()
    load_openvino_backend(resolve_space(SAMPLE_MODEL), "float32")
    import openvino_telemetry

    assert openvino_telemetry.Telemetry().consent is False


def test_the_layout_of_openvino_rounds_widths_only_a_little() -> None:
    layout = Layout(width_multiple=16)
    assert [layout.width_of(n) for n in (16, 31, 46, 47, 250, 256)] == [16, 32, 48, 48, 256, 256]
    assert [layout.width_of(n) for n in (1, 17, 33, 45)] == [1, 17, 33, 45]


@pytest.mark.parametrize(
    ("release", "known"),
    [
        ("2.10", {"is_causal", "return_aux"}),
        ("2.11", {"return_aux", "scale", "window_size"}),
        ("2.12", {"return_aux", "scale", "window_size", "enable_gqa", "num_splits"}),
    ],
)
def test_packed_attention_uses_what_each_torch_release_has(release: str, known: set[str]) -> None:
    def options(scale: float = 0.125, causal: bool = False, reach: int = -1, grouped: bool = False) -> dict[str, Any]:
        found = varlen_options(dict.fromkeys(known), 64, scale, causal, reach, grouped)
        assert set(found) <= known
        return found

    plain, grouped = options(), options(grouped=True)
    assert plain.get("num_splits") == (1 if release == "2.12" else None)
    assert grouped.get("enable_gqa") == (True if release == "2.12" else None)
    if release == "2.10":
        assert options(causal=True) == {"is_causal": True}
        for unsupported in ({"scale": 0.3}, {"reach": 7}):
            with pytest.raises(NotImplementedError):
                options(**unsupported)  # type: ignore[arg-type]
    else:
        assert options(scale=0.3)["scale"] == 0.3
        assert options(reach=7)["window_size"] == (7, 7) and options(reach=7, causal=True)["window_size"] == (7, 0)
        assert options(causal=True)["window_size"] == (-1, 0)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_packed_pooling_equals_that_of_sentence_transformers(mode: str) -> None:
    import torch
    from sentence_transformers.models import Pooling

    lengths = [3, 1, 5]
    boundaries = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    numbers = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[None]
    features = {"token_embeddings": torch.randn(1, 9, 4), "cu_seq_lens_q": boundaries, "seq_idx": numbers}
    module = Pooling(4, mode)
    assert pooling_mode(module) == mode
    theirs = module(dict(features))["sentence_embedding"]
    torch.testing.assert_close(pool(features, mode), theirs)


def test_other_poolings_are_left_to_sentence_transformers() -> None:
    from sentence_transformers.models import Normalize, Pooling

    assert [pooling_mode(module) for module in (Pooling(4, "max"), Pooling(4, ["mean", "cls"]), Normalize())] == [
        None
    ] * 3
    assert pooling_mode(Pooling(4, "mean", include_prompt=False)) is None


def test_vectors_are_normalized_and_unusable_ones_are_told(sample_space: EmbeddingSpace, backends: Backends) -> None:
    import torch

    raw = np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]], dtype=np.float32)
    for fetched in (Fetched.normalized(raw), backends["torch"].fetch(torch.from_numpy(raw))):
        assert fetched.is_usable.tolist() == [True, False, False, False]
        assert fetched.vectors[0].tolist() == pytest.approx([0.6, 0.8])


def test_a_precision_that_is_too_inaccurate_gives_way_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[str] = []

    def load(precision: str) -> str:
        tried.append(precision)
        if precision != "float32":
            raise InaccurateError(f"the cosines are too low in {precision}; set EMBED_PRECISION=float32")
        return precision

    assert first_accurate(["bfloat16", "float16", "float32"], load) == "float32"
    assert tried == ["bfloat16", "float16", "float32"]
    assert "too low in bfloat16" in caplog.text and "too low in float16" in caplog.text
    with pytest.raises(InaccurateError, match="bfloat16"):
        first_accurate(["bfloat16"], load)


def test_tuning_samples_are_measured_in_tokens(sample_space: EmbeddingSpace, backends: Backends) -> None:
    embedder = over(backends["torch"], sample_space)
    for tokens in (1, 50, 5000):
        sample = repeated(["one", "two words", "three more words"], embedder, tokens)
        assert int(embedder.lengths(sample).sum()) >= tokens
    assert repeated(["one", "two"], embedder, 1) == ["one"]


def test_small_models_get_large_batches_on_large_gpus() -> None:
    assert default_gpu_budget(11_000_000, 79 << 30) == 65_536
    assert default_gpu_budget(85_000_000, 79 << 30) == 65_536
    assert default_gpu_budget(300_000_000, 79 << 30) == 16_384
    assert default_gpu_budget(11_000_000, 14 << 30) == 16_384
    assert default_gpu_budget(11_000_000, None) == 16_384
