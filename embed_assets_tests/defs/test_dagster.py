"""The assets in real Dagster instances: runs, events, versions, metadata."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
from collections.abc import Iterator

import dagster as dg
import pytest
from PIL import Image

from embed_assets.definitions import build_definitions
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import ASSETS, Names
from embed_assets.settings import load_settings
from embed_assets_tests.conftest import Project, topic
from embed_assets_tests.defs.dagster_runs import (
    DAGSTER,
    dagster_says,
    definitions,
    events,
    latest,
    materialize,
    run,
    run_range,
    we_say,
)


@pytest.fixture
def instance(project: Project) -> Iterator[dg.DagsterInstance]:
    with open_instance() as opened:
        yield opened


def test_the_asset_graph_is_unchanged() -> None:
    definitions = build_definitions(load_settings())
    graph = definitions.resolve_asset_graph()
    keys = {key.to_user_string(): graph.get(key) for key in graph.get_all_asset_keys()}
    assert sorted(keys) == ["active_embeddings", "chunks", "embeddings", "raw_documents", "source_files"]
    assert {name: sorted(p.to_user_string() for p in node.parent_keys) for name, node in keys.items()} == {
        "source_files": [],
        "raw_documents": ["source_files"],
        "chunks": ["raw_documents"],
        "embeddings": ["chunks", "raw_documents"],
        "active_embeddings": ["embeddings"],
    }
    for name, node in keys.items():
        assert node.description, name
        assert node.group_name == "corpus"
        assert node.owners
        assert node.kinds
        assert node.is_materializable == (name != "source_files")
        is_table = name not in ("source_files", "active_embeddings")
        assert not is_table or (node.code_version and node.metadata["dagster/column_schema"])


def test_materialize_on_the_command_line_then_a_cheap_no_op(project: Project) -> None:
    project.write("a/try.rst", topic("try"))
    project.write("b/with.rst", topic("with"))
    project.json("discover")
    done = materialize("--partition", "a")
    assert done.returncode == 0, done.stderr
    assert {r["partition_key"] for r in project.rows("partition_key")} == {"a"}
    plan = {r["partition_key"]: r["assets"]["embeddings"]["state"] for r in project.json("plan")["partitions"]}
    assert plan == {"a": "fresh", "b": "missing"}
    versions = sorted((project.root / "lake").rglob("_delta_log/*.json"))
    assert materialize("--partition", "a").returncode == 0
    assert sorted((project.root / "lake").rglob("_delta_log/*.json")) == versions


def test_a_range_run_gives_each_partition_its_own_version_and_names_those_that_fail(project: Project) -> None:
    for key in "abc":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.sync()
    with open_instance() as instance:
        before = {key: latest(instance, "chunks", key).tags for key in "abc"}
    assert len({tags["dagster/data_version"] for tags in before.values() if tags}) == 3
    for key in "abc":
        project.write(f"{key}/one.md", f"Another of {key}.")
    next((project.root / "lake/embeddings").glob("*/partition_key=b/*.parquet")).write_bytes(b"damaged")
    done = materialize("--partition-range", "a...c")
    assert done.returncode == 1
    assert "1 of 3 partitions failed" in done.stderr + done.stdout
    with open_instance() as instance:
        for key in "ac":
            assert dagster_says(instance, key)[key] == dict.fromkeys(ASSETS, "fresh")
        assert dagster_says(instance, "b")["b"]["embeddings"] == "stale"
        statuses = instance.get_status_by_partition(dg.AssetKey("embeddings"), ["a", "b", "c"], _partitions())
        assert statuses is not None
        assert {k: v.value for k, v in statuses.items() if v} == {
            "a": "MATERIALIZED",
            "b": "FAILED",
            "c": "MATERIALIZED",
        }


def _partitions() -> dg.DynamicPartitionsDefinition:
    return Names().partitions


def test_our_states_match_dagsters(
    project: Project, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree(key: str = "a") -> dict[str, str]:
        project.json("discover")
        ours = we_say(instance, key)
        assert ours == dagster_says(instance, key)
        return ours[key]

    file = project.write("a/try.rst", topic("try"))
    assert agree() == dict.fromkeys(ASSETS, "missing")
    project.sync()
    assert agree() == dict.fromkeys(ASSETS, "fresh")
    os.utime(file, (1, 1))
    assert agree() == {"raw_documents": "stale", "chunks": "fresh", "embeddings": "fresh"}
    assert run(instance, "a", "raw_documents").success
    assert agree() == dict.fromkeys(ASSETS, "fresh")
    project.write("a/try.rst", topic("with"))
    assert run(instance, "a", "raw_documents").success
    assert agree() == {"raw_documents": "fresh", "chunks": "stale", "embeddings": "stale"}
    assert run(instance, "a", "chunks").success
    assert agree() == {"raw_documents": "fresh", "chunks": "fresh", "embeddings": "stale"}
    assert run(instance, "a").success
    assert agree() == dict.fromkeys(ASSETS, "fresh")
    project.set(CHUNK_TOKENS="100")
    assert agree() == {"raw_documents": "fresh", "chunks": "stale", "embeddings": "fresh"}
    project.set(MODEL="fake:16@other")
    assert agree()["embeddings"] == "stale"
    project.sync()
    assert agree() == dict.fromkeys(ASSETS, "fresh")


def test_assets_that_need_not_run_are_not_recorded_again(project: Project, instance: dg.DagsterInstance) -> None:
    file = project.write("a/try.rst", topic("try"))
    project.sync()
    counts = {asset: events(instance, asset) for asset in ASSETS}
    os.utime(file, (1, 1))
    project.sync()
    after = {asset: events(instance, asset) for asset in ASSETS}
    assert after == counts | {"raw_documents": counts["raw_documents"] + 1}


def test_metadata(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/try.rst", topic("try"))
    project.write("a/photo.png", "no text")
    project.sync()
    values = {name: value.value for name, value in latest(instance, "embeddings", "a").metadata.items()}
    wanted = (
        "documents rejected chunks embedded reused dropped tokens tokens_per_second padding_percent device precision"
    )
    assert set(wanted.split()) | {"max_batch_tokens", "peak_memory_bytes", "table_version"} <= values.keys()
    assert (values["documents"], values["rejected"]) == (1, 1)
    assert values["chunks"] == values["embedded"] == values["dagster/partition_row_count"] > 5
    assert values["peak_memory_bytes"] > 10_000_000
    for asset in ASSETS:
        assert (
            set(wanted.split()) | {"max_batch_tokens", "table_version"} <= latest(instance, asset, "a").metadata.keys()
        )
    raw = {name: value.value for name, value in latest(instance, "raw_documents", "a").metadata.items()}
    assert (raw["documents"], raw["rejected"], raw["table_version"]) == (1, 1, 1)


def test_runs_of_sync_appear_in_dagster(project: Project, instance: dg.DagsterInstance) -> None:
    for key in "abc":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.sync()
    assert [run.status for run in instance.get_runs()] == [dg.DagsterRunStatus.SUCCESS]
    assert latest(instance, "embeddings", "b").partition == "b"
    assert instance.get_materialized_partitions(dg.AssetKey("embeddings")) == {"a", "b", "c"}


def test_an_asset_without_its_inputs_says_what_to_select(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/one.md", "One.")
    project.json("discover")
    result = run(instance, "a", "chunks")
    assert not result.success
    failure = next(e for e in result.all_events if e.is_step_failure).step_failure_data
    assert failure.error is not None
    assert "needs raw_documents, which was never materialized; select it as well" in str(failure)


def test_downstream_assets_in_the_same_run_are_materialized(project: Project, instance: dg.DagsterInstance) -> None:
    for key in "ab":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.json("discover")

    @dg.asset(deps=["embeddings"], partitions_def=_partitions(), backfill_policy=dg.BackfillPolicy.single_run())
    def downstream() -> None: ...

    definitions = dg.Definitions.merge(build_definitions(load_settings()), dg.Definitions(assets=[downstream]))
    job = definitions.resolve_implicit_global_asset_job_def()
    tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "b"}
    assert job.execute_in_process(instance=instance, tags=tags).success
    assert instance.get_materialized_partitions(dg.AssetKey("downstream")) == {"a", "b"}
    for key in "ab":
        assert dagster_says(instance, key)[key] == dict.fromkeys(ASSETS, "fresh")


def test_validate_and_list_as_dagster_does() -> None:
    for command in ("definitions validate", "asset list"):
        arguments = [str(DAGSTER), *command.split(), "-m", "embed_assets.definitions"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_plan_is_a_job_in_the_ui(project: Project, instance: dg.DagsterInstance) -> None:
    for key in "abc":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.sync("--partition", "a")
    project.write("b|x/one.md", "Odd.")
    job = definitions().resolve_job_def("plan")
    result = job.execute_in_process(instance=instance)
    (output,) = [event for event in result.all_events if event.is_successful_output]
    metadata = {name: value.value for name, value in output.step_output_data.metadata.items()}
    assert (metadata["partitions_to_make"], metadata["chunks_to_embed"]) == (3, 3)
    assert "3 of 4 partitions are missing or stale." in metadata["plan"]
    assert "| b\\|x | never materialized | 1 | 0 | 0 |" in metadata["plan"]
    project.sync()
    result = job.execute_in_process(instance=instance)
    (output,) = [event for event in result.all_events if event.is_successful_output]
    assert output.step_output_data.metadata["plan"].value == "All 4 partitions are fresh."


def test_asset_pages_show_a_summary_plots_and_lineage(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/try.rst", topic("try") + topic("import") + topic("class"))
    project.write("b/with.rst", topic("with"))
    project.sync()
    pictured = latest(instance, "embeddings", "a").metadata
    assert not {"token_lengths", "map"} & latest(instance, "embeddings", "b").metadata.keys()  # it has only four chunks
    project.write("a/new.md", "A new document.")
    project.sync()
    found = {asset: latest(instance, asset, "a").metadata for asset in ASSETS}
    assert not {"token_lengths", "map"} & found["embeddings"].keys()  # they would look the same
    summary = str(found["embeddings"]["summary"].value)
    assert summary.startswith("**Why:** chunks changed; raw_documents changed.")
    assert "texts embedded" in summary and "vectors reused" in summary and "one commit" in summary
    assert "source files changed" in str(found["raw_documents"]["summary"].value)
    for name in ("token_lengths", "map"):
        encoded = re.fullmatch(r"!\[[\w ]+\]\(data:image/png;base64,([\w+/=]+)\)", str(pictured[name].value))
        assert encoded
        picture = Image.open(io.BytesIO(base64.b64decode(encoded.group(1))))
        assert picture.size == (690, 285)
        assert len(set(picture.convert("L").tobytes())) > 2
    rows = {key: latest(instance, "embeddings", key).metadata["dagster/partition_row_count"].value for key in "ab"}
    assert found["embeddings"]["dagster/row_count"].value == sum(rows.values()) == len(project.rows("chunk_id"))  # type: ignore[arg-type]
    graph = definitions().resolve_asset_graph()
    lineage = graph.get(dg.AssetKey("embeddings")).metadata["dagster/column_lineage"]
    assert lineage.deps_by_column["embedding"] == [dg.TableColumnDep(dg.AssetKey("chunks"), "text")]
    for asset in ASSETS:
        metadata = graph.get(dg.AssetKey(asset)).metadata
        columns = {column.name for column in metadata["dagster/column_schema"].columns}
        assert set(metadata["dagster/column_lineage"].deps_by_column) <= columns
        assert {"dagster/table_name", "dagster/uri", "dagster/code_references"} <= metadata.keys()


def test_after_a_failed_run_only_its_unfinished_assets_are_recorded_again(
    project: Project, instance: dg.DagsterInstance
) -> None:
    for key in "abc":
        project.write(f"{key}/one.rst", topic("import") + topic("class") + topic("try"))
    project.sync()
    first = {asset: latest(instance, asset, "b") for asset in ASSETS}
    assert "map" in first["embeddings"].metadata
    project.write("a/two.md", "A second document.")
    [vectors] = (project.root / "lake/embeddings").glob("*/partition_key=c/*.parquet")
    vectors.write_bytes(b"damaged")
    project.write("c/two.md", "A second document.")
    project.json("discover")
    assert not run_range(instance, "a", "c").success
    assert [events(instance, asset) for asset in ASSETS] == [6, 6, 5]  # 3, a rebuilt, b rebuilt, c up to its chunks
    said = latest(instance, "embeddings", "b")
    assert "map" not in said.metadata and "summary" not in said.metadata
    assert said.tags == first["embeddings"].tags and "recorded again" in str(said.description)
    assert said.metadata["dagster/partition_row_count"] == first["embeddings"].metadata["dagster/partition_row_count"]
    assert set(we_say(instance, "b")["b"].values()) == set(dagster_says(instance, "b")["b"].values()) == {"fresh"}
    assert instance.get_materialized_partitions(dg.AssetKey("embeddings")) == {"a", "b", "c"}
