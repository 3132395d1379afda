"""The engine as users meet it: int8 spaces, texts a model can't take, tuning and benchmark, run metadata."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from embed_assets.engine.backends.quantization import QuantizedModel
from embed_assets.engine.engine import TUNE_FROM_TEXTS, Engine
from embed_assets.engine.provider import EngineOptions
from embed_assets.errors import ModelError
from embed_assets.lake.models import keep_model, read_model
from embed_assets.stages.outcome import PartitionOutcome, Progress
from embed_assets.stages.progress import RunObserver
from embed_assets_tests.conftest import Project, resolve_space, topic
from embed_assets_tests.engine.models import small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("small"), "bert")


@pytest.fixture
def tiny(project: Project, model: Path, tmp_path: Path) -> Project:
    """A project with a tiny real model and two partitions of real documents."""
    project.set(MODEL=str(model))
    project.monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    project.write("a/try.rst", topic("try"))
    project.write("b/with.rst", topic("with"))
    return project


def test_int8_is_a_separate_space_and_quantized_once(tiny: Project) -> None:
    plain = tiny.sync()
    tiny.set(PRECISION="int8")
    before = tiny.json("plan")
    assert "fresh" not in {partition["assets"]["embeddings"]["state"] for partition in before["partitions"]}
    made = tiny.sync()
    assert made["space"] != plain["space"] and made["embedded"] == plain["embedded"]
    assert tiny.sync()["embedded"] == 0
    tiny.write("a/new.rst", topic("lambda"))
    later = tiny.sync()
    assert later["space"] == made["space"] and 0 < later["embedded"] < made["embedded"]
    assert tiny.json("verify")["ok"]
    assert tiny.json("search", "exceptions", "-k", "2")["results"]
    kept = QuantizedModel.from_files(read_model(tiny.pipeline().lake, tiny.pipeline().model.float_space.name) or {})
    assert kept.artifact_hash in tiny.pipeline().model.space.number_format and len(kept.sample) > 8
    assert "nncf" in kept.made_with
    tiny.set(PRECISION="auto")
    assert tiny.sync()["space"] == plain["space"]


def test_the_first_quantized_model_wins(tiny: Project) -> None:
    lake = tiny.pipeline().lake
    first = keep_model(lake, "some-space", {"model.xml": b"1" * 40_000_000, "about.json": b"{}"})
    second = keep_model(lake, "some-space", {"model.xml": b"2", "about.json": b"{}"})
    assert first == second == read_model(lake, "some-space")
    assert read_model(lake, "another-space") is None


def test_a_changed_quantized_model_is_refused() -> None:
    files = QuantizedModel(b"<xml/>", b"weights", ("0" * 32,), "nncf").files
    assert QuantizedModel.from_files(files).sample == ("0" * 32,)
    with pytest.raises(ModelError, match="must have the hash"):
        QuantizedModel.from_files(files | {"model.bin": b"weightz"})
    with pytest.raises(ModelError, match="is incomplete"):
        QuantizedModel.from_files({"model.xml": b""})


def test_int8_without_documents_needs_no_model(tiny: Project) -> None:
    tiny.set(PRECISION="int8", SOURCE="empty")
    (tiny.root / "empty").mkdir()
    assert tiny.sync()["partitions"] == {}
    tiny.set(DEVICE="cuda")
    assert "int8 runs on CPUs, got EMBED_DEVICE='cuda'" in tiny.json("plan", exit_code=1)["error"]
    tiny.set(MODEL="fake:8", DEVICE="auto")
    assert (
        "EMBED_PRECISION=int8 needs a model whose files are on this machine" in tiny.json("plan", exit_code=1)["error"]
    )


def test_int8_with_nothing_to_calibrate_on(tiny: Project) -> None:
    tiny.set(PRECISION="int8", SOURCE="blank")
    tiny.landing.rename(tiny.root / "blank")
    for file in (tiny.root / "blank").rglob("*.rst"):
        file.write_text("  \n")
    assert {p["state"] for p in tiny.sync()["partitions"].values()} == {"materialized"}
    assert tiny.json("verify")["ok"]


def poisoned(model: Path, folder: Path) -> Path:
    """The model with a token whose embedding is NaN: the first token of "poison"."""
    import torch
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(model, folder / "poisoned"))
    weights = load_file(copy / "model.safetensors")
    ids = resolve_space(str(model)).tokenizer.tokenize(["☠"], 48).ids[1:-1]
    weights["embeddings.word_embeddings.weight"][int(ids[0])] = torch.nan
    save_file(weights, copy / "model.safetensors")
    return copy


def test_a_chunk_the_model_cannot_take_is_rejected_and_the_rest_embedded(
    tiny: Project, model: Path, tmp_path: Path
) -> None:
    tiny.set(MODEL=str(poisoned(model, tmp_path)))
    tiny.write("a/bad.md", "This text holds a ☠ in it.")
    tiny.write("c/alone.md", "Only a ☠ here.")
    result = tiny.run("sync")
    assert result.exit_code == 0 and "a: 1 chunk the model can't embed" in result.stderr
    shutil.rmtree(tiny.root / "lake")
    first = tiny.sync()
    assert (first["partitions"]["c"]["rejected_chunks"], first["partitions"]["c"]["chunks"]) == (1, 0)
    assert first["partitions"]["a"]["state"] == "materialized"
    assert first["partitions"]["a"]["rejected_chunks"] == 1
    assert (
        first["partitions"]["a"]["embedded"] + first["partitions"]["a"]["reused"] == first["partitions"]["a"]["chunks"]
    )
    rejected = tiny.rows("document_id", "reason", "detail", table="rejected_documents")
    assert {(row["document_id"], row["reason"]) for row in rejected} == {
        ("bad.md", "not_embeddable"), ("alone.md", "not_embeddable")
    }  # fmt: skip
    assert "not finite" in rejected[0]["detail"]
    assert {row["document_id"] for row in tiny.rows("document_id")} == {"try.rst", "with.rst"}
    assert tiny.json("verify")["ok"]
    assert tiny.sync()["embedded"] == 0
    assert tiny.json("plan", "--count")["chunks_to_embed"] == 0
    tiny.write("a/unreadable.md", b"")  # raw_documents runs again: the rejected chunk must stay known
    tiny.sync()
    assert tiny.json("verify")["ok"]
    assert "could not be embedded" in tiny.json("search", "☠", exit_code=1)["error"]
    tiny.write("a/bad.md", "This text holds none any more.")
    tiny.write("c/alone.md", "Nor this.")
    assert tiny.sync()["partitions"]["a"]["rejected_chunks"] == 0
    assert "not_embeddable" not in {row["reason"] for row in tiny.rows("reason", table="rejected_documents")}
    assert tiny.json("verify")["ok"]


def test_tune_remembers_its_result_and_plots_it(tiny: Project) -> None:
    found = tiny.json("tune", str(tiny.landing), "--png", "pictures/sweep.png")
    assert found["library"] in ("torch", "openvino") and set(found["points"]) == {"torch", "openvino"}
    assert found["spot"] in found["points"][found["library"]]
    assert all(memory["bytes_per_token"] >= 0 for memory in found["memory"].values())
    assert (tiny.root / "pictures/sweep.png").read_bytes()[:4] == b"\x89PNG"
    engine = tiny.pipeline().model.engine
    assert engine.embedder.max_batch_tokens == found["spot"]["max_batch_tokens"]
    assert engine.info.backend.startswith(found["library"])
    tiny.set(MAX_BATCH_TOKENS="77")
    assert tiny.pipeline().model.engine.embedder.max_batch_tokens == 77
    table = tiny.run("tune", str(tiny.landing)).stdout
    assert "sweet spot" in table and "per token" in table
    assert "can't be written" in tiny.json("tune", str(tiny.landing), "--png", "/dev/null/x.png", exit_code=1)["error"]
    (tiny.root / "nothing").mkdir()
    assert "needs texts" in tiny.json("tune", "nothing", exit_code=1)["error"]
    tiny.set(MODEL="fake:8")
    assert "tuning needs a model that runs on this machine" in tiny.json("tune", exit_code=1)["error"]


def test_tuning_runs_before_many_texts_but_not_before_few(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = topic("types").split("\n\n")[:40]
    engine = Engine(resolve_space(str(model)), EngineOptions("cpu"))
    engine.embedder_for(texts, TUNE_FROM_TEXTS - 1)
    assert not list(tmp_path.glob("embed_assets/tuning/*"))
    tuned = engine.embedder_for(texts, TUNE_FROM_TEXTS)
    assert len(list(tmp_path.glob("embed_assets/tuning/*"))) == 1
    again = Engine(resolve_space(str(model)), EngineOptions("cpu")).embedder
    assert (again.backend.name, again.max_batch_tokens) == (tuned.backend.name, tuned.max_batch_tokens)
    assert np.abs(again.embed(texts).vectors - tuned.embed(texts).vectors).max() < 1e-5


@pytest.mark.long
def test_benchmark_compares_with_encode(tiny: Project) -> None:
    report = tiny.json("benchmark", str(tiny.landing), "--chunks", "8", "--rounds", "1")
    assert set(report["sets"]) == {"long", "short", "mixed"} and report["ceiling_gflops"] > 0
    for found in report["sets"].values():
        rows = {row["name"].partition(",")[0]: row for row in found["rows"]}
        assert {"encode", "torch float32", "openvino float32", "openvino int8"} <= set(rows)
        assert rows["torch float32"]["cosine_min"] > 0.99999 and rows["openvino float32"]["cosine_min"] > 0.99999
    assert any("GPU" in reason for reason in report["left_out"])
    (tiny.root / "nothing").mkdir()
    assert "needs texts" in tiny.json("benchmark", "nothing", exit_code=1)["error"]
    assert "x encode" in tiny.run("benchmark", str(tiny.landing), "--chunks", "8", "--rounds", "1").stdout


def metadata_of(project: Project, asset: str, key: str) -> dict[str, Any]:
    from embed_assets.defs.instance import open_instance

    with open_instance() as instance:
        found = instance.fetch_materializations(
            dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[key]), limit=1
        )
    materialization = found.records[0].asset_materialization
    assert materialization is not None
    return {name: value.value for name, value in materialization.metadata.items()}


def test_run_metadata_reports_what_the_engine_did(tiny: Project) -> None:
    tiny.sync()
    found = metadata_of(tiny, "embeddings", "a")
    assert found["backend"] == "torch-packed" and found["precision"] == "float32" and found["device"] == "cpu"
    assert found["tokens"] > 0 and found["tokens_per_second"] > 0 and found["padding_percent"] == 0
    assert found["gflops"] > 0 and 0 < found["roofline_percent"] < 110
    assert 0 <= found["tokenizer_wait_percent"] <= 100 and 0 <= found["device_wait_percent"] <= 100
    assert found["advice"] and found["startup_seconds"] > 0 and found["engine_seconds"] > 0
    assert "gpu_memory_bytes" not in found and "advice" not in metadata_of(tiny, "chunks", "a")


class Heard:
    """A sink that keeps what it receives."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, float]] = []

    def progress(self, line: str, share: float) -> None:
        self.lines.append((line, share))

    def news(self, line: str) -> None: ...

    def finished(self, outcome: PartitionOutcome, share: float) -> None: ...


