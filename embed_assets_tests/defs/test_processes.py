"""The pool, runs whose process died, and retries."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import dagster as dg
import psutil
import pytest

from embed_assets.console import stderr
from embed_assets.corpus.source import SourcePartition
from embed_assets.definitions import definitions_over
from embed_assets.defs.assets import RETRIES
from embed_assets.defs.dagster_internals import free_slots, holders_of_full_pool, read_values, write_value
from embed_assets.defs.heartbeat import SILENT_SECONDS, HeartbeatMonitor, heartbeat
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import POOL
from embed_assets.defs.processes import PROCESS_TAG, end_dead_runs, this_process, wait_for_pool
from embed_assets.defs.sync import run_sync
from embed_assets.errors import LakeError, PartitionError, UserError, is_retryable
from embed_assets.lake.tables import Lake
from embed_assets.progress import ConsoleSink
from embed_assets.records import Document, Rejection
from embed_assets.stages.corpus import Corpus
from embed_assets_tests.conftest import Project
from embed_assets_tests.defs.dagster_runs import DAGSTER, RANGE, definitions, events, run


@pytest.fixture
def instance(project: Project) -> Iterator[dg.DagsterInstance]:
    with open_instance() as opened:
        yield opened


def slow_sync(project: Project) -> subprocess.Popen[str]:
    """A sync of at least two minutes, returned once its model is computing."""
    for key in "ab":
        project.write(f"{key}/rows.jsonl", "\n".join(json.dumps({"text": f"Row {i} of {key}."}) for i in range(600)))
    project.set(MODEL="fake:16~10")
    process = project.start_sync()
    while not list((project.root / "lake").rglob("chunks/partition_key=a/*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1)
    return process


def test_the_step_holds_the_pool(instance: dg.DagsterInstance) -> None:
    step = definitions().resolve_assets_def("embeddings").op
    assert step.pool == POOL == "gpu"


def test_a_killed_run_is_ended_and_its_slot_freed(project: Project, instance: dg.DagsterInstance) -> None:
    process = slow_sync(project)
    (record,) = instance.get_runs()
    assert record.status == dg.DagsterRunStatus.STARTED
    assert holders_of_full_pool(instance, POOL) == [record.run_id]
    assert end_dead_runs(instance, HeartbeatMonitor()) == []
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    project.set(MODEL="fake:16")
    done = subprocess.run(
        [str(DAGSTER), "asset", "materialize", "-m", "embed_assets.definitions", "--select", "*", "--partition", "a"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    ended = instance.get_run_by_id(record.run_id)
    assert ended is not None and ended.status == dg.DagsterRunStatus.FAILURE
    assert holders_of_full_pool(instance, POOL) == []
    assert project.sync()["partitions"]["b"]["state"] == "materialized"


@pytest.mark.long
def test_a_second_run_waits_and_names_the_run_it_waits_for(project: Project, instance: dg.DagsterInstance) -> None:
    process = slow_sync(project)
    (holder,) = holders_of_full_pool(instance, POOL)
    project.set(MODEL="fake:16")
    command = [str(DAGSTER), "asset", "materialize", "-m", "embed_assets.definitions", "--select", "*"]
    waiting = subprocess.Popen(
        [*command, "--partition", "b"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = ""
    assert waiting.stdout is not None
    while "waiting for the pool 'gpu'" not in seen:
        line = waiting.stdout.readline()
        assert line, seen
        seen += line
    assert holder in seen
    used, began = sum(psutil.Process(waiting.pid).cpu_times()[:2]), time.monotonic()
    time.sleep(6)
    # Busy waiting would use most of a core, or a third of one on a busy machine; polling uses little.
    used = sum(psutil.Process(waiting.pid).cpu_times()[:2]) - used
    assert used < 0.25 * (time.monotonic() - began)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    waiting.communicate(timeout=90)
    assert waiting.returncode == 0


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def started_run(instance: dg.DagsterInstance, process: str, **options: Any) -> str:
    """The id of a run that a process has started."""
    job = definitions().resolve_implicit_global_asset_job_def()
    tags = {PROCESS_TAG: process} if process else {}
    return str(instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.STARTED, **options).run_id)


def elsewhere(host: str = "another-host") -> str:
    """A process of another host or container, whose boot id and process id mean nothing here."""
    _, _, _, number, since = this_process().split("|")
    return f"{host}|another-boot|4711|{number}|{since}"


def test_runs_of_this_host_are_dead_as_soon_as_their_process_is(instance: dg.DagsterInstance) -> None:
    host, boot, namespace, number, since = this_process().split("|")
    processes = {
        "alive": this_process(),
        "elsewhere": elsewhere(),
        "another container": "|".join((host, boot, "4711", number, "1")),
        "untagged": "",
        "another boot, or a host of the same name": "|".join((host, "another-boot", namespace, number, since)),
        "reused number": "|".join((host, boot, namespace, number, "1")),
        "gone": "|".join((host, boot, namespace, str(2**22 + 1), since)),
    }
    runs = {name: started_run(instance, process) for name, process in processes.items()}
    monitor = HeartbeatMonitor()
    assert set(end_dead_runs(instance, monitor)) == {runs["reused number"], runs["gone"]}
    assert end_dead_runs(instance, monitor) == []
    child = started_run(instance, processes["gone"], parent_run_id=runs["gone"], root_run_id=runs["gone"])
    assert end_dead_runs(instance, monitor) == []  # a retry has its parent's tag until it begins
    assert instance.get_run_by_id(child) is not None
    free_slots(instance, runs["alive"])


@pytest.mark.parametrize("host", ["another-host", socket.gethostname()])
def test_a_run_without_heartbeats_is_dead_on_any_host(instance: dg.DagsterInstance, host: str) -> None:
    run, clock = started_run(instance, elsewhere(host)), Clock()
    monitor = HeartbeatMonitor(clock)
    assert end_dead_runs(instance, monitor) == []
    while clock.now < SILENT_SECONDS:
        assert end_dead_runs(instance, monitor) == []
        clock.now += 20
    assert end_dead_runs(instance, monitor) == [run]
    messages = [entry.message for entry in instance.all_logs(run)]
    assert any(f"was silent for {SILENT_SECONDS:.0f} s" in message for message in messages), messages


def test_a_process_with_heartbeats_is_alive_whatever_its_clock(instance: dg.DagsterInstance) -> None:
    started_run(instance, elsewhere())
    clock = Clock()
    monitor = HeartbeatMonitor(clock)
    for beat in range(5):
        write_value(instance, f"embed_assets/heartbeat/{elsewhere()}", str(-1000 * beat))
        for _ in range(8):
            assert end_dead_runs(instance, monitor) == []
            clock.now += 20


def test_time_when_nothing_watched_is_not_silence(instance: dg.DagsterInstance) -> None:
    """The database was down, or both processes were suspended: the others get time for their next heartbeat."""
    started_run(instance, elsewhere())
    clock = Clock()
    monitor = HeartbeatMonitor(clock)
    for _ in range(3):
        assert end_dead_runs(instance, monitor) == []
        clock.now += 100 * SILENT_SECONDS


class Outage:
    """An instance whose storage fails at first, with its own type of error."""

    def __init__(self) -> None:
        self.run_storage = self
        self.failures = 3
        self.values: dict[str, str] = {}
        self.has_beaten = threading.Event()

    def set_cursor_values(self, pairs: dict[str, str]) -> None:
        if self.failures:
            self.failures -= 1
            raise Exception("too many retries for DB connection")
        self.values |= pairs
        self.has_beaten.set()


def test_a_heartbeat_continues_after_a_database_outage() -> None:
    outage = Outage()
    with heartbeat(outage, "process", seconds=0.01):  # type: ignore[arg-type]
        assert outage.has_beaten.wait(60)
    assert list(outage.values) == ["embed_assets/heartbeat/process"]


def test_a_heartbeat_runs_with_the_step_and_leaves_nothing_behind(instance: dg.DagsterInstance) -> None:
    key = f"embed_assets/heartbeat/{this_process()}"
    seen: set[str] = set()
    with heartbeat(instance, this_process(), seconds=0.01):
        for _ in range(1000):
            seen.add(read_values(instance, {key})[key])
            if len(seen) == 3:
                break
            time.sleep(0.01)
    assert len(seen) == 3
    assert read_values(instance, {key}) == {}


def test_a_sync_takes_the_slot_of_a_holder_killed_elsewhere(project: Project, instance: dg.DagsterInstance) -> None:
    """The holder's container is gone, and no daemon runs."""
    run = started_run(instance, elsewhere())
    instance.event_log_storage.initialize_concurrency_limit_to_default(POOL)
    instance.event_log_storage.claim_concurrency_slot(POOL, run, "embed_corpus")
    assert holders_of_full_pool(instance, POOL) == [run]
    [message] = wait_for_pool(instance, patience=1.0)
    assert f"held by the run {run} on 'another-host'" in message and "3 minutes without a heartbeat" in message
    assert holders_of_full_pool(instance, POOL) == []
    project.write("a/one.md", "One.")
    assert project.sync()["embedded"] == 1


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE])
def test_a_slot_that_a_finished_run_never_freed_is_free(
    instance: dg.DagsterInstance, status: dg.DagsterRunStatus
) -> None:
    job = definitions().resolve_implicit_global_asset_job_def()
    run = instance.create_run_for_job(job, status=status).run_id
    instance.event_log_storage.initialize_concurrency_limit_to_default(POOL)
    instance.event_log_storage.claim_concurrency_slot(POOL, run, "embed_corpus")
    assert holders_of_full_pool(instance, POOL) == [run]
    assert list(wait_for_pool(instance)) == []


