"""Which process runs what: so that a run whose process died is ended, and gives back its place in the pool.

Notes, heartbeats and their reader take no lock and need no daemon; they lie in the instance.
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
from embed_assets.defs.heartbeat import SILENT_SECONDS, Silence, forget, heartbeat
from embed_assets.defs.names import POOL

PROCESS_TAG = "embed_assets/process"
_IS_LINUX = sys.platform.startswith("linux")
_RUNNING = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]


def this_process() -> str:
    """This process among all that ever were: machine, its boot, process namespace, number and start."""
    pid = os.getpid()
    return "|".join((socket.gethostname(), *_SYSTEM, str(pid), _started(pid) or ""))


def end_dead_runs(instance: DagsterInstance, silence: Silence, patience: float = SILENT_SECONDS) -> list[str]:
    """Mark as failed the runs whose process is gone, and free what they hold; returns their ids.

    In this container that is seen at once; elsewhere, when the process was silent for `patience` seconds. Nobody else
    does it for runs of the command line, nor for any after the whole node died.
    """
    running = {run.run_id: run for run in instance.get_runs(dg.RunsFilter(statuses=_RUNNING))}
    processes = {run_id: tag for run_id, run in running.items() if (tag := _process_of(instance, run))}
    silent = silence.listen(instance, set(processes.values()))
    ended: list[str] = []
    for run_id, process in processes.items():
        if not _is_gone(process) and silent[process] < patience:
            continue
        run = instance.get_run_by_id(run_id)
        if run is not None and run.status in _RUNNING:  # and did not come to its end meanwhile
            why = "is gone" if _is_gone(process) else f"was silent for {silent[process]:.0f} s"
            instance.report_run_failed(run, f"The process of the run ({process}) {why}.")
            free_slots(instance, run_id)
            forget(instance, process)
            ended.append(run_id)
    return ended


def _process_of(instance: DagsterInstance, run: DagsterRun) -> str:
    """The process that runs it; '' where it has none yet, or is not ours to look after."""
    tag = run.tags.get(PROCESS_TAG, "")
    parent = instance.get_run_by_id(run.parent_run_id) if run.parent_run_id else None
    # A retry has its parent's tags until it begins.
    return "" if tag.count("|") != 4 or (parent is not None and parent.tags.get(PROCESS_TAG) == tag) else tag


def _is_gone(process: str) -> bool:
    """Certainly: of other machines and containers, and of other boots of what may be this one, nothing is known."""
    host, boot, namespace, pid, started = process.split("|")
    return (host, boot, namespace) == (socket.gethostname(), *_SYSTEM) and _started(int(pid)) != started


def _started(pid: int) -> str | None:
    """When a process was started, by a clock that nobody sets if there is one; None for no such process."""
    try:
        if _IS_LINUX:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return str(round(psutil.Process(pid).create_time()))
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return None


def _system() -> tuple[str, str]:
    """(the system's boot, the namespace of its process numbers); empty where there is no telling."""
    if not _IS_LINUX:
        return "", ""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").stat().st_ino)


_SYSTEM = _system()


def wait_for_pool(instance: DagsterInstance, patience: float = SILENT_SECONDS) -> Iterator[str]:
    """Return when the pool has a place; before that, yields once what is waited for.

    Dagster itself keeps a core busy while a step waits for its pool.
    """
    follow_default_limit(instance, POOL)
    silence, is_told = Silence(), False
    while holders := _holders(instance, silence, patience):
        if not is_told:
            is_told = True
            described = ", ".join(_describe(instance, holder) for holder in holders)
            yield f"waiting for the pool {POOL!r}, which is held by {described}"
        time.sleep(random.uniform(0.5, 2.0))


def _holders(instance: DagsterInstance, silence: Silence, patience: float) -> list[str]:
    end_dead_runs(instance, silence, patience)
    holders = holders_of_full_pool(instance, POOL)
    for run_id in holders:
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:  # killed or canceled before it gave its place back
            free_slots(instance, run_id)
    return holders_of_full_pool(instance, POOL)


def _describe(instance: DagsterInstance, run_id: str) -> str:
    run = instance.get_run_by_id(run_id)
    process = "" if run is None else _process_of(instance, run)
    if not process:
        return f"the run {run_id}"
    host, *_ = process.split("|")
    return f"the run {run_id} on {host!r} (taken for dead once it is silent for {SILENT_SECONDS / 60:.0f} minutes)"


class _OneProcess(InProcessExecutor):
    """Notes which process it is, and waits for the pool without being busy, but not for the dead."""

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
    """Runs all steps in one process: the model is loaded once, whatever the number of partitions."""
    return _OneProcess(RetryMode.ENABLED)
