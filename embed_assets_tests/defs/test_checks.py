"""Each asset check passes on a good table, fails on one damaged on purpose, and counts per partition."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from embed_assets.defs.checks import FRESHNESS
from embed_assets.defs.instance import open_instance
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, TableSpec, partition_predicate
from embed_assets.stages.checks import CHECKS
from embed_assets.stages.gates import GATES
from embed_assets_tests.conftest import Project, Shelf, topic
from embed_assets_tests.defs.dagster_runs import definitions, run, run_range

ALL = {(check.asset, check.name) for check in CHECKS} | {("embeddings", FRESHNESS)}
Rows = list[dict[str, Any]]


def fill(project: Project) -> None:
    for key in "ab":
        project.write(f"{key}/try.rst", topic("try"))
        project.write(f"{key}/with.rst", topic("with"))
    project.sync()


@pytest.fixture
def project(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Two partitions of two documents, embedded once."""
    return shelf.take("checks", fill, monkeypatch)


@pytest.fixture
def instance(project: Project) -> Iterator[dg.DagsterInstance]:
    with open_instance() as opened:
        yield opened


def answers(instance: dg.DagsterInstance, key: str) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    """The latest result of every check of a partition."""
    found = {}
    for asset, name in ALL:
        check = dg.AssetCheckKey(dg.AssetKey(asset), name)
        records = instance.event_log_storage.get_asset_check_execution_history(check, limit=50)
        evaluations = [record.event.dagster_event.event_specific_data for record in records if record.event]  # type: ignore[union-attr]
        found[asset, name] = next(e for e in evaluations if getattr(e, "partition", None) == key)
    return found  # type: ignore[return-value]


def ask(instance: dg.DagsterInstance, *keys: str) -> None:
    """Run only the checks."""
    selection = dg.AssetSelection.all_asset_checks()
    job = dg.Definitions.merge(definitions(), dg.Definitions(jobs=[dg.define_asset_job("ask", selection)]))
    for key in keys:
        assert job.resolve_job_def("ask").execute_in_process(instance=instance, tags={"dagster/partition": key}).success


def failing(instance: dg.DagsterInstance, key: str) -> set[str]:
    ask(instance, key)
    return {name for (_, name), evaluation in answers(instance, key).items() if not evaluation.passed}


def rewrite(project: Project, table: TableSpec, key: str, change: Callable[[Rows], Rows]) -> None:
    """Replace a partition's rows behind the pipeline's back."""
    from deltalake import write_deltalake

    lake = project.pipeline().lake
    rows = [r for b in Snapshot(lake).partition(key).rows(table, table.schema.names) for r in b.to_pylist()]
    changed = pa.Table.from_pylist(change(rows), schema=table.schema)
    write_deltalake(lake.uri(table), changed, mode="overwrite", predicate=partition_predicate(key))


def test_every_partition_has_a_result_of_every_check(instance: dg.DagsterInstance, project: Project) -> None:
    for key in "ab":
        found = answers(instance, key)
        assert set(found) == ALL
        assert all(evaluation.passed for evaluation in found.values())
    blocking = {name for (_, name), e in answers(instance, "a").items() if e.blocking}
    assert blocking == {"coverage", "vectors"}
    project.write("a/three.md", "Three.")
    assert run_range(instance, "a", "b").success
    assert answers(instance, "a")["chunks", "coverage"].metadata["documents"].value == 3
    assert answers(instance, "b")["chunks", "coverage"].metadata["documents"].value == 2


def first_vector(value: Callable[[list[float]], list[float]]) -> Callable[[Rows], Rows]:
    return lambda rows: [rows[0] | {"embedding": value(rows[0]["embedding"])}, *rows[1:]]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[1:],
        lambda rows: [*rows, rows[0]],
        lambda rows: [*rows, rows[0] | {"chunk_id": "0" * 32}],
        lambda rows: [rows[0] | {"text": "another"}, *rows[1:]],
        first_vector(lambda vector: [float("nan"), *vector[1:]]),
        first_vector(lambda vector: [2 * x for x in vector]),
        first_vector(lambda vector: [0.0 for _ in vector]),
    ],
    ids=["missing", "duplicated", "extra", "other text", "nan", "not unit norm", "zero"],
)
def test_damaged_vectors_fail(instance: dg.DagsterInstance, project: Project, change: Callable[[Rows], Rows]) -> None:
    rewrite(project, project.pipeline().embeddings_table, "a", change)
    # Rows that something else replaced are not fresh any more either.
    assert failing(instance, "a") - {FRESHNESS} == {"vectors"}
    assert failing(instance, "b") == set()
    assert not project.json("verify", "--repair", exit_code=1)["ok"]
    project.sync()
    assert failing(instance, "a") == set()


def test_chunks_with_missing_text_fail(instance: dg.DagsterInstance, project: Project) -> None:
    rewrite(project, CHUNK_TABLE, "a", lambda rows: sorted(rows, key=lambda r: r["chunk_index"])[1:])
    assert "coverage" in failing(instance, "a")
    assert "characters of" in answers(instance, "a")["chunks", "coverage"].description  # type: ignore[operator]


def test_chunks_of_deleted_documents_fail(instance: dg.DagsterInstance, project: Project) -> None:
    rewrite(project, RAW, "a", lambda rows: rows[1:])
    assert "coverage" in failing(instance, "a")
    assert "1 documents with chunks are gone" in answers(instance, "a")["chunks", "coverage"].description  # type: ignore[operator]


