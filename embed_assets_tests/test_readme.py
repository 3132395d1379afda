"""Everything the README names exists, and every setting, command and column is in the README."""

from __future__ import annotations

import re

import pytest

from embed_assets.cli import main
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.lake.tables import TableSpec
from embed_assets.settings import Settings
from embed_assets_tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text("utf-8")
PACKAGE = REPOSITORY / "embed_assets"


def test_it_is_not_too_long() -> None:
    assert len(README.splitlines()) <= 190


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (\w+)", README))))
def test_make_targets_exist(target: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_make_target_for_users_is_mentioned() -> None:
    for target in ("demo", "test", "ui", "check", "bench"):
        assert f"make {target}" in README


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:\w+/)*\w+\.(?:py|yaml|txt|toml))`", README))))
def test_files_exist(name: str) -> None:
    assert (REPOSITORY / name).is_file() or (PACKAGE / name).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+)/`", README)) - {"_staging"}))
def test_packages_exist(name: str) -> None:
    assert (PACKAGE / name).is_dir()


def test_every_command_is_listed_with_options_that_exist() -> None:
    listed = dict(re.findall(r"^\| `embed-assets (\w+)([^`]*)`", README, re.MULTILINE))
    assert listed.keys() == main.commands.keys()
    for name, usage in listed.items():
        options = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--?[a-z][a-z-]*", usage)) <= options


def test_every_setting_is_listed_and_exists() -> None:
    listed = [
        setting
        for page in (
            README,
            *((REPOSITORY / "docs" / name).read_text("utf-8") for name in PAGES),
        )
        for setting in re.findall(r"^\| `EMBED_(\w+)` \| (?:`([^`]*)`)?", page, re.MULTILINE)
    ]
    assert [name.lower() for name, _ in listed] == [f for f in README_ORDER if f in Settings.model_fields]
    assert {name.lower() for name, _ in listed} == set(Settings.model_fields)
    defaults = {name.lower(): default for name, default in listed if default}
    for name in ("source", "lake", "partition_by", "model", "max_file_bytes", "reuse", "device", "text_column"):
        assert defaults[name] == str(Settings.model_fields[name].default)


PAGES = ("context.md", "endpoints.md", "ray.md", "formats.md", "dagster.md", "generations.md")
README_ORDER = [
    *("source", "source_options", "lake", "lake_options", "partition_by"),
    *("max_file_bytes", "model", "revision", "prompt", "query_prompt", "truncate_dim", "device", "precision"),
    *("max_batch_tokens", "compile", "prepare_processes", "chunk_tokens", "chunk_overlap_tokens", "reuse"),
    *("compute", "trust_remote_code", "allow_pickled_weights"),
    *("context", "metadata"),
    *("endpoint", "endpoint_concurrency", "endpoint_batch_texts", "endpoint_requests_per_minute"),
    *("endpoint_tokens_per_minute",),
    *("ray_address", "ray_replicas", "ray_gpus_per_replica", "ray_cpus_per_replica", "ray_wait_seconds"),
    *("text_column", "id_column", "title_column", "text_format", "ignore"),
    *("settle_seconds", "name_prefix", "read_only"),
    *("promote", "evaluation", "max_mean_cosine", "min_effective_rank_percent", "max_dead_dimensions_percent"),
    *("max_near_duplicate_percent", "max_probe_loss_percent", "max_evaluation_loss"),
    *("max_rejected_percent", "max_duplicate_percent", "max_truncated_percent", "max_unknown_percent"),
]


def test_every_column_is_described() -> None:
    table = README.partition("## What you get")[2].partition("```")[0]
    first_cells = re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(first_cells))) == set(TableSpec("embeddings").schema.names)


def test_the_example_names_the_sample_models_table(sample_space: EmbeddingSpace) -> None:
    (path,) = re.findall(r'scan_delta\("lake/embeddings/([^"]+)"\)', README)
    assert path == sample_space.name


def test_the_expected_top_level_files_exist() -> None:
    wanted = (
        "pyproject.toml embed_assets embed_assets_tests workspace.yaml dagster.yaml README.md Makefile constraints.txt"
    )
    for name in [*wanted.split(), "LICENSE", "CHANGELOG.md", ".ci/run"]:
        assert (REPOSITORY / name).exists(), name


def test_no_file_contains_this_machines_path() -> None:
    ours = [p for p in REPOSITORY.rglob("*.py") if not any(part.startswith(".venv") for part in p.parts)]
    for path in [*ours, REPOSITORY / "README.md"]:
        text = path.read_text("utf-8")
        assert str(REPOSITORY) not in text, path
