"""Which process runs what: so that a run whose process died is ended, and gives back its place in the pool."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator

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
)
from embed_assets.defs.names import POOL

PROCESS_TAG = "embed_assets/process"
_RUNNING = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]


def this_process() -> str:
    """This process among all that ever were: host, number and time of its start."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time()}"


def end_dead_runs(instance: DagsterInstance) -> list[str]:
    """Mark as failed the runs of this host whose process is gone, and free what they hold; returns their ids.

    Nobody else does it for runs of the command line, nor for any after the whole node died.
    """
    dead = [run for run in instance.get_runs(dg.RunsFilter(statuses=_RUNNING)) if _is_dead(run)]
    for run in dead:
        instance.report_run_failed(run, f"The process of the run ({run.tags[PROCESS_TAG]}) is gone.")
        free_slots(instance, run.run_id)
    return [run.run_id for run in dead]


def _is_dead(run: DagsterRun) -> bool:
    host, _, process = run.tags.get(PROCESS_TAG, "").partition(":")
    if host != socket.gethostname():
        return False  # not ours to judge
    number, _, started = process.partition(":")
    try:
        return bool(abs(psutil.Process(int(number)).create_time() - float(started)) > 1)
    except psutil.NoSuchProcess:
        return True


def wait_for_pool(instance: DagsterInstance) -> Iterator[str]:
    """Return when the pool has a place; before that, yields once what is waited for.

    Dagster itself keeps a core busy while a step waits for its pool.
    """
    follow_default_limit(instance, POOL)
    is_told = False
    while holders := _holders(instance):
        if not is_told:
            is_told = True
            yield f"waiting for the pool {POOL!r}, which is held by the run {', '.join(holders)}"
        time.sleep(random.uniform(0.5, 2.0))


def _holders(instance: DagsterInstance) -> list[str]:
    end_dead_runs(instance)
    return holders_of_full_pool(instance, POOL)


class _OneProcess(InProcessExecutor):
    """Notes which process it is, and waits for the pool without being busy, but not for the dead."""

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        instance = plan_context.instance
        instance.add_run_tags(plan_context.run_id, {PROCESS_TAG: this_process()})
        if any(step.pool == POOL for step in execution_plan.get_steps_to_execute_in_topo_order()):
            for message in wait_for_pool(instance):
                plan_context.log.info(message)
        yield from super().execute(plan_context, execution_plan)


@dg.executor(name="one_process")
def one_process_executor(init_context: dg.InitExecutorContext) -> Executor:
    """Runs all steps in one process: the model is loaded once, whatever the number of partitions."""
    return _OneProcess(RetryMode.ENABLED)
