"""Used as a library: several corpora in one code location, and the component."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from embed_assets.definitions import build_definitions
from embed_assets.defs.instance import open_instance
from embed_assets.settings import load_settings
from embed_assets_tests.conftest import Project, topic


def corpus(project: Project, prefix: str, model: str, **settings: object) -> dg.Definitions:
    lake, source = str(project.root / f"lake-{prefix}"), str(project.root / "sources" / prefix)
    return build_definitions(load_settings(name_prefix=prefix, source=source, lake=lake, model=model, **settings))


def write(project: Project, prefix: str, key: str, text: str) -> None:
    file = project.root / "sources" / prefix / key / "one.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_two_corpora_with_two_models_in_one_code_location(project: Project) -> None:
    for prefix in ("laws", "recipes"):
        for key in "ab":
            write(project, prefix, key, f"# {prefix} {key}\n\n{topic('try')}")
    both = dg.Definitions.merge(
        corpus(project, "laws", "fake:8"), corpus(project, "recipes", "fake:12@other", chunk_tokens=100)
    )
    dg.Definitions.validate_loadable(both)
    keys = {key.to_user_string() for key in both.resolve_asset_graph().get_all_asset_keys()}
    assets = ("source_files", "raw_documents", "chunks", "embeddings", "active_embeddings")
    assert keys == {f"{prefix}/{asset}" for prefix in ("laws", "recipes") for asset in assets}
    with open_instance() as instance:
        for prefix, own in (("laws", ["a", "b"]), ("recipes", ["a"])):
            instance.add_dynamic_partitions(f"{prefix}_corpus", own)
        for prefix, key in (("laws", "b"), ("recipes", "a")):
            selection = [dg.AssetKey([prefix, asset]) for asset in ("raw_documents", "chunks", "embeddings")]
            job = both.resolve_implicit_job_def_def_for_assets(selection)
            assert job is not None
            assert job.execute_in_process(instance=instance, partition_key=key, asset_selection=selection).success
        made = {k: instance.get_materialized_partitions(dg.AssetKey(k.split("/"))) for k in sorted(keys)}
        assert made["laws/embeddings"] == {"b"} and made["recipes/embeddings"] == {"a"}
        requested = dg.evaluate_automation_conditions(both, instance)
        assert requested.get_requested_partitions(dg.AssetKey(["laws", "embeddings"])) == {"a"}
        assert not requested.get_requested_partitions(dg.AssetKey(["recipes", "embeddings"]))
    assert sorted(sensor.name for sensor in both.sensors or ()) == [
        "laws_arrivals",
        "laws_unsynced",
        "recipes_arrivals",
        "recipes_unsynced",
    ]
    assert list(project.root.glob("lake-laws/embeddings/fake-8-*"))
    assert list(project.root.glob("lake-recipes/embeddings/fake-12-other-*"))


def test_a_code_location_keeps_its_own_executor_and_jobs(project: Project) -> None:
    @dg.op
    def nothing() -> None: ...

    @dg.job
    def unrelated() -> None:
        nothing()

    @dg.asset
    def foreign() -> None: ...

    others = dg.Definitions(assets=[foreign], jobs=[unrelated])
    corpora = [corpus(project, "laws", "fake:8"), corpus(project, "recipes", "fake:8")]
    without = dg.Definitions.merge(*corpora, others)
    assert without.resolve_job_def("unrelated").executor_def.name == "multi_or_in_process_executor"
    own = dg.Definitions.merge(*corpora, others, dg.Definitions(executor=dg.in_process_executor))
    dg.Definitions.validate_loadable(own)
    assert own.resolve_job_def("unrelated").executor_def is dg.in_process_executor
    assert own.resolve_implicit_global_asset_job_def().executor_def is dg.in_process_executor
    assert own.resolve_job_def("laws_plan").executor_def.name == "one_process"


def test_the_step_runs_under_dagsters_default_executor(project: Project) -> None:
    project.write("a/one.md", "One.")
    project.json("discover")
    project.monkeypatch.setenv("DAGSTER_HOME", str(project.root))
    module = project.root / "elsewhere.py"
    module.write_text(
        "from embed_assets.definitions import build_definitions\n"
        "from embed_assets.settings import load_settings\n"
        "defs = build_definitions(load_settings())\n"
    )
    command = ["-m", "dagster", "job", "execute", "-f", str(module), "-j", "__ASSET_JOB"]
    tags = '{"dagster/partition": "a"}'
    done = subprocess.run([sys.executable, *command, "--tags", tags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with open_instance() as instance:
        [run] = instance.get_runs()
        assert instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_WORKER_STARTED)
    assert project.sync()["embedded"] == 0


def test_the_command_line_works_with_a_prefix_too(project: Project) -> None:
    project.set(NAME_PREFIX="laws")
    project.write("a/one.md", "One.")
    assert project.sync()["embedded"] == 1
    assert project.sync()["embedded"] == 0
    assert project.json("plan")["partitions"][0]["assets"]["embeddings"]["state"] == "fresh"


def test_a_lake_holds_one_corpus(project: Project) -> None:
    project.set(NAME_PREFIX="laws")
    project.write("a/one.md", "One.")
    project.sync()
    project.set(NAME_PREFIX="recipes")
    refused = project.run("sync")
    assert refused.exit_code == 1
    assert "EMBED_NAME_PREFIX='laws', got EMBED_SOURCE='../landing' and EMBED_NAME_PREFIX='recipes'" in refused.stderr


@pytest.mark.parametrize("prefix", ["a/b", "1a", "a b", "a" * 70])
def test_a_prefix_must_be_a_word(project: Project, prefix: str) -> None:
    project.set(NAME_PREFIX=prefix)
    assert "EMBED_NAME_PREFIX" in project.run("plan").stderr


def test_importing_the_builder_needs_no_environment(project: Project) -> None:
    project.set(MODEL="/nowhere")
    code = "from embed_assets.definitions import build_definitions; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def component_project(project: Project, attributes: dict[str, object]) -> Path:
    """A project as `dg` makes them, with one component."""
    package = project.root / f"kb_{project.root.name.rpartition('_')[2]}"
    folder = package / "defs" / "handbook"
    folder.mkdir(parents=True)
    for made in (package, package / "defs"):
        (made / "__init__.py").touch()
    (project.root / "pyproject.toml").write_text(
        f'[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "{package.name}"\n'
    )
    (folder / "defs.yaml").write_text(
        yaml.safe_dump({"type": "embed_assets.component.EmbeddedCorpus", "attributes": attributes})
    )
    project.monkeypatch.syspath_prepend(str(project.root))
    return package


def test_the_component_from_yaml(project: Project) -> None:
    attributes: dict[str, object] = {
        "name_prefix": "handbook",
        "source": str(project.landing),
        "lake": str(project.root / "lake"),
        "settings": {"model": "fake:8", "chunk_tokens": 100, "partition_by": "file"},
    }
    folder = component_project(project, attributes)
    project.write("one.md", "One.")
    loaded = dg.load_from_defs_folder(path_within_project=folder)
    keys = {key.to_user_string() for key in loaded.resolve_asset_graph().get_all_asset_keys()}
    assert "handbook/embeddings" in keys
    with open_instance() as instance:
        instance.add_dynamic_partitions("handbook_corpus", ["one.md"])
        job = loaded.resolve_implicit_global_asset_job_def()
        assert job.execute_in_process(instance=instance, partition_key="one.md").success
        assert instance.get_materialized_partitions(dg.AssetKey(["handbook", "embeddings"])) == {"one.md"}
    assert list((project.root / "lake/embeddings").glob("fake-8-*"))


def test_a_component_without_a_lake_is_an_error(project: Project) -> None:
    folder = component_project(project, {"source": "here"})
    with pytest.raises(Exception, match="handbook") as caught:
        dg.load_from_defs_folder(path_within_project=folder).resolve_asset_graph()
    assert "lake" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("attributes", "meant"),
    [({"sorce": "here", "lake": "there"}, "source"), ({"source": "h", "lake": "l", "nam_prefix": "x"}, "name_prefix")],
)
def test_a_misspelt_attribute_of_the_component_is_an_error(
    project: Project, attributes: dict[str, object], meant: str
) -> None:
    folder = component_project(project, attributes)
    with pytest.raises(Exception, match="handbook") as caught:
        dg.load_from_defs_folder(path_within_project=folder).resolve_asset_graph()
    assert f"did you mean {meant}?" in str(caught.value.__cause__)


def test_a_misspelt_setting_of_the_component_is_an_error(project: Project) -> None:
    settings = {"chunk_tokenz": 64, "source_options": {"anon": True}}
    folder = component_project(project, {"source": "here", "lake": "there", "settings": settings})
    with pytest.raises(Exception, match="handbook") as caught:
        dg.load_from_defs_folder(path_within_project=folder).resolve_asset_graph()
    assert "'chunk_tokenz' is not a setting (did you mean chunk_tokens?)" in str(caught.value.__cause__)
