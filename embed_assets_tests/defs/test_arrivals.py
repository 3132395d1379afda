"""The arrivals sensor: what it registers and observes, when it waits, and which failures it survives."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator

import dagster as dg
import pytest

from embed_assets.definitions import definitions_over
from embed_assets.defs import arrivals
from embed_assets.defs.arrivals import Cursor, observe_arrivals, seconds_until_settled, wait_until_settled
from embed_assets.defs.discovery import list_partitions
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import AUTOMATED_TAG, Names
from embed_assets.defs.staleness import Record
from embed_assets_tests.conftest import Project
from embed_assets_tests.defs.dagster_runs import definitions


class Ticker:
    """Ticks the sensor at chosen times and applies its result as Dagster's daemon does."""

    def __init__(self, project: Project, instance: dg.DagsterInstance) -> None:
        self.project, self.instance = project, instance
        self.cursor: str | None = None
        self.known: dict[str, Record] = {}
        self.now = time.time() + 1_000

    def __call__(self, later: float = 10) -> tuple[set[str], set[str]]:
        """(partitions added, partitions observed)."""
        self.now += later
        result = observe_arrivals(self.instance, self.project.pipeline(), self.cursor, self.now, self.known)
        self.cursor = result.cursor
        self.reason = result.skip_reason.skip_message if result.skip_reason else ""
        added: set[str] = set()
        for request in result.dynamic_partitions_requests or ():
            self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
            added |= set(request.partition_keys)
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)
        return added, {str(event.partition) for event in result.asset_events}


@pytest.fixture
def tick(project: Project) -> Iterator[Ticker]:
    with open_instance() as instance:
        yield Ticker(project, instance)


def test_new_changed_touched_and_emptied_partitions(tick: Ticker) -> None:
    project = tick.project
    one = project.write("a/one.md", "One.")
    project.write("b/one.md", "One.")
    assert tick() == ({"a", "b"}, {"a", "b"})
    assert tick() == (set(), set())
    assert "nothing changed" in tick.reason
    project.write("c/one.md", "One.")
    assert tick() == ({"c"}, {"c"})
    os.utime(one, (1, 1))
    assert tick() == (set(), {"a"})
    shutil.rmtree(project.landing / "b")
    assert tick() == (set(), {"b"})
    assert tick() == (set(), set())
    project.write("b/one.md", "One, back.")
    assert tick() == (set(), {"b"})


def test_files_being_written_are_ignored_until_they_settle(tick: Ticker) -> None:
    tick.project.write("a/one.md", "One.")
    tick.project.write("b/half.md", "Ha")
    tick.now = time.time()
    tick.now -= 10
    assert tick(10) == (set(), set())
    assert "being written to: a, b" in tick.reason
    assert tick(6) == ({"a", "b"}, {"a", "b"})
    half = tick.project.write("b/half.md", "Half of it")
    os.utime(half, (tick.now - 1, tick.now - 1))
    assert tick(1) == (set(), set())
    os.utime(half, (tick.now + 2, tick.now + 2))
    assert tick(5) == (set(), set())
    assert tick(10) == (set(), {"b"})


def test_a_file_that_never_settles_is_taken_eventually(tick: Ticker) -> None:
    log = tick.project.write("a/log.md", "Line.")
    found = []
    for _ in range(8):
        tick.now += 9
        os.utime(log, (tick.now, tick.now))
        found.append(tick(1))
    assert found[0] == (set(), set())
    assert [observed for _, observed in found].count({"a"}) == 1


def test_an_unreachable_source_is_a_skipped_tick(tick: Ticker) -> None:
    tick.project.write("a/one.md", "One.")
    assert tick() == ({"a"}, {"a"})
    tick.project.landing.rename(tick.project.root / "elsewhere")
    assert tick() == (set(), set())
    assert "the source must be an existing folder" in tick.reason
    (tick.project.root / "elsewhere").rename(tick.project.landing)
    assert tick() == (set(), set())
    assert "nothing changed" in tick.reason


def test_an_empty_source_is_believed_only_after_a_minute(tick: Ticker) -> None:
    tick.project.write("a/one.md", "One.")
    tick()
    shutil.rmtree(tick.project.landing / "a")
    for _ in range(6):
        assert tick() == (set(), set())
        assert "is empty: recorded as such after 60 s" in tick.reason
    assert tick() == (set(), {"a"})


@pytest.mark.long
def test_partitions_per_tick_are_bounded(tick: Ticker, monkeypatch: pytest.MonkeyPatch) -> None:
    tick.project.set(PARTITION_BY="file")
    for i in range(1_300):
        tick.project.write(f"doc{i}.md", "x")
    added, observed = tick()
    assert len(added) == len(observed) == 1_000
    added, observed = tick()
    assert len(added) == len(observed) == 300
    assert tick() == (set(), set())


def test_a_source_that_takes_long_to_list_is_listed_less_often(tick: Ticker) -> None:
    tick.project.write("a/one.md", "One.")
    tick()
    cursor = arrivals.Cursor(listed_at=tick.now, listing_seconds=3.0)
    tick.cursor = cursor.dumps()
    assert tick(20) == (set(), set())
    assert "listing takes 3.0 s" in tick.reason
    tick(11)
    assert "listing takes" not in tick.reason


def test_times_in_the_future_are_ignored(project: Project) -> None:
    os.utime(project.write("a/one.md", "One."), (4e9, 4e9))
    (partition,) = project.pipeline().corpus.source.partitions().values()
    assert seconds_until_settled(partition, 5, time.time()) == 0
    assert seconds_until_settled(partition, 5, 4e9 + 2) == 3


