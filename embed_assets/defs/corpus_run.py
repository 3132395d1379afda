"""What the step does: bring a run's partitions up to date, one by one or several at once, and record what was made."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import dagster as dg

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.checks import Checker
from embed_assets.defs.metadata import MetadataWriter
from embed_assets.defs.names import ASSETS, DEPENDENCIES, SOURCE
from embed_assets.defs.progress import RunObserver
from embed_assets.defs.recording import Recorder
from embed_assets.defs.staleness import History, Status
from embed_assets.errors import ModelError, PartitionError, SettingsError, UserError, hide_secrets
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import RAW
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.stages.chunks import materialize_chunks
from embed_assets.stages.compute import Compute
from embed_assets.stages.embeddings import materialize_embeddings
from embed_assets.stages.lanes import lanes_for
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.raw_documents import materialize_raw_documents

_log = logging.getLogger(__name__)
_WAIT_SECONDS = 2.0


@dataclass(slots=True)
class _Task:
    """A partition on its way through the stages."""

    files: SourcePartition
    partition: PartitionSnapshot
    outcome: PartitionOutcome
    error: Exception | None = None
    """Why reading or chunking it failed."""


@dataclass(slots=True)
class CorpusRun:
    """One run over some partitions and some of the three assets."""

    pipeline: Pipeline
    compute: Compute
    """Where texts are embedded. It is closed when the partitions are done."""
    observer: RunObserver
    run_id: str
    recorder: Recorder
    metadata: MetadataWriter
    checker: Checker
    partitions: Mapping[str, SourcePartition]
    before: Snapshot
    """The lake when the source was listed."""
    keys: Sequence[str]
    selected: Sequence[str]
    failures: dict[str, Exception] = field(default_factory=dict)
    """Why partitions failed, by key."""

    @property
    def history(self) -> History:
        """What was recorded before this run."""
        return self.recorder.history

    def materialize(self) -> None:
        """Bring every partition up to date; afterwards `failures` has the errors of those that failed.

        While partitions are embedded, one or as many as `compute` likes, the next one is read and chunked by another
        thread. All that is recorded is recorded by this one.
        """
        self.observer.start({key: self.partitions[key].byte_size for key in self.keys})
        with (
            ThreadPoolExecutor(1, thread_name_prefix="prepare") as ahead,
            lanes_for(self.compute) as lanes,
            contextlib.closing(self.compute),
        ):
            upcoming = ahead.submit(self._prepare, self.keys[0]) if self.keys else None
            under_way: dict[Future[_Task], str] = {}
            for place, key in enumerate(self.keys):
                assert upcoming is not None
                current, rest = upcoming, range(place + 1, len(self.keys))
                while not current.done():
                    self._end_finished(under_way, current)
                lost = self._lost() if rest else None
                if rest and lost is None:
                    upcoming = ahead.submit(self._prepare, self.keys[place + 1])
                with self._failing(key):
                    under_way[self._begin(current.result(), lanes)] = key
                while len(under_way) >= self.compute.partitions_in_flight:
                    self._end_finished(under_way)
                if lost is not None:
                    self._fail_all((self.keys[other] for other in rest), lost)
                    break
            while under_way:
                self._end_finished(under_way)
        self.recorder.drain()
        for key, unwritten in self.recorder.errors.items():
            if key not in self.failures:
                self._fail(key, unwritten)

    def _lost(self) -> UserError | None:
        """Why no text will be embedded any more."""
        try:
            self.compute.require_alive()
        except UserError as error:
            return error
        return None

    def _fail_all(self, keys: Iterable[str], error: UserError) -> None:
        """There is no use in reading what can't be embedded."""
        for key in keys:
            with self._failing(key):
                raise error

    def _end_finished(self, under_way: dict[Future[_Task], str], *others: Future[_Task]) -> None:
        """Wait a while for a partition to be embedded, or one of the others; record what is."""
        finished, _ = wait([*under_way, *others], _WAIT_SECONDS, FIRST_COMPLETED)
        for line in self.compute.news():
            self.observer.news(line)
        for future in finished.difference(others):
            with self._failing(under_way.pop(future)):
                self._end(future.result())

    @contextlib.contextmanager
    def _failing(self, key: str) -> Iterator[None]:
        """An error in here is the partition's, unless it is about the model."""
        try:
            yield
        except (ModelError, SettingsError):
            raise  # a model that can't be loaded is no partition's fault
        except Exception as error:
            if not isinstance(error, UserError):
                trace = "".join(traceback.format_exception(error))
                _log.error("partition %r failed unexpectedly\n%s", key, hide_secrets(trace))
            self._fail(key, error)

    def _fail(self, key: str, error: Exception) -> None:
        self.failures[key] = error
        self.observer.finished(PartitionOutcome(key, error=describe(error)))

    def confirm_unmade(self, keys: Iterable[str]) -> None:
        """Record again what this run planned for partitions and found to be fresh.

        After a run that failed, Dagster counts every partition it had planned and not seen as failed.
        """
        for key in keys:
            for asset in self.selected:
                before = self.history.record(asset, key)  # of an earlier attempt of this run, perhaps
                is_told = (asset, key) in self.recorder.recorded or (before and before.run_id == self.run_id)
                if not is_told:
                    self.recorder.confirm(asset, key)

    def outputs_for_downstream(self, in_run: Collection[dg.AssetKey]) -> Iterator[dg.MaterializeResult[None]]:
        """Outputs, needed only when the same run also makes assets downstream of ours: else those are skipped.

        The events that they cause carry one version for all partitions, so ours are recorded again after them.
        """
        ours = {self.recorder.names.key(asset) for asset in (SOURCE, *ASSETS)}
        if not set(in_run) <= ours:
            for asset in self.selected:
                yield dg.MaterializeResult(asset_key=self.recorder.names.key(asset))
            for key in self.keys:
                for asset in self.selected:
                    self.recorder.confirm(asset, key)

    def _prepare(self, key: str) -> _Task:
        """Read and chunk a partition, as far as that is selected and due."""
        files = self.partitions[key]
        task = _Task(files, self.before.begin(key, RAW), self.history.outcome(key, files.version))
        try:
            self._read_and_chunk(task)
        except Exception as error:  # raised again by _begin, once what was made before it is recorded
            task.error = error
        return task

    def _read_and_chunk(self, task: _Task) -> None:
        corpus, outcome = self.pipeline.corpus, task.outcome
        if self._is_due("raw_documents", outcome):
            provenance = self._provenance("raw_documents", outcome)
            made = materialize_raw_documents(task.partition, corpus, task.files, provenance, outcome)
            _note("raw_documents", outcome, made)
        if self._is_due("chunks", outcome):
            provenance = self._provenance("chunks", outcome)
            _note("chunks", outcome, materialize_chunks(task.partition, corpus, provenance, outcome))

    def _begin(self, task: _Task, lanes: Executor) -> Future[_Task]:
        """Record and check what was prepared, and have it embedded if that is selected and due."""
        outcome = task.outcome
        for asset in outcome.replaced:
            self._record(asset, task)
        if task.error is not None:
            raise task.error
        if not self._is_due("embeddings", outcome):
            done: Future[_Task] = Future()
            done.set_result(task)
            return done
        if "chunks" not in outcome.reasons:  # made by another run: asked again whether they are worth embedding
            self.checker.check("chunks", task.partition, {})
        return lanes.submit(self._embed, task)

    def _embed(self, task: _Task) -> _Task:
        """In a lane: what takes long."""
        outcome = task.outcome
        made = materialize_embeddings(
            task.partition,
            self.pipeline.target,
            self.compute,
            self._provenance("embeddings", outcome),
            outcome,
            lambda progress: self.observer.progress(outcome.key, progress),
        )
        _note("embeddings", outcome, made)
        return task

    def _end(self, task: _Task) -> None:
        """Record and check what was embedded."""
        if "embeddings" in task.outcome.replaced:
            self._record("embeddings", task)
        task.partition.close()
        self.observer.finished(task.outcome)

    def _is_due(self, asset: str, outcome: PartitionOutcome) -> bool:
        """The asset is selected, and missing or stale. Raises ``PartitionError`` when its inputs were never made."""
        if asset not in self.selected:
            return False
        status = self._status(asset, outcome)
        if status.state == "fresh":
            return False
        outcome.reasons[asset] = status.reasons
        for dependency in DEPENDENCIES[asset]:
            if outcome.versions[dependency] is None:
                raise PartitionError(
                    f"{asset} of partition {outcome.key!r} needs {dependency}, which was never materialized; "
                    "select it as well"
                )
        return True

    def _status(self, asset: str, outcome: PartitionOutcome) -> Status:
        inputs = {dependency: outcome.versions[dependency] for dependency in DEPENDENCIES[asset]}
        return self.history.status(asset, outcome.key, self.pipeline.code_versions[asset], inputs)

    def _provenance(self, asset: str, outcome: PartitionOutcome) -> Provenance:
        rewrite = self.history.is_marked_for_repair(asset, outcome.key)
        return Provenance(self.run_id, _inputs(asset, outcome), rewrite)

    def _record(self, asset: str, task: _Task) -> None:
        """Record a materialization, then ask the asset's checks about it.

        Raises ``PartitionError`` when a blocking one says no.
        """
        outcome = task.outcome
        self.recorder.materialized(
            asset,
            outcome,
            self.pipeline.code_versions[asset],
            _inputs(asset, outcome),
            self.metadata.of(asset, task.partition, outcome, self.compute),
        )
        # Only the check `freshness`, of embeddings, wants to know; what was made in this run is fresh.
        others = [a for a in ASSETS if a not in outcome.reasons] if asset == "embeddings" else []
        stale = {a: s for a in others if (s := self._status(a, outcome)).state != "fresh"}
        try:
            self.checker.check(asset, task.partition, stale)
        except PartitionError:
            self.recorder.damaged(asset, outcome.key)
            raise


def _note(asset: str, outcome: PartitionOutcome, made: Replaced) -> None:
    outcome.replaced[asset], outcome.versions[asset] = made, made.data_version


def _inputs(asset: str, outcome: PartitionOutcome) -> dict[str, str]:
    """Data versions of what the asset is made from."""
    return {dependency: outcome.versions[dependency] or "" for dependency in DEPENDENCIES[asset]}


def describe(error: Exception) -> str:
    """What a person is told of a partition's error."""
    return str(error) if isinstance(error, UserError) else hide_secrets(f"{type(error).__name__}: {error}")