def test_shares_over_their_limits_fail(instance: dg.DagsterInstance, project: Project) -> None:
    assert failing(instance, "a") == set()
    rewrite(project, CHUNK_TABLE, "a", lambda rows: [row | {"text_hash": "0" * 32} for row in rows])
    rewrite(
        project, project.pipeline().embeddings_table, "a", lambda rows: [row | {"is_truncated": True} for row in rows]
    )
    rewrite(project, RAW, "b", lambda rows: [])
    project.write("b/photo.png", "no text")
    run(instance, "b", "raw_documents")
    assert {"duplicate_share", "truncated_share"} <= failing(instance, "a")
    project.set(MAX_DUPLICATE_PERCENT="100", MAX_TRUNCATED_PERCENT="100")
    assert not {"duplicate_share", "truncated_share"} & failing(instance, "a")
    assert "rejected_share" in failing(instance, "b")
    assert "EMBED_MAX_REJECTED_PERCENT" in answers(instance, "b")["raw_documents", "rejected_share"].description  # type: ignore[operator]


def test_freshness_compares_with_the_current_source(instance: dg.DagsterInstance, project: Project) -> None:
    project.write("a/three.md", "Three.")
    assert failing(instance, "a") == {FRESHNESS}
    assert "raw_documents is stale: source files changed" in answers(instance, "a")["embeddings", FRESHNESS].description  # type: ignore[operator]
    project.sync()
    assert failing(instance, "a") == set()
    project.set(CHUNK_TOKENS="100")
    assert failing(instance, "a") == {FRESHNESS}


def test_a_blocking_check_stops_only_its_partition(instance: dg.DagsterInstance, project: Project) -> None:
    rewrite(project, CHUNK_TABLE, "a", lambda rows: rows[1:])
    # Someone reports the chunks as materialized in the UI.
    instance.report_runless_asset_event(dg.AssetMaterialization("chunks", partition="a"))
    project.set(MODEL="fake:16@other")
    failed = project.sync(exit_code=1)["partitions"]
    assert (failed["a"]["state"], failed["b"]["state"]) == ("failed", "materialized")
    assert "the check 'coverage' of chunks failed" in failed["a"]["error"]
    assert {row["partition_key"] for row in project.rows("partition_key")} == {"b"}
    project.json("verify", "--repair", exit_code=1)
    assert project.sync()["partitions"]["a"]["state"] == "materialized"


def test_checks_without_a_partition_cover_all_partitions(instance: dg.DagsterInstance, project: Project) -> None:
    rewrite(project, project.pipeline().embeddings_table, "b", lambda rows: rows[1:])
    job = dg.Definitions.merge(
        definitions(), dg.Definitions(jobs=[dg.define_asset_job("ask", dg.AssetSelection.all_asset_checks())])
    )
    project.json("discover")
    assert job.resolve_job_def("ask").execute_in_process(instance=instance, raise_on_error=False).success
    assert answers(instance, "a")["embeddings", "vectors"].passed
    assert not answers(instance, "b")["embeddings", "vectors"].passed


def recorded(instance: dg.DagsterInstance) -> int:
    """Number of check results in the event log."""
    kind = dg.DagsterEventType.ASSET_CHECK_EVALUATION
    return sum(len(instance.all_logs(run.run_id, of_type=kind)) for run in instance.get_runs())


def shown(instance: dg.DagsterInstance, key: str) -> set[str]:
    """The checks' latest results for a partition, as Dagster's pages show them."""
    found = set()
    for asset, name in ALL:
        check = dg.AssetCheckKey(dg.AssetKey(asset), name)
        [info] = instance.event_log_storage.get_asset_check_partition_info([check], partition_keys=[key])
        found.add(info.latest_execution_status.value)
    return found


def test_a_result_is_recorded_when_it_changes(instance: dg.DagsterInstance, project: Project) -> None:
    assert recorded(instance) == 14
    project.write("a/try.rst", topic("try") + topic("import"))
    project.sync()
    assert recorded(instance) == 17  # the number of chunks or tokens in the results of three shares differs
    os.utime(project.landing / "b/try.rst", (5, 5))
    project.sync()
    assert recorded(instance) == 17
    assert shown(instance, "a") == shown(instance, "b") == {"SUCCEEDED"}
    project.set(MAX_DUPLICATE_PERCENT="50", MAX_REJECTED_PERCENT="10")
    project.write("b/photo.png", "no text")
    project.sync()
    assert recorded(instance) == 18
    assert not answers(instance, "b")["raw_documents", "rejected_share"].passed
    assert shown(instance, "b") == {"SUCCEEDED", "FAILED"}


def test_a_check_planned_by_a_dead_run_is_evaluated_by_the_next_run(
    instance: dg.DagsterInstance, project: Project
) -> None:
    job = definitions().resolve_implicit_global_asset_job_def()
    instance.create_run_for_job(job, tags={"dagster/partition": "a"})  # its process died before its step began
    assert shown(instance, "a") == {"PLANNED"}
    project.write("a/try.rst", topic("try") + "\n\nOne paragraph more.")
    project.sync()
    assert shown(instance, "a") == {"SUCCEEDED"}


def test_manually_executed_checks_are_always_recorded(instance: dg.DagsterInstance) -> None:
    before = recorded(instance)
    ask(instance, "a")
    assert recorded(instance) == before + len(ALL) + len(GATES)


def test_a_failed_run_keeps_the_previous_results(instance: dg.DagsterInstance, project: Project) -> None:
    [vectors] = (project.root / "lake/embeddings").glob("*/partition_key=a/*.parquet")
    vectors.write_bytes(b"damaged")
    project.write("a/three.md", "Three.")
    project.sync(exit_code=1)
    assert shown(instance, "a") == {"SUCCEEDED"}
