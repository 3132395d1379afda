"""The `dg` command: in this repository, and in somebody's project that uses the component."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from embed_assets_tests.conftest import Project

ROOT = Path(__file__).parents[2]
DEFS = "shop/defs/handbook/defs.yaml"


def dg(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `dg` in a folder."""
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "COLUMNS": "200", "EMBED_MODEL": "fake:8"}
    command = [sys.executable, "-c", "from dagster_dg_cli.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def definitions(folder: Path) -> dict[str, Any]:
    listed = dg(folder, "list", "defs", "--json")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    found: dict[str, Any] = json.loads(listed.stdout)
    return found


def loaded(shop: Path, expression: str) -> str:
    """What an expression over the loaded definitions prints."""
    code = f"import dagster as dg, shop.definitions as d; defs = d.defs(); print({expression})"
    environment = os.environ | {"EMBED_MODEL": "fake:8"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=shop, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def shop(project: Project) -> Path:
    """A project as `create-dagster` makes them, with an executor and a job of its own."""
    files = {
        "pyproject.toml": '[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "shop"\n',
        "shop/__init__.py": "",
        "shop/defs/__init__.py": "",
        "shop/definitions.py": """
            from pathlib import Path
            import dagster as dg

            @dg.definitions
            def defs():
                return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
            """,
        "shop/defs/jobs.py": """
            import dagster as dg

            @dg.op
            def nothing(): ...

            @dg.job
            def unrelated():
                nothing()

            @dg.definitions
            def defs():
                return dg.Definitions(jobs=[unrelated], executor=dg.in_process_executor)
            """,
    }
    for name, text in files.items():
        file = project.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return project.root


def attributes(shop: Path, **given: object) -> None:
    (shop / DEFS).parent.mkdir(parents=True, exist_ok=True)
    places = {"name_prefix": "handbook", "source": "landing", "lake": "lake"}
    found = {"type": "embed_assets.component.EmbeddedCorpus", "attributes": places | given}
    (shop / DEFS).write_text(yaml.safe_dump(found, sort_keys=False))


def test_the_component_is_listed_and_its_scaffold_runs_when_two_lines_are_filled_in(shop: Path) -> None:
    assert "embed_assets.component.EmbeddedCorpus" in dg(shop, "list", "components").stdout
    made = dg(shop, "scaffold", "defs", "embed_assets.component.EmbeddedCorpus", "handbook")
    assert made.returncode == 0, made.stdout + made.stderr
    text = (shop / DEFS).read_text()
    assert "name_prefix: handbook" in text
    filled = text.replace("FOLDER_OR_URL_OF_THE_DOCUMENTS", "landing").replace("FOLDER_OR_URL_OF_THE_TABLES", "lake")
    (shop / DEFS).write_text(filled)
    assert dg(shop, "check", "yaml").returncode == 0
    checked = dg(shop, "check", "defs")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert loaded(shop, "defs.resolve_job_def('unrelated').executor_def.name") == "in_process"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"settings": {"chunk_tokens": 64, "chunk_tokenz": 64}}, "chunk_tokenz: 64"),
        ({"onwers": ["team:search"]}, "onwers:"),
        ({"settings": {"chunk_tokens": 3}}, "chunk_tokens: 3"),
        ({"settings": {"precision": "bf16"}}, "precision: bf16"),
        ({"settings": {"device": None, "chunk_tokens": 64}}, "device: null"),
        ({"freshness": {"fail_after_hours": 24, "warn_after_days": 1}}, "warn_after_days: 1"),
        ({"freshness": {"fail_after_hours": 0}}, "fail_after_hours: 0"),
    ],
)
def test_check_yaml_refuses_what_is_wrong_with_its_line(shop: Path, given: dict[str, object], line: str) -> None:
    attributes(shop, **given)
    checked = dg(shop, "check", "yaml")
    assert checked.returncode != 0
    number = next(i for i, text in enumerate((shop / DEFS).read_text().splitlines(), 1) if line in text)
    shown = [text for text in checked.stdout.splitlines() if text.strip().startswith(f"{number} |")]
    assert shown and "^" in checked.stdout.splitlines()[checked.stdout.splitlines().index(shown[-1]) + 1]


def test_owners_tags_group_kinds_freshness_and_post_processing(project: Project, shop: Path) -> None:
    attributes(
        shop,
        owners=["team:search"],
        tags={"tier": "gold"},
        kinds=["s3"],
        group_name="books",
        freshness={"fail_after_hours": 24, "warn_after_hours": 12},
        settings={"chunk_tokens": "{{ env.CHUNKS }}", "truncate_dim": "auto"},
    )
    with (shop / DEFS).open("a") as file:
        file.write('post_processing:\n  assets: [{target: "*", attributes: {tags: {more: "yes"}}}]\n')
    project.monkeypatch.setenv("CHUNKS", "100")
    assets = {asset["asset_key"]: asset for asset in definitions(shop)["assets"]}
    found = assets["handbook/embeddings"]
    assert found["group_name"] == "books" and found["owners"] == [{"team": "search"}]
    assert {"s3", "deltalake", "pytorch"} <= set(found["kinds"])
    node = "defs.resolve_asset_graph().get(dg.AssetKey(['handbook', 'embeddings']))"
    tags = loaded(shop, f"sorted(i for i in {node}.tags.items() if '/' not in i[0])")
    assert tags == "[('more', 'yes'), ('tier', 'gold')]"
    assert "fail_window" in loaded(shop, f"{node}.freshness_policy")


def test_this_repository_is_a_project_of_dg(project: Project) -> None:
    found = definitions(ROOT)
    assert {asset["asset_key"] for asset in found["assets"]} == {
        "source_files",
        "raw_documents",
        "chunks",
        "embeddings",
        "active_embeddings",
    }
    assert sorted(resource["name"] for resource in found["resources"]) == [
        "embedding_engine",
        "lake",
        "lake_io_manager",
    ]
    checked = dg(ROOT, "check", "defs")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "does not match" not in checked.stdout + checked.stderr


def test_dg_and_the_workspace_name_the_same_definitions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["dg"]["project"]
    [location] = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    workspace = location["python_module"]
    assert project["code_location_target_module"] == workspace["module_name"]
    assert project["code_location_name"] == workspace["location_name"]
