"""The resource `embedding_engine`: shown, checked, and set for a single run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import dagster as dg
import pytest

from embed_assets.definitions import build_definitions
from embed_assets.defs.instance import open_instance
from embed_assets.defs.resources import EmbeddingEngine
from embed_assets.errors import SettingsError
from embed_assets.settings import Settings, load_settings
from embed_assets_tests.conftest import Project

ASSETS = [dg.AssetKey(name) for name in ("raw_documents", "chunks", "embeddings")]


def run(
    project: Project,
    config: dict[str, Any],
    resources: dict[str, object] | None = None,
    key: str = "embedding_engine",
) -> dg.ExecuteInProcessResult:
    """Materialize partition `a` with the engine configured for this run."""
    project.write("a/one.md", "One. " * 50)
    with open_instance() as instance:
        definitions = build_definitions(load_settings(), resources=resources)
        instance.add_dynamic_partitions(load_settings().name_prefix + "corpus", ["a"])
        return definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            partition_key="a",
            run_config={"resources": {key: {"config": config}}} if config else None,
            raise_on_error=False,
        )


def used(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """Metadata of the run's embeddings."""
    [made] = [e for e in result.get_asset_materialization_events() if e.asset_key == dg.AssetKey("embeddings")]
    return {name: value.value for name, value in made.materialization.metadata.items()}


def failure(result: dg.ExecuteInProcessResult) -> str:
    [event] = [event for event in result.all_events if event.is_step_failure]
    data = event.step_failure_data
    return (data.user_failure_data.description if data.user_failure_data else str(data.error)) or ""


def test_the_engine_is_a_resource_with_the_settings_that_recompute_nothing() -> None:
    names = {"device", "precision", "max_batch_tokens", "compile", "compute"}
    assert set(EmbeddingEngine.model_fields) == names | {n for n in Settings.model_fields if n.startswith("ray_")}
    for name, field in EmbeddingEngine.model_fields.items():
        setting = Settings.model_fields[name]
        assert (field.default, field.description) == (setting.default, setting.description)


def test_the_resource_says_what_is_in_force_and_where_it_comes_from(project: Project) -> None:
    project.set(MAX_BATCH_TOKENS="2048")
    project.monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    settings = load_settings(device="cpu")
    definitions = build_definitions(settings, resources={"embedding_engine": EmbeddingEngine(compile=True)})
    shown = definitions.get_repository_def().get_top_level_resources()["embedding_engine"].description or ""
    assert "| `max_batch_tokens` | `2048` | EMBED_MAX_BATCH_TOKENS |" in shown
    assert "| `ray_address` | `head:6379` | RAY_ADDRESS |" in shown
    assert "| `device` | `cpu` | the code location |" in shown
    assert "| `compile` | `True` | the resource |" in shown
    assert "| `precision` | `auto` | default |" in shown


def test_a_run_can_have_its_own_engine(project: Project) -> None:
    assert used(run(project, {}))["max_batch_tokens"] != 512
    project.write("a/two.md", "Two.")
    result = run(project, {"max_batch_tokens": 512})
    assert result.success and used(result)["max_batch_tokens"] == 512
    assert (used(result)["compute"], used(result)["compile"]) == ("local", False)
    assert used(result)["reused"] == 1  # it is the same embedding space
    project.write("a/three.md", "Three.")
    again = run(project, {})
    assert used(again)["max_batch_tokens"] != 512 and used(again)["reused"] == 2


def test_a_code_location_can_set_it_and_a_run_still_override_it(project: Project) -> None:
    given = {"embedding_engine": EmbeddingEngine(max_batch_tokens=256)}
    project.set(DEVICE="cpu")
    assert used(run(project, {}, given))["max_batch_tokens"] == 256
    project.write("a/two.md", "Two.")
    assert used(run(project, {"max_batch_tokens": 512}, given))["max_batch_tokens"] == 512


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"precision": "int8"}, "int8 vectors are another space; set EMBED_PRECISION for the whole deployment"),
        ({"max_batch_tokens": 0}, "EMBED_MAX_BATCH_TOKENS=0"),
        ({"ray_replicas": "4-2"}, "the minimum must not exceed the maximum"),
        ({"compute": "ray", "ray_address": "ray://head:10001"}, "must be host:port or auto"),
    ],
)
def test_what_can_not_be_used_is_one_line(project: Project, config: dict[str, Any], words: str) -> None:
    result = run(project, config)
    assert not result.success
    assert words in failure(result) and "embedding_engine" in failure(result)


def test_what_changes_vectors_or_chunks_can_not_be_set_per_run(project: Project) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match="model"):
        run(project, {"model": "fake:16"})
    with pytest.raises(dg.DagsterInvalidConfigError, match="bf16"):
        run(project, {"precision": "bf16"})


def test_something_else_under_its_key_is_refused(project: Project) -> None:
    with pytest.raises(SettingsError, match="must be an EmbeddingEngine, got str"):
        build_definitions(load_settings(), resources={"embedding_engine": "cuda"})
    with pytest.raises(SettingsError, match="int8 vectors are another space"):
        build_definitions(load_settings(), resources={"embedding_engine": EmbeddingEngine(precision="int8")})


def test_a_field_can_come_from_a_variable(project: Project) -> None:
    project.monkeypatch.setenv("DEVICE_HERE", "cpu")
    project.monkeypatch.setenv("TOKENS_HERE", "256")
    given = {
        "embedding_engine": EmbeddingEngine(
            device=dg.EnvVar("DEVICE_HERE"), max_batch_tokens=dg.EnvVar.int("TOKENS_HERE")
        )
    }
    definitions = build_definitions(load_settings(), resources=given)
    shown = definitions.get_repository_def().get_top_level_resources()["embedding_engine"].description or ""
    assert "| `device` | `cpu` | DEVICE_HERE |" in shown and "| `max_batch_tokens` | `256` | TOKENS_HERE |" in shown
    assert used(run(project, {}, given))["max_batch_tokens"] == 256
    for wrong in ("many", ""):
        project.monkeypatch.setenv("TOKENS_HERE", wrong)
        with pytest.raises(SettingsError, match="TOKENS_HERE, which must be set to a whole number"):
            build_definitions(load_settings(), resources=given)


def test_each_corpus_has_its_own_engine(project: Project) -> None:
    both = dg.Definitions.merge(
        *(
            build_definitions(load_settings(name_prefix=prefix, lake=prefix, max_batch_tokens=tokens))
            for prefix, tokens in (("laws", 100), ("recipes", 200))
        )
    )
    found = both.resources or {}
    assert {name: engine.max_batch_tokens for name, engine in found.items() if "engine" in name} == {
        "laws_embedding_engine": 100,
        "recipes_embedding_engine": 200,
    }


def test_dagster_asset_materialize_takes_it(project: Project) -> None:
    project.write("a/one.md", "One.")
    project.json("discover")
    config = json.dumps({"resources": {"embedding_engine": {"config": {"max_batch_tokens": 512}}}})
    command = ["-m", "dagster", "asset", "materialize", "-m", "embed_assets.definitions", "--select", "*"]
    done = subprocess.run(
        [sys.executable, *command, "--partition", "a", "--config-json", config],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with open_instance() as instance:
        [record] = instance.fetch_materializations(dg.AssetKey("embeddings"), limit=1).records
    made = record.asset_materialization
    assert made is not None and made.metadata["max_batch_tokens"].value == 512
