"""Assets below ours: the examples of docs/assets-below.md, the inputs' types, and what gates them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from embed_assets.definitions import build_definitions
from embed_assets.defs.instance import open_instance
from embed_assets.defs.lake_resource import EmbeddingLake
from embed_assets.defs.names import Names
from embed_assets.errors import LakeError
from embed_assets.settings import load_settings
from embed_assets.stages import checks
from embed_assets_tests.conftest import Project

PAGE = Path(__file__).parents[2] / "docs/assets-below.md"
FAILING = """
from dataclasses import replace
from embed_assets.stages import checks
failing = lambda subject: checks.Outcome(subject.partition.key != 'b', 'broken for a test')
checks.CHECKS = tuple(replace(c, ask=failing) if c.name == 'vectors' else c for c in checks.CHECKS)
"""
NOISE = ("emitted no result", "did not yield", "WARNING")


def example(project: Project, name: str) -> Path:
    """One of the page's examples, as a file."""
    [code] = [
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if code.startswith(f"# {name}")
    ]
    file = project.root / name
    file.write_text(code)
    return file


def materialize(file: Path, select: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-f", str(file), "--select", select, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def corpus(project: Project) -> Project:
    for key in "abc":
        for i in range(3):
            project.write(f"{key}/{i}.md", f"# {key}\n\nDocument {i} of {key}.")
    project.json("discover")
    return project


def test_the_example_of_an_index_below(corpus: Project) -> None:
    file = example(corpus, "index.py")
    made = materialize(file, "*", "--partition", "a")
    assert made.returncode == 0, made.stderr
    assert not [word for word in NOISE if word in made.stderr], made.stderr
    assert np.load(corpus.root / "index/a/vectors.npy").shape == (3, load_dimension(corpus))
    made = materialize(file, "*", "--partition-range", "b...c")
    assert made.returncode == 0, made.stderr
    assert not [word for word in NOISE if word in made.stderr], made.stderr
    assert len((corpus.root / "index/c/ids.txt").read_text().splitlines()) == 3
    corpus.write("a/3.md", "One more.")
    assert materialize(file, "raw_documents,chunks", "--partition", "a").returncode == 0
    made = materialize(file, "embeddings+", "--partition", "a")
    assert made.returncode == 0 and not [word for word in NOISE if word in made.stderr], made.stderr
    assert len((corpus.root / "index/a/ids.txt").read_text().splitlines()) == 4


def load_dimension(project: Project) -> int:
    [table] = (project.root / "lake/embeddings").glob("fake-*")
    return int(table.name.split("-")[1])


def test_the_example_of_a_report_over_all_partitions(corpus: Project) -> None:
    corpus.sync()
    made = materialize(example(corpus, "report.py"), "my_report")
    assert made.returncode == 0, made.stderr
    with open_instance() as instance:
        [record] = instance.fetch_materializations(dg.AssetKey("my_report"), limit=1).records
    metadata = record.asset_materialization.metadata  # type: ignore[union-attr]
    assert (metadata["chunks"].value, metadata["partitions"].value) == (9, 3)


def test_a_blocking_check_that_fails_keeps_what_is_below_from_running(corpus: Project) -> None:
    file = example(corpus, "index.py")
    file.write_text(file.read_text() + FAILING)
    for arguments in (["--partition", "b"], ["--partition-range", "a...b"]):
        made = materialize(file, "*", *arguments)
        assert made.returncode != 0
        assert "the check 'vectors' of embeddings failed: broken for a test" in made.stderr + made.stdout
        assert not (corpus.root / "index").exists()
    for select in ("*", "embeddings+"):
        made = materialize(file, select, "--partition", "a")
        assert made.returncode == 0, made.stderr
        assert [folder.name for folder in (corpus.root / "index").iterdir()] == ["a"]


def test_a_check_that_fails_on_what_is_fresh_gates_too(corpus: Project) -> None:
    corpus.sync()
    file = example(corpus, "index.py")
    file.write_text(file.read_text() + FAILING)
    made = materialize(file, "embeddings+", "--partition-range", "a...b")
    assert made.returncode != 0
    assert "the check 'vectors' of embeddings failed: broken for a test" in made.stderr + made.stdout
    assert not (corpus.root / "index").exists()
    planned = {p["partition_key"]: p["assets"]["embeddings"] for p in corpus.json("plan")["partitions"]}
    assert {key: found["state"] for key, found in planned.items()} == {"a": "fresh", "b": "stale", "c": "fresh"}
    assert "damaged" in str(planned["b"]["reasons"])


def test_a_failing_check_that_runs_alone_gates_too(corpus: Project) -> None:
    corpus.sync()
    project_file = corpus.root / "below.py"
    project_file.write_text(example(corpus, "index.py").read_text() + FAILING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "CHECKS", checks.CHECKS)
        spec = importlib.util.spec_from_file_location("below", project_file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        vectors, index = dg.AssetCheckKey(dg.AssetKey("embeddings"), "vectors"), dg.AssetKey("my_index")
        for wanted, key in (([index], "b"), ([index], "a"), ([], None)):  # without a key: all partitions
            selection = dg.AssetSelection.checks(vectors) | dg.AssetSelection.assets(*wanted)
            job = dg.define_asset_job("checked", selection)
            found = dg.Definitions.merge(module.defs, dg.Definitions(jobs=[job])).resolve_job_def("checked")
            with open_instance() as instance:
                done = found.execute_in_process(instance=instance, partition_key=key, raise_on_error=False)
            assert done.success is (not wanted or key == "a")
            assert [e.asset_key for e in done.get_asset_materialization_events()] == (wanted if key == "a" else [])


def below(project: Project, annotation: Any, take: Callable[[Any], Any], **arguments: Any) -> list[Any]:
    """What an asset gets of `embeddings` with this annotation, in a run over arguments' partitions."""
    found: list[Any] = []
    partitions = Names().partitions if arguments else None

    def my_asset(embeddings: Any) -> None:
        found.append(take(embeddings))

    my_asset.__annotations__ = {"embeddings": annotation, "return": None}
    asset = dg.asset(partitions_def=partitions, backfill_policy=dg.BackfillPolicy.single_run())(my_asset)
    definitions = dg.Definitions.merge(build_definitions(load_settings()), dg.Definitions(assets=[asset]))
    job = definitions.resolve_implicit_job_def_def_for_assets([asset.key])
    assert job is not None
    with open_instance() as instance:
        assert job.execute_in_process(instance=instance, asset_selection=[asset.key], **arguments).success
    return found


RANGE = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "b"}


@pytest.mark.parametrize(
    ("annotation", "take"),
    [
        (pl.LazyFrame, lambda rows: rows.collect()["partition_key"].to_list()),
        (pl.DataFrame, lambda rows: rows["partition_key"].to_list()),
        (pa.RecordBatchReader, lambda rows: rows.read_all()["partition_key"].to_pylist()),
        (pa.Table, lambda rows: rows["partition_key"].to_pylist()),
    ],
)
def test_inputs_are_the_rows_of_the_runs_partitions(
    corpus: Project, annotation: Any, take: Callable[[Any], Any]
) -> None:
    corpus.sync()
    assert below(corpus, annotation, take, partition_key="a") == [["a"] * 3]
    assert sorted(below(corpus, annotation, take, tags=RANGE)[0]) == ["a"] * 3 + ["b"] * 3
    assert sorted(below(corpus, annotation, take)[0]) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_another_annotation_is_refused_in_one_line(corpus: Project) -> None:
    corpus.sync()
    with pytest.raises(Exception, match=r"'embeddings' must be annotated with pl\.LazyFrame.* got dict"):
        below(corpus, dict, lambda rows: rows)


def lake() -> EmbeddingLake:
    found = (build_definitions(load_settings()).resources or {})["lake"]
    assert isinstance(found, EmbeddingLake)
    return found


def test_tables_that_do_not_exist_yet_are_empty_and_others_are_errors(project: Project) -> None:
    assert lake().scan().collect().is_empty()
    assert lake().reader("rejected_documents").read_all().num_rows == 0
    with pytest.raises(LakeError, match="does not exist yet"):
        lake().delta()
    with pytest.raises(LakeError, match="no table 'vectors'; it has raw_documents"):
        lake().scan("vectors")
    with pytest.raises(LakeError, match="embeddings has no column 'vector'"):
        lake().reader(columns=["vector"])


def test_the_lake_shows_no_secrets(project: Project) -> None:
    project.set(LAKE_OPTIONS='{"aws_secret_access_key": "s3cr3t"}')
    shown = build_definitions(load_settings()).get_repository_def().get_top_level_resources()["lake"]
    assert "s3cr3t" not in f"{shown.description} {shown.config_schema.as_field().default_provided}"
    assert "fake" in (shown.description or "")
