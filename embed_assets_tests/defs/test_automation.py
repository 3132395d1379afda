"""What the automation condition requests, in every case in which Dagster's own conditions were tried."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from embed_assets.definitions import build_definitions
from embed_assets.defs.automation import Attempt
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import ASSETS, CODE_TAG, PERMANENT_FAILURE_TAG
from embed_assets.defs.staleness import Status
from embed_assets.settings import load_settings
from embed_assets_tests.conftest import Project, topic
from embed_assets_tests.defs.dagster_runs import definitions, run, run_range
from embed_assets_tests.engine.models import small_model

Requested = dict[str, set[str]]


class Ticker:
    """Evaluates the condition as the sensor does, tick after tick."""

    def __init__(self, project: Project, instance: dg.DagsterInstance) -> None:
        self.project, self.instance = project, instance
        self.cursor: object = None

    def __call__(self) -> Requested:
        """One tick: the requested partitions by asset; assets without any are left out."""
        self.project.json("discover")
        result = dg.evaluate_automation_conditions(definitions(), self.instance, cursor=self.cursor)  # type: ignore[arg-type]
        self.cursor = result.cursor
        found = {asset: set(result.get_requested_partitions(dg.AssetKey(asset)) or ()) for asset in ASSETS}
        return {asset: {str(key) for key in keys} for asset, keys in found.items() if keys}

    def make(self, *keys: str, assets: tuple[str, ...] = ASSETS) -> None:
        for key in keys:
            assert run(self.instance, key, *assets).success

    def forget_cursor(self) -> None:
        self.cursor = None


def of(keys: str, *assets: str) -> Requested:
    return {asset: set(keys) for asset in assets}


@pytest.fixture
def ticker(project: Project) -> Iterator[Ticker]:
    for key in "abc":
        project.write(f"{key}/one.md", f"# One of {key}\n\n{topic('try')}")
    with open_instance() as instance:
        yield Ticker(project, instance)


def test_a_backlog_is_requested_at_every_tick_until_it_is_materialized(ticker: Ticker) -> None:
    assert ticker() == of("abc", *ASSETS)
    assert ticker() == of("abc", *ASSETS)
    ticker.make("a")
    assert ticker() == of("bc", *ASSETS)


def test_documents_read_before_the_first_tick(ticker: Ticker) -> None:
    ticker.project.json("discover")
    ticker.make("a", "b", "c", assets=("raw_documents",))
    assert ticker() == of("abc", "chunks", "embeddings")


def test_documents_read_between_two_ticks_and_a_new_partition(ticker: Ticker) -> None:
    ticker()
    ticker.make("a", "b", "c", assets=("raw_documents",))
    assert ticker() == of("abc", "chunks", "embeddings")
    assert ticker() == of("abc", "chunks", "embeddings")
    ticker.make("a", "b", "c")
    assert ticker() == {}
    ticker.project.write("d/one.md", "New.")
    assert ticker() == of("d", *ASSETS)
    ticker.make("d", assets=("raw_documents",))
    assert ticker() == of("d", "chunks", "embeddings")


def test_touched_files_are_read_again_and_nothing_else_runs(ticker: Ticker) -> None:
    ticker.project.sync()
    assert ticker() == {}
    os.utime(ticker.project.landing / "a/one.md", (1, 1))
    assert ticker() == of("a", "raw_documents")
    ticker.make("a", assets=("raw_documents",))
    assert ticker() == {}


def test_an_edit_goes_through_all_assets_in_one_run(ticker: Ticker) -> None:
    ticker.project.sync()
    ticker()
    ticker.project.write("a/one.md", "Something else.")
    assert ticker() == of("a", *ASSETS)


def test_new_documents_read_manually(ticker: Ticker) -> None:
    ticker.project.sync()
    ticker()
    ticker.project.write("a/one.md", "Something else.")
    ticker.project.json("discover")
    ticker.make("a", assets=("raw_documents",))
    assert ticker() == of("a", "chunks", "embeddings")
    ticker.make("a")
    assert ticker() == {}


def test_changed_code_is_noticed_for_every_partition_also_without_a_cursor(ticker: Ticker) -> None:
    ticker.project.sync()
    assert ticker() == {}
    ticker.project.set(CHUNK_TOKENS="100")
    assert ticker() == of("abc", "chunks")
    ticker.forget_cursor()
    assert ticker() == of("abc", "chunks")
    assert ticker() == of("abc", "chunks")
    ticker.make("a", assets=("chunks",))
    assert ticker() == of("bc", "chunks") | of("a", "embeddings")
    ticker.project.sync()
    ticker.project.set(MODEL="fake:16@other")
    assert ticker() == of("abc", "embeddings")


def test_unchanged_chunks_are_not_embedded_again(ticker: Ticker) -> None:
    for key in "abc":
        ticker.project.write(f"{key}/one.md", "Short.")
    ticker.project.sync()
    ticker.project.set(CHUNK_TOKENS="100")
    ticker.make("a", assets=("chunks",))
    assert ticker() == of("bc", "chunks")


def test_a_failure_is_not_repeated_until_code_or_data_changes(ticker: Ticker) -> None:
    project, instance = ticker.project, ticker.instance
    project.sync()
    damaged = next((project.root / "lake/embeddings").glob("*/partition_key=b/*.parquet"))
    damaged.write_bytes(b"damaged")
    project.write("b/one.md", "Edited.")
    assert ticker() == of("b", *ASSETS)
    assert not run(instance, "b").success
    assert ticker() == {}
    ticker.forget_cursor()
    assert ticker() == {}
    project.write("b/one.md", "Edited again.")
    assert ticker() == of("b", *ASSETS)
    assert not run(instance, "b").success
    assert ticker() == {}
    project.set(CHUNK_TOKENS="100")
    assert ticker()["chunks"] == set("abc")
    project.set(CHUNK_TOKENS="auto")
    project.json("verify", "--repair", exit_code=1)
    project.sync()
    assert ticker() == {}


def test_many_scattered_partitions_are_requested_with_the_fresh_ones_between(project: Project) -> None:
    """Dagster makes a run of each range of adjacent partitions, with a process and a model of its own."""
    for i in range(14):
        project.write(f"p{i:02}/a.txt", f"text {i}")
    project.sync()
    with open_instance() as instance:
        ticker = Ticker(project, instance)
        assert ticker() == {}
        for i in (1, 5, 9):
            project.write(f"p{i:02}/a.txt", f"a longer text {i}")
        assert ticker()["embeddings"] == {"p01", "p05", "p09"}
        ticker.forget_cursor()
        for i in (3, 7, 11):
            project.write(f"p{i:02}/a.txt", f"a longer text {i}")
        assert ticker() == {asset: {f"p{i:02}" for i in range(1, 12)} for asset in ASSETS}
        assert run_range(instance, "p01", "p11").success
        assert ticker() == {}


def test_a_run_that_crashed_before_it_began_is_not_requested_forever(ticker: Ticker) -> None:
    ticker.project.json("discover")
    job = definitions().resolve_implicit_global_asset_job_def()
    crashed = ticker.instance.create_run_for_job(job, tags={"dagster/partition": "a"})
    ticker.instance.report_run_failed(crashed, "the node died")
    assert ticker() == of("bc", *ASSETS)
    ticker.project.write("a/two.md", "A new one.")
    assert ticker() == of("abc", *ASSETS)


def test_transient_failures_are_retried_after_an_hour() -> None:
    code = "the code"
    stale, missing = Status("stale"), Status("missing")

    def is_worth(run_status: dg.DagsterRunStatus, status: Status = stale, ago: float = 10, **tags: str) -> bool:
        run = dg.DagsterRun("job", status=run_status, tags={CODE_TAG: code} | tags)
        ended = datetime(2026, 1, 1, tzinfo=UTC)
        record = dg.RunRecord(1, run, ended, ended, end_time=ended.timestamp())
        return Attempt(1, run.run_id, record).may_retry(status, code, ended.timestamp() + ago)

    states = dg.DagsterRunStatus
    assert not is_worth(states.FAILURE)
    assert is_worth(states.FAILURE, ago=3601)
    assert not is_worth(states.FAILURE, ago=3601, **{PERMANENT_FAILURE_TAG: "true"})
    assert is_worth(states.FAILURE, **{PERMANENT_FAILURE_TAG: "true", CODE_TAG: "another code"})
    assert not is_worth(states.CANCELED, ago=3601)
    assert not is_worth(states.SUCCESS, ago=3601)
    assert is_worth(states.SUCCESS, missing)


def test_a_canceled_run_is_not_started_again(ticker: Ticker) -> None:
    ticker.project.json("discover")
    job = definitions().resolve_implicit_global_asset_job_def()
    canceled = ticker.instance.create_run_for_job(job, tags={"dagster/partition": "a"})
    ticker.instance.report_run_canceled(canceled)
    assert ticker() == of("bc", *ASSETS)


def test_a_lost_lake_is_rebuilt(ticker: Ticker) -> None:
    ticker.project.sync()
    assert ticker() == {}
    shutil.rmtree(ticker.project.root / "lake")
    assert ticker() == of("abc", *ASSETS)


def test_a_reported_partition_is_not_requested_endlessly(ticker: Ticker) -> None:
    ticker.project.sync()
    ticker.instance.report_runless_asset_event(dg.AssetMaterialization("raw_documents", partition="a"))
    assert ticker() == of("a", "chunks", "embeddings")
    ticker.make("a", assets=("chunks", "embeddings"))
    assert ticker() == {}


def test_an_int8_model_created_later_is_picked_up(ticker: Ticker, tmp_path: Path) -> None:
    ticker.project.set(MODEL=str(small_model(tmp_path / "small", "bert")), PRECISION="int8")
    condition = build_definitions(load_settings())  # built before there is an int8 model, as in a code server
    assert ticker.project.sync()["embedded"] > 0
    result = dg.evaluate_automation_conditions(condition, ticker.instance)
    assert result.total_requested == 0


def test_partitions_in_progress_are_not_requested(ticker: Ticker) -> None:
    ticker.project.json("discover")
    job = definitions().resolve_implicit_global_asset_job_def()
    under_way = ticker.instance.create_run_for_job(job, tags={"dagster/partition": "a"})
    ticker.instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_START", job_name=under_way.job_name), under_way.run_id
    )
    assert ticker() == of("bc", *ASSETS)


def test_the_sensors_are_on_by_default() -> None:
    sensors = {sensor.name: sensor for sensor in definitions().sensors or ()}
    assert sorted(sensors) == ["arrivals", "unsynced"]
    assert {sensor.default_status for sensor in sensors.values()} == {dg.DefaultSensorStatus.RUNNING}  # type: ignore[union-attr]
