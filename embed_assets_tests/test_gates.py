"""Gates stop a space that is broken before readers get it, and name what is wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from embed_assets_tests.conftest import REPOSITORY, SAMPLE_MODEL, Project, topic

Weights = dict[str, np.ndarray]
LAST = "encoder.layer.5.output.LayerNorm"


def shuffled(weights: Weights) -> None:
    generator = np.random.default_rng(0)
    for name, values in weights.items():
        if values.dtype.kind == "f":
            weights[name] = generator.permutation(values.ravel()).reshape(values.shape)


def constant(weights: Weights) -> None:
    weights[f"{LAST}.weight"][:] = 0


def dead(weights: Weights) -> None:
    for part in ("weight", "bias"):
        weights[f"{LAST}.{part}"][5] = 0


def unchanged(weights: Weights) -> None:
    """Only the pooling differs."""


def broken_model(folder: Path, change: Callable[[Weights], None], pooling: str) -> Path:
    """A copy of the sample model with other weights or another pooling."""
    package = importlib.util.find_spec(SAMPLE_MODEL.partition(":")[2])
    assert package is not None and package.origin is not None
    [weights_file] = Path(package.origin).parent.rglob("model.safetensors")
    shutil.copytree(weights_file.parent, folder)
    weights = {name: values.copy() for name, values in load_file(weights_file).items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "1_Pooling" / "config.json"
    modes = {name: value for name, value in json.loads(config.read_text()).items() if "mode" not in name}
    config.write_text(json.dumps(modes | {f"pooling_mode_{pooling}": True}))
    return folder


@pytest.mark.long
def test_a_broken_model_is_stopped_by_the_gate_that_names_it(project: Project, tmp_path: Path) -> None:
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        project.write(f"docs/{page.name}", page.read_bytes())
    project.set(MODEL=SAMPLE_MODEL)
    project.sync()
    before = project.json("search", "how to go back to the old model")
    kinds: dict[str, tuple[Callable[[Weights], None], str, str]] = {
        "shuffled": (shuffled, "mean_tokens", "retrieval_probe"),
        "first token": (unchanged, "cls_token", "retrieval_probe"),
        "maximum": (unchanged, "max_tokens", "retrieval_probe"),
        "constant": (constant, "mean_tokens", "collapse"),
        "dead": (dead, "mean_tokens", "dead_dimensions"),
    }
    for name, (change, pooling, gate) in kinds.items():
        project.set(MODEL=str(broken_model(tmp_path / name, change, pooling)))
        project.sync()
        refused = project.json("promote", exit_code=1)
        failed = {each["name"]: each["detail"] for each in refused["gates"] if not each["passed"]}
        assert gate in failed, (name, failed)
        assert "look at" in failed[gate]
        assert project.json("search", "how to go back to the old model") == before
    project.set(MODEL=SAMPLE_MODEL, TRUNCATE_DIM="256")
    assert project.sync()["embedded"] == 0
    assert all(each["passed"] for each in project.json("promote")["gates"])


def test_rows_that_hold_other_vectors_than_the_model_gives_are_found(project: Project) -> None:
    project.set(MODEL="fake:16")
    for name in sorted(topics)[:40]:  # a sample of fewer than 50 chunks would be too small to tell
        project.write(f"a/{name}.rst", topic(name))
    project.sync()
    project.set(MODEL="fake:24@new")
    project.sync()
    [space] = [each["space"] for each in project.json("spaces")["spaces"] if each["model"] == "fake:24@new"]
    path = str(project.root / "lake" / "embeddings" / space)
    rows = pl.read_delta(path)
    vectors = np.stack(rows["embedding"].to_list())
    vectors[:, 3] = 0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    changed = rows.with_columns(pl.Series("embedding", vectors.tolist(), pl.List(pl.Float32)))
    changed.write_delta(path, mode="overwrite", delta_write_options={"partition_by": ["partition_key"]})
    refused = project.json("evaluate", "--space", space, exit_code=1)
    failed = {each["name"]: each["detail"] for each in refused["gates"][space] if not each["passed"]}
    assert {"dead_dimensions", "reproduction"} <= failed.keys()
    assert "(3)" in failed["dead_dimensions"]


def test_labelled_queries_compare_spaces(project: Project) -> None:
    project.set(MODEL="fake:16")
    project.write("a/one.txt", "The first text.")
    project.write("a/two.txt", "The second text.")
    project.sync()
    labels = project.root / "queries.jsonl"
    lines = [{"query_id": "1", "query": "The first text.", "relevant": {"a/one.txt": 1}}]
    lines += [{"query_id": "2", "query": "The second text.", "relevant": {"two.txt": 2, "gone.txt": 1}}]
    labels.write_text("\n".join(map(json.dumps, lines)))
    project.set(EVALUATION=str(labels))
    found = project.json("evaluate")
    [scores] = found["spaces"].values()
    assert found["queries"] == 2 and found["differences"] == []
    assert scores["mrr"] == 1.0 and scores["recall@10"] == 0.75
    assert any("gone.txt" in note for note in found["notes"])
    project.set(MODEL="fake:24@new")
    project.sync()
    both = project.json("evaluate")
    assert len(both["spaces"]) == 2
    assert {each["metric"] for each in both["differences"]} == {"ndcg@10", "recall@10", "mrr"}
    project.json("promote")
    labels.write_text('{"query_id": "1"}')
    assert "line 1" in project.json("evaluate", exit_code=1)["error"]
