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
from embed_assets.defs.names import ASSETS, DEPENDENCIES, SOURCE
from embed_assets.defs.recording import Recorder
from embed_assets.defs.report import Made, Reporter
from embed_assets.defs.results import PartitionResult, RunObserver
from embed_assets.defs.staleness import History, Status
from embed_assets.errors import ModelError, PartitionError, SettingsError, UserError, hide_secrets
from embed_assets.lake.reader import PartitionState
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.stages.embeddings import Embeddings, Work
from embed_assets.stages.lanes import lanes_for
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.raw_documents import RawDocuments
from embed_assets.stages.windows import Compute

_log = logging.getLogger(__name__)
_WAIT_SECONDS = 2.0


@dataclass(slots=True)
class _Prepared:
    """A partition that was read and chunked. A field is None where that stage was fresh."""

    versions: dict[str, str | None]
    """Data version of the source and each asset, after what ran so far."""
    reasons: dict[str, Sequence[str]] = field(default_factory=dict)
    """Per asset that ran, why."""
    raw: RawDocuments | None = None
    chunks: Replaced | None = None
    embeddings: Embeddings | None = None
    result: PartitionResult = field(default_factory=lambda: PartitionResult("fresh"))
    """Its numbers so far."""
    error: Exception | None = None
    """Why it went no further."""

    @property
    def written(self) -> list[PartitionState]:
        """How the rows lie that were made."""
        made = (None if self.raw is None else self.raw.replaced, self.chunks)
        return [replaced.state for replaced in made if replaced is not None]