def test_progress_estimates_the_remaining_time() -> None:
    now, heard = [0.0], Heard()
    observer = RunObserver(heard, lambda: now[0])
    observer.start({"a": 100, "b": 300})
    assert observer.remaining_seconds is None
    now[0] = 10.0
    observer.progress("a", Progress(2500, 5000, 99_000, 10.0))
    assert heard.lines == [("a: 2,500 of at most 5,000 texts embedded, 9,900 tokens/s, about 70 s left", 0.125)]
    observer.progress("b", Progress(1, 4, 0, 0.0))
    assert heard.lines[-1][0] == "b: 1 of at most 4 texts embedded, 0 tokens/s, about 22 s left", "both count"
    observer.finished(PartitionOutcome("a"))
    observer.start({"c": 10**9})
    observer.finished(PartitionOutcome("b"))
    assert observer.remaining_seconds == 0.0, "the first start counts"


def test_partitions_fresh_on_retry_keep_the_outcome_of_the_first_attempt() -> None:
    observer = RunObserver(Heard())
    for reasons in ({"chunks": ["stale"]}, {}):
        observer.finished(PartitionOutcome("a", reasons=reasons, embedded=3 if reasons else 0))
    assert (observer.outcomes["a"].state, observer.outcomes["a"].embedded) == ("materialized", 3)
