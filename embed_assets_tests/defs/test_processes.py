"""The pool, runs whose process died, and what is tried again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from embed_assets.console import stderr
from embed_assets.corpus.source import SourcePartition
from embed_assets.definitions import definitions_over
from embed_assets.defs.assets import RETRIES
from embed_assets.defs.dagster_internals import free_slots, holders_of_full_pool
from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import POOL
from embed_assets.defs.processes import PROCESS_TAG, end_dead_runs, this_process
from embed_assets.defs.sync import run_sync
from embed_assets.errors import LakeError, PartitionError, UserError, may_pass
from embed_assets.lake.writer import Provenance
from embed_assets.progress import ConsoleObserver
from embed_assets.settings import load_settings
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.raw_documents import RawDocuments
from embed_assets_tests.conftest import Project
from embed_assets_tests.defs.dagster_runs import DAGSTER, RANGE, definitions, events, run


@pytest.fixture
def instance(project: Project) -> Iterator[dg.DagsterInstance]:
    with open_instance() as opened:
        yield opened


def slow_sync(project: Project) -> subprocess.Popen[str]:
    """A sync that takes long, once its model is at work."""
    for key in "ab":
        project.write(f"{key}/rows.jsonl", "\n".join(json.dumps({"text": f"Row {i} of {key}."}) for i in range(600)))
    project.set(MODEL="fake:16~40")
    process = project.start_sync()
    while not list((project.root / "lake").rglob("chunks/partition_key=a/*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1)
    return process


def test_the_step_holds_the_pool(instance: dg.DagsterInstance) -> None:
    step = definitions().resolve_assets_def("embeddings").op
    assert step.pool == POOL == "gpu"


def test_a_killed_run_is_ended_and_gives_back_its_place(project: Project, instance: dg.DagsterInstance) -> None:
    process = slow_sync(project)
    (record,) = instance.get_runs()
    assert record.status == dg.DagsterRunStatus.STARTED
    assert holders_of_full_pool(instance, POOL) == [record.run_id]
    assert end_dead_runs(instance) == []
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


def test_a_second_run_waits_and_says_for_whom(project: Project, instance: dg.DagsterInstance) -> None:
    process = slow_sync(project)
    (holder,) = holders_of_full_pool(instance, POOL)
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
    used = time.process_time()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    waiting.communicate(timeout=90)
    assert waiting.returncode == 0
    assert time.process_time() - used < 30


def test_runs_of_other_hosts_and_live_ones_are_left_alone(instance: dg.DagsterInstance) -> None:
    job = definitions().resolve_implicit_global_asset_job_def()
    started = dg.DagsterRunStatus.STARTED
    host, boot, namespace, number, since = this_process().split("|")
    tags = {
        "alive": this_process(),
        "elsewhere": "|".join(("another-host", boot, namespace, number, "1")),
        "another container": "|".join((host, boot, "4711", number, "1")),
        "untagged": "",
        "before the boot": "|".join((host, "another-boot", namespace, number, since)),
        "reused number": "|".join((host, boot, namespace, number, "1")),
        "gone": "|".join((host, boot, namespace, str(2**22 + 1), since)),
    }
    runs = {
        name: instance.create_run_for_job(job, tags={PROCESS_TAG: tag} if tag else {}, status=started).run_id
        for name, tag in tags.items()
    }
    assert set(end_dead_runs(instance)) == {runs["before the boot"], runs["reused number"], runs["gone"]}
    assert end_dead_runs(instance) == []
    child = instance.create_run_for_job(
        job, tags={PROCESS_TAG: tags["gone"]}, status=started, parent_run_id=runs["gone"], root_run_id=runs["gone"]
    )
    assert end_dead_runs(instance) == []  # a retry that has its parent's tag until it begins
    assert child.parent_run_id == runs["gone"]
    free_slots(instance, runs["alive"])


def test_delays_grow_and_only_what_may_pass_is_worth_them() -> None:
    delays = [RETRIES.calculate_delay(attempt) for attempt in (1, 2)]
    assert 0 < delays[0] < 11 and delays[1] < 22
    assert may_pass(LakeError("503", may_pass=True)) and may_pass(ConnectionResetError()) and may_pass(MemoryError())
    assert not may_pass(LakeError("damaged")) and not may_pass(PartitionError("no")) and not may_pass(KeyError("x"))


class Flaky(Pipeline):
    """A pipeline whose reading of documents fails at first, as a store does that hiccups."""

    failures = 0

    def materialize_raw_documents(
        self, partition: SourcePartition, provenance: Provenance, *options: Any
    ) -> RawDocuments:
        if partition.key == "b" and Flaky.failures < 2:
            Flaky.failures += 1
            raise ConnectionResetError("the store hung up")
        return super().materialize_raw_documents(partition, provenance, *options)


def test_a_store_that_hangs_up_is_tried_again_and_the_rest_is_not_done_twice(
    project: Project, instance: dg.DagsterInstance
) -> None:
    for key in "ab":
        project.write(f"{key}/one.md", f"One of {key}.")
    project.json("discover")
    retries = dg.RetryPolicy(RETRIES.max_retries, delay=0)
    flaky = definitions_over(Flaky.from_settings(load_settings()), retries=retries)
    job = flaky.resolve_implicit_global_asset_job_def()
    tags = dict(zip(RANGE, "ab", strict=True))
    result = job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)
    assert result.success and Flaky.failures == 2
    assert len([event for event in result.all_events if event.is_step_up_for_retry]) == 2
    assert events(instance, "embeddings") == 2
    assert project.sync()["embedded"] == 0


def test_a_damaged_partition_is_not_tried_again(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/one.md", "One.")
    project.sync()
    project.write("a/one.md", "Two.")
    next((project.root / "lake/embeddings").glob("*/partition_key=a/*.parquet")).write_bytes(b"damaged")
    project.json("discover")
    result = run(instance, "a")
    assert not result.success
    assert not [event for event in result.all_events if event.is_step_up_for_retry]


class Broken(Pipeline):
    """A pipeline with a fault in the program, beside all partitions."""

    def open_compute(self) -> Any:
        try:
            raise ZeroDivisionError("a cause below")
        except ZeroDivisionError as error:
            raise RuntimeError("a fault\nin the program") from error


def test_an_unexpected_error_of_the_step_is_told_with_its_cause(project: Project, instance: dg.DagsterInstance) -> None:
    project.write("a/one.md", "One.")
    broken = Broken.from_settings(load_settings())
    no_retries = dg.RetryPolicy(max_retries=0)
    with pytest.raises(UserError) as caught:
        run_sync(instance, broken, lambda o: definitions_over(broken, o, retries=no_retries), ConsoleObserver(stderr))
    assert "ZeroDivisionError: a cause below" in str(caught.value)
    assert "RuntimeError: a fault in the program" in str(caught.value)
    assert "\n" not in str(caught.value) and "CheckError" not in str(caught.value)