def test_a_sync_with_nothing_to_do_does_not_wait(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/one.md", "One.")
    project.sync()
    run = started_run(instance, elsewhere())
    instance.event_log_storage.claim_concurrency_slot(POOL, run, "embed_corpus")
    assert project.sync()["partitions"]["a"]["state"] == "fresh"
    assert holders_of_full_pool(instance, POOL) == [run]


def test_delays_grow_and_only_transient_errors_are_retried() -> None:
    delays = [RETRIES.calculate_delay(attempt) for attempt in (1, 2)]
    assert 0 < delays[0] < 11 and delays[1] < 22
    assert all(map(is_retryable, [LakeError("503", is_retryable=True), ConnectionResetError(), MemoryError()]))
    assert not any(map(is_retryable, [LakeError("damaged"), PartitionError("no"), KeyError("x")]))


class Flaky(Corpus):
    """A corpus whose first reads fail with a transient storage error."""

    failures = 0

    def documents(self, partition: SourcePartition) -> Iterator[Document | Rejection]:
        if partition.key == "b" and Flaky.failures < 2:
            Flaky.failures += 1
            raise ConnectionResetError("the store hung up")
        return super().documents(partition)


def test_a_dropped_connection_is_retried_and_finished_work_is_not_repeated(
    project: Project, instance: dg.DagsterInstance
) -> None:
    for key in "ab":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.json("discover")
    retries = dg.RetryPolicy(RETRIES.max_retries, delay=0)
    pipeline = project.pipeline()
    corpus = Flaky.from_settings(pipeline.settings, pipeline.model.space)
    flaky = definitions_over(replace(pipeline, corpus=corpus), retries=retries)
    job = flaky.resolve_implicit_global_asset_job_def()
    tags = dict(zip(RANGE, "ab", strict=True))
    result = job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)
    assert result.success and Flaky.failures == 2
    assert len([event for event in result.all_events if event.is_step_up_for_retry]) == 2
    assert events(instance, "embeddings") == 2
    assert project.sync()["embedded"] == 0


