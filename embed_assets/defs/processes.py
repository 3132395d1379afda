"""Tracks which process executes which run, to fail runs whose process died and free their pool slots.

Dagster does not check that the process of a run is alive, unless a run launcher started it:
https://github.com/dagster-io/dagster/issues/4319. Process tags and heartbeats are stored in the instance, without
locks and without a daemon.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from embed_assets.defs.dagster_internals import (
    ExecutionPlan,
    Executor,
    InProcessExecutor,
    PlanOrchestrationContext,
    RetryMode,
    follow_default_limit,
    free_slots,
    holders_of_full_pool,
    raise_execution_interrupts,
)
from embed_assets.defs.heartbeat import SILENT_SECONDS, HeartbeatMonitor, clear_heartbeat, heartbeat
from embed_assets.defs.names import POOL

PROCESS_TAG = "embed_assets/process"
"""Run tag: the process that executes the run, as `this_process` names it."""
_IS_LINUX = sys.platform.startswith("linux")
_RUNNING = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]


def this_process() -> str:
    """Unique name of this process: host, boot id, pid namespace, pid and start time, separated by `|`."""
    pid = os.getpid()
    return "|".join((socket.gethostname(), *_SYSTEM, str(pid), _started(pid) or ""))


def end_dead_runs(instance: DagsterInstance, monitor: HeartbeatMonitor, patience: float = SILENT_SECONDS) -> list[str]:
    """Mark runs as failed whose process is dead, and free their pool slots; returns their ids.

    A process of this container is checked directly; any other counts as dead after `patience` seconds without a
    heartbeat. Dagster does not do this for runs of the command line, or for any run after its whole node died.
    """
    running = {run.run_id: run for run in instance.get_runs(dg.RunsFilter(statuses=_RUNNING))}
    processes = {run_id: tag for run_id, run in running.items() if (tag := _process_of(instance, run))}
    silent = monitor.seconds_silent(instance, set(processes.values()))
    ended: list[str] = []
    for run_id, process in processes.items():
        if not _is_gone(process) and silent[process] < patience:
            continue
        run = instance.get_run_by_id(run_id)
        if run is not None and run.status in _RUNNING:  # and did not end in the meantime
            why = "is dead" if _is_gone(process) else f"was silent for {silent[process]:.0f} s"
            instance.report_run_failed(run, f"The process of the run ({process}) {why}.")
            free_slots(instance, run_id)
            clear_heartbeat(instance, process)
            ended.append(run_id)
    return ended


def _process_of(instance: DagsterInstance, run: DagsterRun) -> str:
    """Name of the process that executes a run; '' if it has none yet, or was not started by this package."""
    tag = run.tags.get(PROCESS_TAG, "")
    parent = instance.get_run_by_id(run.parent_run_id) if run.parent_run_id else None
    # A retry carries its parent's tags until it starts.
    return "" if tag.count("|") != 4 or (parent is not None and parent.tags.get(PROCESS_TAG) == tag) else tag


def _is_gone(process: str) -> bool:
    """Whether the process is certainly dead; False on another host, boot or container, which can't be checked."""
    host, boot, namespace, pid, started = process.split("|")
    return (host, boot, namespace) == (socket.gethostname(), *_SYSTEM) and _started(int(pid)) != started


def _started(pid: int) -> str | None:
    """Start time of a process, on Linux in clock ticks since boot, else in seconds since 1970; None if not running."""
    try:
        if _IS_LINUX:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return str(round(psutil.Process(pid).create_time()))
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return None


def _system() -> tuple[str, str]:
    """(boot id, pid namespace) of this system; empty strings where they are not available."""
    if not _IS_LINUX:
        return "", ""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").stat().st_ino)


_SYSTEM = _system()


def wait_for_pool(instance: DagsterInstance, patience: float = SILENT_SECONDS) -> Iterator[str]:
    """Block until the pool has a free slot; yields one message first if it has to wait.

    Waiting here avoids Dagster's own wait, which keeps a CPU core busy while a step waits for its pool.
    """
    follow_default_limit(instance, POOL)
    monitor, is_announced = HeartbeatMonitor(), False
    while holders := _holders(instance, monitor, patience):
        if not is_announced:
            is_announced = True
            described = ", ".join(_describe(instance, holder) for holder in holders)
            yield f"waiting for the pool {POOL!r}, held by {described}"
        time.sleep(random.uniform(0.5, 2.0))


def _holders(instance: DagsterInstance, monitor: HeartbeatMonitor, patience: float) -> list[str]:
    end_dead_runs(instance, monitor, patience)
    holders = holders_of_full_pool(instance, POOL)
    for run_id in holders:
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:  # killed or canceled before it freed its slot
            free_slots(instance, run_id)
    return holders_of_full_pool(instance, POOL)


def _describe(instance: DagsterInstance, run_id: str) -> str:
    run = instance.get_run_by_id(run_id)
    process = "" if run is None else _process_of(instance, run)
    if not process:
        return f"the run {run_id}"
    host, *_ = process.split("|")
    return f"the run {run_id} on {host!r} (counts as dead after {SILENT_SECONDS / 60:.0f} minutes without a heartbeat)"


class _OneProcessExecutor(InProcessExecutor):
    """Tags the run with its process, sends heartbeats, and waits for the pool while freeing slots of dead runs."""

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        instance = plan_context.instance
        instance.add_run_tags(plan_context.run_id, {PROCESS_TAG: this_process()})
        with heartbeat(instance, this_process()):
            if any(step.pool == POOL for step in execution_plan.get_steps_to_execute_in_topo_order()):
                with raise_execution_interrupts():
                    for message in wait_for_pool(instance):
                        plan_context.log.info(message)
            yield from super().execute(plan_context, execution_plan)


@dg.executor(name="one_process")
def one_process_executor(init_context: dg.InitExecutorContext) -> Executor:
    """Executes all steps in one process, so that the model is loaded once for any number of partitions."""
    return _OneProcessExecutor(RetryMode.ENABLED)
