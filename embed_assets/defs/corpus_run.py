"""One run of the step: brings its partitions up to date and records each materialization."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

import dagster as dg

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.checks import Checker
from embed_assets.defs.cluster_work import ClusterWork
from embed_assets.defs.due import Due, input_versions
from embed_assets.defs.ingest import Ingest, Task, describe
from embed_assets.defs.metadata import MetadataWriter
from embed_assets.defs.names import ASSETS
from embed_assets.defs.recording import Recorder
from embed_assets.defs.staleness import History, Status, partition_statuses
from embed_assets.errors import ModelError, PartitionError, SettingsError, UserError, hide_secrets
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW
from embed_assets.lake.writer import Provenance
from embed_assets.scratch import ScratchFolder
from embed_assets.stages.canaries import keep_canaries
from embed_assets.stages.changes import ChangeFinder
from embed_assets.stages.compute import Compute
from embed_assets.stages.embeddings import materialize_embeddings, stage_embeddings
from embed_assets.stages.executors import InlineExecutor, embedding_executor, failed
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.preparing import Preparation, open_preparation
from embed_assets.stages.progress import RunObserver

_log = logging.getLogger(__name__)
_LEAST_BYTES_AHEAD = 4 << 20
"""Size of a new partition whose chunks are embedded before all of them are there. Smaller ones overlap with others."""
_WAIT_SECONDS = 2.0
"""Timeout of a wait for partitions: how late messages of the compute are passed on at most."""


@dataclass(slots=True)
class CorpusRun:
    """A run over some partitions and some of the three assets."""

    pipeline: Pipeline
    compute: Compute
    """Where texts are embedded; closed when all partitions are done."""
    observer: RunObserver
    run_id: str
    recorder: Recorder
    metadata: MetadataWriter
    checker: Checker
    partitions: Mapping[str, SourcePartition]
    """The run's partitions of the source, by key; one without files is empty."""
    before: Snapshot
    """The lake as it was when the source was listed."""
    keys: Sequence[str]
    """Keys of the partitions, in the order in which they are processed."""
    selected: Sequence[str]
    """Names of the assets to materialize."""
    failures: dict[str, Exception] = field(default_factory=dict)
    """Errors of the partitions that failed, by key."""
    documents: dict[str, str] = field(default_factory=dict)
    """Data version of the documents of each partition that was ingested, by key."""
    _has_embedded: bool = False
    """Whether the model was used."""
    _elsewhere: ClusterWork | None = None
    """Where partitions are ingested and checked, if not here."""

    @property
    def _due(self) -> Due:
        return Due(self.pipeline, self.history, self.selected, self.run_id)

    @property
    def _ingest(self) -> Ingest:
        return Ingest(self._due, lambda key: self.before.partition(key).state(RAW))

    @property
    def history(self) -> History:
        """What was recorded before this run."""
        return self.recorder.history

    def materialize(self) -> None:
        """Bring every partition up to date; afterwards `failures` holds the errors of those that failed.

        Up to `compute.partitions_in_flight` partitions are embedded at a time while another thread reads and chunks the
        next one. Only the calling thread records. Raises ``ModelError`` or ``SettingsError`` if the model can't run.
        """
        self.observer.start({key: self.partitions[key].byte_size for key in self.keys})
        with (
            embedding_executor(self.compute) as lanes,
            contextlib.closing(self.compute),
            self._open_ingest() as (begin, depth, preparation),
        ):
            upcoming: deque[Future[Task]] = deque(map(begin, self.keys[:depth]))
            under_way: dict[Future[Task], str] = {}
            lost: UserError | None = None
            for place, key in enumerate(self.keys):
                if lost is not None and not upcoming:
                    self._fail_all(self.keys[place:], lost)
                    break
                current = upcoming.popleft()
                embedded = self._embed_ahead(key, preparation)
                while not current.done():
                    self._end_finished(under_way, current)
                lost = lost or self._lost()
                if place + depth < len(self.keys) and lost is None:
                    upcoming.append(begin(self.keys[place + depth]))
                with self._failing(key):
                    task = current.result()
                    task.outcome.count_embedded(embedded)
                    under_way[self._begin(task, lanes)] = key
                while len(under_way) >= self.compute.partitions_in_flight:
                    self._end_finished(under_way)
            while under_way:
                self._end_finished(under_way)
            self._keep_canaries()
        self.drain()

    def _keep_canaries(self) -> None:
        """Have what embedded a new space's chunks embed its canaries. Servers get no texts but the corpus's."""
        if not self._has_embedded or self.pipeline.model.space.is_remote or self._lost() is not None:
            return
        try:
            keep_canaries(self.pipeline, self.compute)
        except UserError as error:
            _log.warning("the canaries of %s could not be kept: %s", self.pipeline.model.space.name, error)

    def drain(self) -> None:
        """Wait until everything is recorded; a partition of which something could not be written has failed."""
        self.recorder.drain()
        for key, unwritten in self.recorder.errors.items():
            if key not in self.failures:
                self.fail(key, unwritten)

    def _lost(self) -> UserError | None:
        """The error that keeps the compute from embedding anything more; None while it is alive."""
        try:
            self.compute.require_alive()
        except UserError as error:
            return error
        return None

    def _fail_all(self, keys: Iterable[str], error: UserError) -> None:
        """Fail partitions without reading them, because nothing can be embedded any more."""
        for key in keys:
            with self._failing(key):
                raise error

    def _end_finished(self, under_way: dict[Future[Task], str], *others: Future[Task]) -> None:
        """Wait up to `_WAIT_SECONDS` for a partition to be embedded or one of `others`; record what finished."""
        finished, _ = wait([*under_way, *others], _WAIT_SECONDS, FIRST_COMPLETED)
        for line in self.compute.news():
            self.observer.news(line)
        for future in finished.difference(others):
            with self._failing(under_way.pop(future)):
                self._end(future.result())

    @contextlib.contextmanager
    def _failing(self, key: str) -> Iterator[None]:
        """Record an error raised inside as the partition's failure; errors of the model or the settings propagate."""
        try:
            yield
        except (ModelError, SettingsError):
            raise  # a model that can't be loaded affects every partition
        except Exception as error:
            if not isinstance(error, UserError):
                trace = "".join(traceback.format_exception(error))
                _log.error("partition %r failed unexpectedly\n%s", key, hide_secrets(trace))
            self.fail(key, error)

    def fail(self, key: str, error: Exception) -> None:
        """Make a partition a failure of the run."""
        self.failures[key] = error
        self.observer.finished(PartitionOutcome(key, error=describe(error)))

    def confirm_fresh(self, keys: Iterable[str]) -> None:
        """Record the latest materializations of partitions again that this run planned and found fresh.

        When a run fails, Dagster shows every partition that it planned and did not materialize as failed:
        https://github.com/dagster-io/dagster/issues/28789
        """
        for key in keys:
            for asset in self.selected:
                before = self.history.record(asset, key)  # perhaps from an earlier attempt of this run
                is_recorded = (asset, key) in self.recorder.recorded or (before and before.run_id == self.run_id)
                if not is_recorded:
                    self.recorder.confirm(asset, key)

    def stale(self, key: str) -> dict[str, Status]:
        """The status of each asset of a partition that was not fresh before this run."""
        version, codes = self.partitions[key].version, self.pipeline.code_versions
        statuses = partition_statuses(self.history, key, version, codes)
        return {asset: status for asset, status in statuses.items() if status.state != "fresh"}

    def check_untouched(self) -> None:
        """Evaluate the selected checks of what this run found fresh: assets of others are below it.

        A partition whose blocking check fails is a failure of the run, and damaged.
        """
        tables = Snapshot(self.pipeline.lake)
        for key in self.keys:
            if key in self.failures:
                continue
            stale = self.stale(key)
            with self._failing(key):
                for asset in self.selected:
                    if (asset, key) not in self.recorder.recorded:
                        with self._marking_damage(asset, key):
                            self.checker.check(asset, tables.partition(key), stale)
        self.drain()

    def outputs_for_downstream(self) -> Iterator[dg.MaterializeResult[None]]:
        """Yield outputs, for a run that also materializes assets below these: Dagster would skip those without them
        (https://github.com/dagster-io/dagster/issues/20520).

        Dagster records an event for each output, with one data version for all partitions, so the partitions' own
        events are recorded again after them.
        """
        for asset in self.selected:
            yield dg.MaterializeResult(asset_key=self.recorder.names.key(asset))
        for key in self.keys:
            for asset in self.selected:
                self.recorder.confirm(asset, key)

    @contextlib.contextmanager
    def _open_ingest(self) -> Iterator[tuple[Callable[[str], Future[Task]], int, Preparation]]:
        """How to begin ingesting a partition, how many at a time, and the documents that are read on this machine."""
        due = self._due.partitions(self.partitions[key] for key in self.keys)
        checks = {asset: self.checker.names_of(asset) for asset in ASSETS}
        due_keys = {files.key for asset in ("raw_documents", "chunks") for files in due[asset]}
        elsewhere = ClusterWork.of(self.compute, self._due, self.before, checks, _distinct(due))
        self._elsewhere = elsewhere
        here = [] if elsewhere else due["raw_documents"]
        corpus, configured = self.pipeline.corpus, self.pipeline.settings.prepare_processes
        finder = ChangeFinder(self.before, corpus.source, partial(self._due.is_as_recorded, RAW))
        split_bytes = sum(files.byte_size for files in due["chunks"])
        depth = elsewhere.depth if elsewhere else 1
        if elsewhere:
            what = "read and split" if due_keys else "committed"
            self.observer.news(f"partitions are {what} on the cluster, up to {depth} at a time")
        with (
            ScratchFolder() as folder,
            _threads(depth, waits=elsewhere is None) as threads,
            open_preparation(
                corpus, here, "chunks" in self.selected, 0 if elsewhere else configured, finder.find, split_bytes
            ) as preparation,
        ):

            def begin(key: str) -> Future[Task]:
                files = self.partitions[key]
                if elsewhere is None:
                    return threads.submit(self._prepare, key, preparation)
                if key not in due_keys:  # nothing to do, and by one thread: open tables are not for several
                    return InlineExecutor().submit(self._prepare, key, preparation)
                try:
                    wait_for = elsewhere.begin(files)
                except UserError as error:
                    return failed(error)
                return threads.submit(lambda: wait_for().task(files, self.before, folder))

            yield begin, depth, preparation

    def _prepare(self, key: str, preparation: Preparation) -> Task:
        """Read and chunk a partition where that is selected and due; an error is kept in the task."""
        files = self.partitions[key]
        task = Task(files, self.before.begin(key), self.history.outcome(key, files.version))
        return self._ingest.ingest(task, preparation)

    def _embed_ahead(self, key: str, preparation: Preparation) -> PartitionOutcome:
        """Embed a large new partition's chunks in this thread while another one still prepares them.

        Returns what was embedded. Not with compute that embeds several partitions at a time: it is busy anyway.
        """
        ahead, files = PartitionOutcome(key), self.partitions[key]
        is_new = self.history.record("embeddings", key) is None and set(self.selected) == set(ASSETS)
        if self.compute.max_partitions > 1 or not is_new or files.byte_size < _LEAST_BYTES_AHEAD:
            return ahead
        with contextlib.closing(self.before.begin(key)) as partition:
            chunks, target = preparation.arriving(files), self.pipeline.target
            report = partial(self.observer.progress, key)
            try:
                stage_embeddings(partition, chunks, target, self.compute, ahead, report)
            except (ModelError, SettingsError):
                raise
            except Exception as error:  # either preparing failed, or embedding meets it again and reports it
                _log.info("partition %r: embedding ahead of its chunks ended: %s", key, describe(error))
        return ahead

    def _begin(self, task: Task, lanes: Executor) -> Future[Task]:
        """Record and check what was prepared, and submit it for embedding if that is selected and due."""
        outcome = task.outcome
        if (version := outcome.versions["raw_documents"]) is not None:
            self.documents[outcome.key] = version
        try:
            for asset in outcome.replaced:
                self._record(asset, task)
            if task.error is not None:
                raise task.error
        except BaseException:
            task.close()
            raise
        if not self._due.is_due("embeddings", outcome):
            done: Future[Task] = Future()
            done.set_result(task)
            return done
        if "chunks" not in outcome.reasons:  # chunks of another run: check them before embedding
            self.checker.check("chunks", task.partition, {})
        return lanes.submit(self._embed, task)

    def _embed(self, task: Task) -> Task:
        """Embed a partition's chunks; runs in a thread of `lanes`."""
        try:
            if not self._embed_elsewhere(task):
                self._embed_here(task)
        except BaseException:
            task.close()
            raise
        return task

    def _embed_elsewhere(self, task: Task) -> bool:
        """Have a partition's chunks embedded, and its embeddings committed, by other machines.

        Returns False if this process is to commit them: alone it knows the vectors of the whole table.
        """
        target, partition, outcome = self.pipeline.target, task.partition, task.outcome
        if self._elsewhere is None or target.elsewhere is not None:
            return False
        chunks = self._ingest.chunk_rows(task)
        report, rewrites = partial(self.observer.progress, outcome.key), self._provenance(outcome).rewrite
        with partition.watched(RAW, CHUNK_TABLE):
            rejected = stage_embeddings(partition, chunks, target, self.compute, outcome, report, rewrites)
        return self._elsewhere.commit(task, rejected, chunks.changed)

    def _embed_here(self, task: Task) -> None:
        outcome = task.outcome
        made = materialize_embeddings(
            task.partition,
            self._ingest.chunk_rows(task),
            self.pipeline.target,
            self.compute,
            self._provenance(outcome),
            outcome,
            partial(self.observer.progress, outcome.key),
        )
        task.note("embeddings", made)

    def _provenance(self, outcome: PartitionOutcome) -> Provenance:
        return self._due.provenance("embeddings", outcome)

    def _end(self, task: Task) -> None:
        """Record and check a partition's embeddings, and report it as finished."""
        self._has_embedded |= task.outcome.embedded > 0
        with contextlib.closing(task):
            if "embeddings" in task.outcome.replaced:
                self._record("embeddings", task)
        self.observer.finished(task.outcome)

    def _record(self, asset: str, task: Task) -> None:
        """Record a materialization, then evaluate the asset's checks on it.

        Raises ``PartitionError`` if a blocking check fails; the partition is then recorded as damaged.
        """
        outcome = task.outcome
        self.recorder.materialized(
            asset,
            outcome,
            self.pipeline.code_versions[asset],
            input_versions(asset, outcome),
            self.metadata.of(asset, outcome, self.compute),
        )
        # Only the freshness check of embeddings needs this; what this run materialized is fresh.
        others = [a for a in ASSETS if a not in outcome.reasons] if asset == "embeddings" else []
        stale = {a: s for a in others if (s := self._due.status(a, outcome)).state != "fresh"}
        with self._marking_damage(asset, outcome.key):
            self.checker.check(asset, task.partition, stale, task.checks.get(asset))

    @contextlib.contextmanager
    def _marking_damage(self, asset: str, key: str) -> Iterator[None]:
        """Record a partition as damaged if a blocking check fails inside."""
        try:
            yield
        except PartitionError:
            self.recorder.damaged(asset, key)
            raise


def _distinct(due: Mapping[str, Sequence[SourcePartition]]) -> list[SourcePartition]:
    return list({files.key: files for partitions in due.values() for files in partitions}.values())


@contextlib.contextmanager
def _threads(count: int, waits: bool) -> Iterator[ThreadPoolExecutor]:
    """Threads that are waited for at the end; or not, because they wait for compute that is yet to be closed."""
    threads = ThreadPoolExecutor(count, thread_name_prefix="prepare")
    try:
        yield threads
    finally:
        threads.shutdown(wait=waits, cancel_futures=not waits)