def test_a_damaged_partition_is_not_retried(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/one.md", "One.")
    project.sync()
    project.write("a/one.md", "Two.")
    next((project.root / "lake/embeddings").glob("*/partition_key=a/*.parquet")).write_bytes(b"damaged")
    project.json("discover")
    result = run(instance, "a")
    assert not result.success
    assert not [event for event in result.all_events if event.is_step_up_for_retry]


class Broken(Lake):
    """A lake whose code raises an unexpected error, outside any partition."""

    def session(self) -> Lake:
        try:
            raise ZeroDivisionError("a cause below")
        except ZeroDivisionError as error:
            raise RuntimeError("a fault\nin the program") from error


def test_an_unexpected_error_in_the_step_is_reported_with_its_cause(
    project: Project, instance: dg.DagsterInstance
) -> None:
    project.write("a/one.md", "One.")
    pipeline = project.pipeline()
    broken = replace(pipeline, lake=Broken(pipeline.lake.root))
    no_retries = dg.RetryPolicy(max_retries=0)
    with pytest.raises(UserError) as caught:
        run_sync(instance, broken, partial(definitions_over, broken, retries=no_retries), ConsoleSink(stderr))
    assert "ZeroDivisionError: a cause below" in str(caught.value)
    assert "RuntimeError: a fault in the program" in str(caught.value)
    assert "\n" not in str(caught.value) and "CheckError" not in str(caught.value)
