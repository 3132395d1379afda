"""One run of the step: brings its partitions up to date and records each materialization."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

import dagster as dg

from embed_assets.corpus.source import SourcePartition
from embed_assets.defs.checks import Checker
from embed_assets.defs.metadata import MetadataWriter
from embed_assets.defs.names import ASSETS, DEPENDENCIES, SOURCE
from embed_assets.defs.recording import Recorder
from embed_assets.defs.staleness import History, Status
from embed_assets.errors import LakeError, ModelError, PartitionError, SettingsError, UserError, hide_secrets
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, TableSpec
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.stages.changes import ChangeFinder
from embed_assets.stages.chunk_rows import ChunkRows, PreparedChunks, StoredChunks
from embed_assets.stages.chunks import materialize_chunks
from embed_assets.stages.compute import Compute
from embed_assets.stages.corpus import TEXT_COLUMNS
from embed_assets.stages.embeddings import embed_ahead, materialize_embeddings
from embed_assets.stages.executors import embedding_executor
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.preparing import Preparation, Prepared, open_preparation
from embed_assets.stages.progress import RunObserver
from embed_assets.stages.raw_documents import materialize_raw_documents

_log = logging.getLogger(__name__)
_LEAST_BYTES_AHEAD = 4 << 20
"""Size of a new partition whose chunks are embedded before all of them are there. Smaller ones overlap with others."""
_WAIT_SECONDS = 2.0
"""Timeout of a wait for partitions: how late messages of the compute are passed on at most."""


@dataclass(slots=True)
class _Task:
    """A partition on its way through the three stages."""

    files: SourcePartition
    partition: PartitionSnapshot
    outcome: PartitionOutcome
    prepared: Prepared | None = None
    """Its documents and chunks, if they were read or split in this run."""
    error: Exception | None = None
    """The error that reading or chunking raised."""

    def replace_prepared(self, prepared: Prepared) -> None:
        """Use `prepared` instead of what was prepared before."""
        if self.prepared is not None:
            self.prepared.remove()
        self.prepared = prepared

    def close(self) -> None:
        """Remove what was prepared, and return open tables."""
        if self.prepared is not None:
            self.prepared.remove()
        self.partition.close()


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
            ThreadPoolExecutor(1, thread_name_prefix="prepare") as ahead,
            embedding_executor(self.compute) as lanes,
            contextlib.closing(self.compute),
            self._open_preparation() as preparation,
        ):
            upcoming = ahead.submit(self._prepare, self.keys[0], preparation) if self.keys else None
            under_way: dict[Future[_Task], str] = {}
            for place, key in enumerate(self.keys):
                assert upcoming is not None
                current, rest = upcoming, range(place + 1, len(self.keys))
                embedded = self._embed_ahead(key, preparation)
                while not current.done():
                    self._end_finished(under_way, current)
                lost = self._lost() if rest else None
                if rest and lost is None:
                    upcoming = ahead.submit(self._prepare, self.keys[place + 1], preparation)
                with self._failing(key):
                    task = current.result()
                    task.outcome.count_embedded(embedded)
                    under_way[self._begin(task, lanes)] = key
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

    def _end_finished(self, under_way: dict[Future[_Task], str], *others: Future[_Task]) -> None:
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
            self._fail(key, error)

    def _fail(self, key: str, error: Exception) -> None:
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

    def outputs_for_downstream(self, in_run: Collection[dg.AssetKey]) -> Iterator[dg.MaterializeResult[None]]:
        """Yield outputs if the run also materializes assets downstream of these: Dagster would skip those without them
        (https://github.com/dagster-io/dagster/issues/20520).

        Dagster records an event for each output, with one data version for all partitions, so the partitions' own
        events are recorded again after them.
        """
        own_assets = {self.recorder.names.key(asset) for asset in (SOURCE, *ASSETS)}
        if not set(in_run) <= own_assets:
            for asset in self.selected:
                yield dg.MaterializeResult(asset_key=self.recorder.names.key(asset))
            for key in self.keys:
                for asset in self.selected:
                    self.recorder.confirm(asset, key)

    def _open_preparation(self) -> contextlib.AbstractContextManager[Preparation]:
        """The documents to read and split in this run."""
        due: dict[str, list[SourcePartition]] = {"raw_documents": [], "chunks": []}
        for key in self.keys:
            files = self.partitions[key]
            outcome = self.history.outcome(key, files.version)
            for asset in due.keys() & set(self.selected):
                if self._status(asset, outcome).state != "fresh":
                    due[asset].append(files)
        corpus, configured = self.pipeline.corpus, self.pipeline.settings.prepare_processes
        finder = ChangeFinder(self.before, corpus.source, partial(self._is_as_recorded, RAW))
        split_bytes = sum(files.byte_size for files in due["chunks"])
        return open_preparation(
            corpus, due["raw_documents"], "chunks" in self.selected, configured, finder.find, split_bytes
        )

    def _prepare(self, key: str, preparation: Preparation) -> _Task:
        """Read and chunk a partition where that is selected and due; an error is kept in the task."""
        files = self.partitions[key]
        task = _Task(files, self.before.begin(key), self.history.outcome(key, files.version))
        try:
            self._read_and_chunk(task, preparation)
        except Exception as error:  # _begin raises it, after recording what was materialized before it
            task.error = error
        finally:
            preparation.end(files)
        return task

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
                embed_ahead(partition, chunks, target, self.compute, ahead, report)
            except (ModelError, SettingsError):
                raise
            except Exception as error:  # either preparing failed, or embedding meets it again and reports it
                _log.info("partition %r: embedding ahead of its chunks ended: %s", key, describe(error))
        return ahead

    def _read_and_chunk(self, task: _Task, preparation: Preparation) -> None:
        partition, outcome = task.partition, task.outcome
        if self._is_due("raw_documents", outcome):
            # Rows that another run wrote since the source was listed may be newer than these files.
            partition.set_baseline(self.before.partition(outcome.key).state(RAW))
            task.prepared = preparation.take(task.files)
            self._make(task, "raw_documents", lambda: preparation.take_whole(task.files))
        if self._is_due("chunks", outcome):

            def split_stored() -> Prepared:
                with partition.watched(RAW):
                    return preparation.split(outcome.key, partition.rows(RAW, TEXT_COLUMNS))

            prepared = task.prepared
            if prepared is None or (prepared.changed is not None and not self._is_as_recorded(CHUNK_TABLE, partition)):
                task.replace_prepared(split_stored())
            self._make(task, "chunks", split_stored)

    def _make(self, task: _Task, asset: str, prepare_all: Callable[[], Prepared]) -> None:
        """Commit what was prepared, or all of the partition if the rows that were to stay can't be read."""
        try:
            self._commit(task, asset)
        except LakeError as error:
            if error.is_retryable or task.prepared is None or task.prepared.changes is None:
                raise
            _log.warning("partition %r: %s is made anew as a whole: %s", task.outcome.key, asset, describe(error))
            task.replace_prepared(prepare_all())
            self._commit(task, asset)

    def _commit(self, task: _Task, asset: str) -> None:
        partition, outcome, prepared = task.partition, task.outcome, task.prepared
        assert prepared is not None
        provenance, source = self._provenance(asset, outcome), self.pipeline.corpus.source
        if asset == "chunks":
            made = materialize_chunks(partition, prepared, provenance, outcome)
        else:
            made = materialize_raw_documents(partition, prepared, source, task.files, provenance, outcome)
        _note(asset, outcome, made)

    def _begin(self, task: _Task, lanes: Executor) -> Future[_Task]:
        """Record and check what was prepared, and submit it for embedding if that is selected and due."""
        outcome = task.outcome
        try:
            for asset in outcome.replaced:
                self._record(asset, task)
            if task.error is not None:
                raise task.error
        except BaseException:
            task.close()
            raise
        if not self._is_due("embeddings", outcome):
            done: Future[_Task] = Future()
            done.set_result(task)
            return done
        if "chunks" not in outcome.reasons:  # chunks of another run: check them before embedding
            self.checker.check("chunks", task.partition, {})
        return lanes.submit(self._embed, task)

    def _embed(self, task: _Task) -> _Task:
        """Embed a partition's chunks; runs in a thread of `lanes`."""
        outcome = task.outcome
        try:
            made = materialize_embeddings(
                task.partition,
                self._chunk_rows(task),
                self.pipeline.target,
                self.compute,
                self._provenance("embeddings", outcome),
                outcome,
                partial(self.observer.progress, outcome.key),
            )
        except BaseException:
            task.close()
            raise
        _note("embeddings", outcome, made)
        return task

    def _chunk_rows(self, task: _Task) -> ChunkRows:
        """The partition's chunks: as just prepared, where possible."""
        prepared = task.prepared if "chunks" in task.outcome.replaced else None
        stored = StoredChunks(task.partition, self.pipeline.target.prompt)
        if prepared is None:
            return stored
        are_enough = prepared.changed is None or self._is_as_recorded(self.pipeline.target.table, task.partition)
        return PreparedChunks(prepared.chunks, prepared.changed) if are_enough else stored

    def _end(self, task: _Task) -> None:
        """Record and check a partition's embeddings, and report it as finished."""
        with contextlib.closing(task):
            if "embeddings" in task.outcome.replaced:
                self._record("embeddings", task)
        self.observer.finished(task.outcome)

    def _is_due(self, asset: str, outcome: PartitionOutcome) -> bool:
        """Whether the asset is selected, and missing or stale.

        Raises ``PartitionError`` if it is due and one of its inputs was never materialized.
        """
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

    def _is_as_recorded(self, table: TableSpec, partition: PartitionSnapshot) -> bool:
        """Whether the partition's rows are those recorded, so that changed documents alone can be replaced."""
        return self.history.is_as_recorded(table, partition, self.pipeline.code_versions[table.kind])

    def _provenance(self, asset: str, outcome: PartitionOutcome) -> Provenance:
        rewrite = self.history.is_marked_for_repair(asset, outcome.key)
        previous = self.history.version(asset, outcome.key) or ""
        return Provenance(self.run_id, _inputs(asset, outcome), rewrite, previous)

    def _record(self, asset: str, task: _Task) -> None:
        """Record a materialization, then evaluate the asset's checks on it.

        Raises ``PartitionError`` if a blocking check fails; the partition is then recorded as damaged.
        """
        outcome = task.outcome
        self.recorder.materialized(
            asset,
            outcome,
            self.pipeline.code_versions[asset],
            _inputs(asset, outcome),
            self.metadata.of(asset, outcome, self.compute),
        )
        # Only the freshness check of embeddings needs this; what this run materialized is fresh.
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
    """Data versions of the asset's dependencies, by name."""
    return {dependency: outcome.versions[dependency] or "" for dependency in DEPENDENCIES[asset]}


def describe(error: Exception) -> str:
    """The error as one line for logs and results, without secrets."""
    return str(error) if isinstance(error, UserError) else hide_secrets(f"{type(error).__name__}: {error}")