@dataclass(slots=True)
class CorpusRun:
    """One run over some partitions and some of the three assets."""

    pipeline: Pipeline
    compute: Compute
    """Where texts are embedded. It is closed when the partitions are done."""
    observer: RunObserver
    run_id: str
    recorder: Recorder
    reporter: Reporter
    checker: Checker
    partitions: Mapping[str, SourcePartition]
    listed: Mapping[str, PartitionState]
    """What raw_documents had of each partition when the source was listed."""
    keys: Sequence[str]
    selected: Sequence[str]

    @property
    def history(self) -> History:
        """What was recorded before this run."""
        return self.recorder.history

    def materialize(self) -> dict[str, Exception]:
        """Bring every partition up to date; returns the errors of those that failed, by key.

        While partitions are embedded, one or as many as `compute` likes, the next one is read and chunked by another
        thread. All that is recorded is recorded by this one.
        """
        failures: dict[str, Exception] = {}
        self.observer.on_start({key: self.partitions[key].byte_size for key in self.keys})
        with (
            ThreadPoolExecutor(1, thread_name_prefix="prepare") as ahead,
            lanes_for(self.compute) as lanes,
            contextlib.closing(self.compute),
            self.pipeline.lake.session(),
        ):
            upcoming = ahead.submit(self._prepare, self.keys[0]) if self.keys else None
            under_way: dict[Future[_Prepared], str] = {}
            for place, key in enumerate(self.keys):
                assert upcoming is not None
                current, rest = upcoming, range(place + 1, len(self.keys))
                while not current.done():
                    self._end_finished(under_way, failures, current)
                lost = self._lost() if rest else None
                if rest and lost is None:
                    upcoming = ahead.submit(self._prepare, self.keys[place + 1])
                with self._failing(key, failures):
                    under_way[self._begin(key, current.result(), lanes)] = key
                while len(under_way) >= self.compute.partitions_in_flight:
                    self._end_finished(under_way, failures)
                if lost is not None:
                    self._fail_all((self.keys[other] for other in rest), lost, failures)
                    break
            while under_way:
                self._end_finished(under_way, failures)
        self.recorder.drain()
        for key, unwritten in self.recorder.errors.items():
            if key not in failures:
                failures[key] = unwritten
                self.observer.on_partition(key, PartitionResult("failed", error=describe(unwritten)))
        return failures

    def _lost(self) -> UserError | None:
        """Why no text will be embedded any more."""
        try:
            self.compute.check()
        except UserError as error:
            return error
        return None

    def _fail_all(self, keys: Iterable[str], error: UserError, failures: dict[str, Exception]) -> None:
        """No use in reading what can't be embedded."""
        for key in keys:
            with self._failing(key, failures):
                raise error

    def _end_finished(
        self,
        under_way: dict[Future[_Prepared], str],
        failures: dict[str, Exception],
        *others: Future[_Prepared],
    ) -> None:
        """Wait a while for a partition to be embedded, or one of the others; record what is."""
        finished, _ = wait([*under_way, *others], _WAIT_SECONDS, FIRST_COMPLETED)
        for line in self.compute.news():
            self.observer.on_news(line)
        for future in finished.difference(others):
            key = under_way.pop(future)
            with self._failing(key, failures):
                self.observer.on_partition(key, self._end(key, future.result()))

    @contextlib.contextmanager
    def _failing(self, key: str, failures: dict[str, Exception]) -> Iterator[None]:
        """An error in here is the partition's, unless it is about the model."""
        try:
            yield
        except (ModelError, SettingsError):
            raise  # a model that can't be loaded is no partition's fault
        except Exception as error:
            failures[key] = error
            if not isinstance(error, UserError):
                trace = "".join(traceback.format_exception(error))
                _log.error("partition %r failed unexpectedly\n%s", key, hide_secrets(trace))
            self.observer.on_partition(key, PartitionResult("failed", error=describe(error)))

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

    def _prepare(self, key: str) -> _Prepared:
        """Read and chunk a partition, as far as that is selected and due."""
        partition = self.partitions[key]
        prepared = _Prepared(
            {SOURCE: partition.version, **{asset: self.history.version(asset, key) for asset in ASSETS}}
        )
        try:
            self._read_and_chunk(partition, prepared)
        except Exception as error:  # raised again by _finish, once what was made before it is recorded
            prepared.error = error
        return prepared

    def _read_and_chunk(self, partition: SourcePartition, prepared: _Prepared) -> None:
        key = partition.key
        if self._is_due("raw_documents", key, prepared):
            provenance = self._provenance("raw_documents", prepared)
            known, rewrite = self.listed.get(key), self.history.is_marked_for_repair("raw_documents", key)
            prepared.raw = self.pipeline.materialize_raw_documents(partition, provenance, known, rewrite)
            prepared.versions["raw_documents"] = prepared.raw.replaced.data_version
        if self._is_due("chunks", key, prepared):
            provenance = self._provenance("chunks", prepared)
            rewrite = self.history.is_marked_for_repair("chunks", key)
            prepared.chunks = self.pipeline.materialize_chunks(key, provenance, prepared.written, rewrite)
            prepared.versions["chunks"] = prepared.chunks.data_version

    def _begin(self, key: str, prepared: _Prepared, lanes: Executor) -> Future[_Prepared]:
        """Record and check what was prepared, and have it embedded if that is selected and due."""
        result = prepared.result = self.history.known_result(key)
        if prepared.raw is not None:
            result.documents, result.rejected = prepared.raw.documents, prepared.raw.rejected
            self._record("raw_documents", key, prepared, prepared.raw.replaced)
        if prepared.chunks is not None:
            result.chunks = result.reused = prepared.chunks.rows
            self._record("chunks", key, prepared, prepared.chunks)
        if prepared.error is not None:
            raise prepared.error
        if not self._is_due("embeddings", key, prepared):
            done: Future[_Prepared] = Future()
            done.set_result(prepared)
            return done
        if "chunks" not in prepared.reasons:  # made by another run: asked again whether they are worth embedding
            self.checker.check("chunks", key, {})
        return lanes.submit(self._embed, key, prepared)

    def _embed(self, key: str, prepared: _Prepared) -> _Prepared:
        """In a lane: what takes long."""
        prepared.embeddings = self.pipeline.materialize_embeddings(
            key,
            self._provenance("embeddings", prepared),
            self.compute,
            lambda texts, tokens: self.observer.on_window(key, texts, tokens),
            lambda progress: self.observer.on_progress(key, progress),
            rewrite=self.history.is_marked_for_repair("embeddings", key),
            known=prepared.written,
        )
        return prepared

    def _end(self, key: str, prepared: _Prepared) -> PartitionResult:
        """Record and check what was embedded."""
        result = prepared.result
        if prepared.embeddings is not None:
            work, replaced = prepared.embeddings.work, prepared.embeddings.replaced
            prepared.versions["embeddings"] = replaced.data_version
            result.chunks, result.embedded, result.reused = work.chunks, work.embedded, work.reused
            result.dropped, result.tokens = work.dropped, work.engine.tokens
            result.rejected_chunks = work.rejected_chunks
            self._record("embeddings", key, prepared, replaced, work)
        if prepared.reasons:
            result.state = "materialized"
        return result

    def _is_due(self, asset: str, key: str, prepared: _Prepared) -> bool:
        """The asset is selected, and missing or stale. Raises ``PartitionError`` when its inputs were never made."""
        if asset not in self.selected:
            return False
        status = self._status(asset, key, prepared)
        if status.state == "fresh":
            return False
        prepared.reasons[asset] = status.reasons
        for dependency in DEPENDENCIES[asset]:
            if prepared.versions[dependency] is None:
                raise PartitionError(
                    f"{asset} of partition {key!r} needs {dependency}, which was never materialized; select it as well"
                )
        return True

    def _status(self, asset: str, key: str, prepared: _Prepared) -> Status:
        inputs = {dependency: prepared.versions[dependency] for dependency in DEPENDENCIES[asset]}
        return self.history.status(asset, key, self.pipeline.code_versions[asset], inputs)

    def _provenance(self, asset: str, prepared: _Prepared) -> Provenance:
        return Provenance(self.run_id, self._inputs(asset, prepared))

    def _inputs(self, asset: str, prepared: _Prepared) -> dict[str, str]:
        return {dependency: prepared.versions[dependency] or "" for dependency in DEPENDENCIES[asset]}

    def _record(
        self,
        asset: str,
        key: str,
        prepared: _Prepared,
        replaced: Replaced,
        work: Work | None = None,
    ) -> None:
        """Record a materialization, then ask the asset's checks about it.

        Raises ``PartitionError`` when a blocking one says no.
        """
        report = self.compute.report if work else None
        facts = self.compute.facts
        made = Made(asset, key, prepared.reasons[asset], replaced, prepared.result, facts, work or Work(), report)
        self.recorder.materialized(
            asset,
            key,
            replaced.data_version,
            self.pipeline.code_versions[asset],
            self._inputs(asset, prepared),
            self.reporter.metadata(made),
        )
        # Only the check `freshness`, of embeddings, wants to know; what was made in this run is fresh.
        others = [a for a in ASSETS if a not in prepared.reasons] if asset == "embeddings" else []
        stale = {a: s for a in others if (s := self._status(a, key, prepared)).state != "fresh"}
        try:
            self.checker.check(asset, key, stale)
        except PartitionError:
            self.recorder.damaged(asset, key)
            raise


def describe(error: Exception) -> str:
    """What a person is told of a partition's error."""
    return str(error) if isinstance(error, UserError) else hide_secrets(f"{type(error).__name__}: {error}")
