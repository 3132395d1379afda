"""Ingests partitions, and commits their embeddings, on the machines of a cluster, each as a task that needs one CPU.

run's process: plan ─▶ task on any node: read, chunk, commit, check ─▶ run's process: record, have texts embedded
                    ─▶ task on any node: join vectors, commit, check ─▶ run's process: record
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.cluster_calls import CommitCall, IngestCall, Ingested
from embed_assets.defs.due import Due
from embed_assets.defs.ingest import Task, describe
from embed_assets.errors import EmbeddingError, SourceError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.stages.compute import Compute
from embed_assets.stages.executors import failed
from embed_assets.stages.outcome import SAMPLED
from embed_assets.stages.remote import WorkerRecipe, worker_recipe

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LEAST_BYTES = 1 << 20
"""Of all partitions that are due: reading a megabyte here takes as long as asking another machine for it."""
_LOOK_SECONDS = 5.0
"""How soon whoever waits for a task notices that no CPU is left for it."""
_MOST_PARTITIONS = 64
"""Under way at a time, each with its chunks on this machine's disk when it is done."""


@dataclass(frozen=True, slots=True)
class ClusterWork:
    """Has the partitions of a run ingested, and their embeddings committed, on a cluster."""

    compute: Compute
    due: Due
    before: Snapshot
    """The lake as it was when the source was listed."""
    checks: Mapping[str, Collection[str]]
    """Names of the checks to evaluate, by asset."""
    worker: WorkerRecipe

    @classmethod
    def of(
        cls,
        compute: Compute,
        due: Due,
        before: Snapshot,
        checks: Mapping[str, Collection[str]],
        partitions: Sequence[SourcePartition],
    ) -> ClusterWork | None:
        """For the `partitions` of which anything is due; None if they are few, nothing is to be embedded, or no CPUs
        are to spare.

        Raises ``UserError`` if there is no cluster.
        """
        is_worth_it = len(partitions) > 1 and sum(files.byte_size for files in partitions) >= _LEAST_BYTES
        if "embeddings" not in due.selected or not is_worth_it or not compute.spare_cpus():
            return None
        return cls(compute, due, before, checks, worker_recipe(due.pipeline))

    @property
    def depth(self) -> int:
        """Partitions under way at a time."""
        return min(_MOST_PARTITIONS, max(1, self.compute.spare_cpus()))

    def begin(self, files: SourcePartition) -> Callable[[], Ingested]:
        """Begin to ingest a partition; returns how to wait for it. Not from several threads at once."""
        key = files.key
        call = IngestCall(
            self.worker,
            files,
            self.due.history.only(key),
            self.due.selected,
            self.due.run_id,
            self.before.partition(key).state(RAW),
            self.checks,
        )
        return partial(self._wait, call, self._begin(call))

    def _wait(self, call: IngestCall, future: Future[Ingested]) -> Ingested:
        """The partition as another machine ingested it or, if it could not be read there, this one."""
        try:
            found = self._result(future)
            if not isinstance(found.error, SourceError):
                return found
            reason: Exception = found.error
        except EmbeddingError as error:
            self.compute.require_alive()
            reason = error
        _log.warning("partition %r is read on this machine: %s", call.files.key, describe(reason))
        return call()

    def _begin(self, call: Callable[[], T]) -> Future[T]:
        """Begin a task, if there is room for one."""
        return self.compute.run_task(call) if self.compute.has_room_for_tasks else failed(_no_room())

    def _result(self, future: Future[T]) -> T:
        """Wait for a task. Raises ``EmbeddingError`` if it failed, or if nodes were lost and no CPU is left for it."""
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except TimeoutError:
                if not self.compute.has_room_for_tasks:
                    raise _no_room() from None

    def commit(self, task: Task, rejected: Mapping[str, str], changed: frozenset[str] | None) -> bool:
        """Commit a partition's embeddings, which are staged, and note it in `task`.

        `rejected` and `changed` are as those of `CommitCall`. Returns False if no other machine could do so. Raises
        what the commit raised.
        """
        outcome, table = task.outcome, self.due.pipeline.target.table
        known = (RAW, CHUNK_TABLE) if changed is None else (RAW, CHUNK_TABLE, table)
        call = CommitCall(
            self.worker,
            self.due.history.only(outcome.key),
            outcome,
            [task.partition.state(table) for table in known],
            changed,
            rejected,
            self.due.provenance("embeddings", outcome),
            self.checks["embeddings"],
        )
        try:
            found = self._result(self._begin(call))
        except EmbeddingError as error:
            self.compute.require_alive()
            _log.warning("partition %r: its embeddings are committed by this machine: %s", outcome.key, error)
            task.partition.reset_baseline(table)  # the machine may have committed them before it was lost
            return False
        task.outcome = found.outcome
        if found.error is not None:
            raise found.error
        task.note("embeddings", found.outcome.replaced["embeddings"])
        if found.checks is None:
            task.partition.reset_baseline(table)
            task.outcome.stored = partial(task.partition.rows, table, SAMPLED)
        else:
            task.checks = {**task.checks, "embeddings": found.checks}
        return True


def _no_room() -> EmbeddingError:
    return EmbeddingError("the cluster has no CPU left for it", is_retryable=True)