def test_an_automated_run_does_not_believe_an_empty_source(project: Project) -> None:
    """A disk may not be mounted: the rows stay until a person confirms that the source is empty."""
    project.write("a/one.md", "One.")
    project.sync()
    shutil.rmtree(project.landing / "a")
    with open_instance() as instance:
        impatient = definitions_over(project.pipeline(), retries=dg.RetryPolicy(max_retries=0))
        job = impatient.resolve_implicit_global_asset_job_def()
        tags = {"dagster/partition": "a", AUTOMATED_TAG: "true"}
        result = job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)
        assert not result.success
        failure = next(event for event in result.all_events if event.is_step_failure)
        assert "is empty, and 1 partitions hold documents of it" in str(failure.event_specific_data)
    assert len(project.rows("chunk_id")) == 1
    assert project.sync("--allow-empty")["dropped"] == 1
    assert project.rows("chunk_id") == []


def test_an_automated_run_waits_for_files_to_settle(project: Project) -> None:
    project.set(SETTLE_SECONDS="3000")
    file = project.write("a/one.md", "Half")
    slept: list[float] = []
    assert list(wait_until_settled(project.pipeline(), ["b"], slept.append)) == ["a"]
    assert slept == []  # the file being written belongs to another partition
    wait_until_settled(project.pipeline(), ["a"], slept.append)
    assert len(slept) == 3 and all(0 < seconds <= 3000 for seconds in slept)  # it never settles
    slept.clear()

    def settle(seconds: float) -> None:
        slept.append(seconds)
        os.utime(file, (1, 1))

    assert wait_until_settled(project.pipeline(), ["a"], settle)["a"].files[0].modified_at.year == 1970
    assert len(slept) == 1


def test_the_sensor_as_dagster_calls_it(project: Project) -> None:
    project.write("a/one.md", "One.")
    os.utime(project.landing / "a/one.md", (1, 1))
    sensor = next(s for s in definitions().sensors or () if s.name == "arrivals")
    with open_instance() as instance:
        result = sensor(dg.build_sensor_context(instance=instance))  # type: ignore[operator]
        assert [event.partition for event in result.asset_events] == ["a"]
        state = Cursor.loads(result.cursor, time.time())
        state.listing_seconds = 0.0  # on a busy machine it was long, so the next listing would not be due yet
        again = sensor(dg.build_sensor_context(instance=instance, cursor=state.dumps()))  # type: ignore[operator]
        assert [event.partition for event in again.asset_events] == ["a"]  # the first result was not applied


def test_forget_drops_a_partition_whose_files_are_gone(project: Project) -> None:
    for key in "ab":
        project.write(f"{key}/one.md", f"One of {key}.")
        project.write(f"{key}/photo.png", "no text")
    project.sync()
    project.set(MODEL="fake:16@other")
    project.sync()
    refused = project.run("forget", "a")
    assert refused.exit_code == 1
    assert "must have no files in the source, 'a' has 2; remove them" in refused.stderr.replace("\n", " ")
    shutil.rmtree(project.landing / "a")
    assert project.json("forget", "a") == {"partition_key": "a", "tables": 5}
    for table in ("embeddings", "raw_documents", "rejected_documents", "chunks"):
        assert {row["partition_key"] for row in project.rows("partition_key", table=table)} == {"b"}
    project.set(MODEL="fake:16")
    assert {row["partition_key"] for row in project.rows("partition_key")} == {"b"}
    assert [row["partition_key"] for row in project.json("plan")["partitions"]] == ["b"]
    assert "there is no partition 'a'" in project.run("forget", "a").stderr
    project.write("a/one.md", "One of a.")
    assert project.sync()["partitions"]["a"]["embedded"] == 1


def test_partitions_without_files_are_listed_too(project: Project) -> None:
    project.write("a/one.md", "One.")
    with open_instance() as instance:
        instance.add_dynamic_partitions("corpus", ["gone"])
        found = list_partitions(instance, project.pipeline().corpus.source, Names())
    assert {key: len(partition.files) for key, partition in found.items()} == {"a": 1, "gone": 0}


def test_a_clock_set_back_does_not_stop_the_sensor(tick: Ticker) -> None:
    tick.project.write("a/one.md", "One.")
    assert tick() == ({"a"}, {"a"})
    year = 365 * 24 * 3600.0
    ahead = tick.now + year
    tick.cursor = Cursor(ahead, 30.0, ahead, {"a": ahead}).dumps()
    tick.project.write("b/one.md", "One.")
    assert tick() == ({"b"}, {"b"})


@pytest.mark.parametrize("cursor", ["garbage", "[]", '{"unknown": 1}'])
def test_an_unreadable_cursor_is_ignored(tick: Ticker, cursor: str) -> None:
    tick.project.write("a/one.md", "One.")
    tick.cursor = cursor
    assert tick() == ({"a"}, {"a"})


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Pacific/Apia"])
def test_daylight_saving_changes_make_nothing_stale(project: Project, zone: str) -> None:
    """File times around a daylight saving change are the same times in the local zone and in UTC."""
    changes = [1761440400 + 600 * i for i in range(-12, 12)]  # 2025-10-26 01:00 UTC
    for i, at in enumerate(changes):
        os.utime(project.write(f"a/{i}.md", f"Text {i}."), (at, at))
    project.sync()
    version = project.pipeline().corpus.source.partitions()["a"].version
    project.monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert project.pipeline().corpus.source.partitions()["a"].version == version
        assert project.sync()["partitions"]["a"]["state"] == "fresh"
        times = {row["modified_at"].timestamp() for row in project.rows("modified_at", table="raw_documents")}
        assert times == set(map(float, changes))
    finally:
        project.monkeypatch.delenv("TZ")
        time.tzset()
