"""Embed windows of texts on the workers of a Ray cluster.

window ─▶ worker: embed, stage on the lake's storage ─▶ confirmation ─▶ this process: read, commit
"""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from embed_assets.cluster.nodes import RayOptions
from embed_assets.cluster.process import ClusterProcess
from embed_assets.cluster.report import PoolReport
from embed_assets.cluster.supervisor import WINDOWS_PER_WORKER
from embed_assets.cluster.worker import Done
from embed_assets.engine.backend import EmbeddedWindow, Embedder, OnTick, Window
from embed_assets.engine.code_version import code_version
from embed_assets.engine.engine import Engine, EngineInfo, configured
from embed_assets.engine.metrics import EngineStats
from embed_assets.engine.providers.catalog import provider_of
from embed_assets.engine.tokenization import TokenizedTexts, token_lists
from embed_assets.errors import LakeError, ModelError
from embed_assets.lake.staging import Staging, bytes_of
from embed_assets.lake.tables import CHUNK_TABLE, RAW, Lake, TableSpec
from embed_assets.settings import load_settings
from embed_assets.stages.compute import Compute, LocalCompute, WindowSize
from embed_assets.stages.embeddings import window_rows
from embed_assets.stages.pipeline import Pipeline

T = TypeVar("T")

_WINDOW_SECONDS = 5.0
"""Target duration of a window. Shorter than in one process, to spread partitions and to lose less with a worker."""
_PART_TEXTS = 2048
"""Texts per part of a window."""
_LEAST_TEXTS = 64
"""Texts a window should have even if a partition is spread over all workers: fewer make inefficient batches."""
_LEAST_SECONDS = 0.5
"""Work a window should have: sending it, staging it and reading it back takes some hundredths of a second."""
_SECONDS_BETWEEN_NEWS = 10.0
"""Interval of the workers' lines in the run's log: shorter is more current, longer less noisy."""
_TICK_SECONDS = 2.0
"""Interval of progress reports and of checks that the workers are alive."""
_SENT = pa.schema(
    [
        pa.field("input_hash", pa.string(), False),
        pa.field("text", pa.string(), False),
        pa.field("input_ids", pa.list_(pa.int32())),
    ]
)


def lake_id(lake: Lake) -> str:
    """Unique id of the lake, from its table of chunks; empty if that does not exist."""
    chunks = lake.open(CHUNK_TABLE)
    return "" if chunks is None else str(chunks.metadata().id)


@dataclass(frozen=True)
class WorkerRecipe:
    """What a worker on another machine needs in order to do this process's work."""

    settings: dict[str, object]
    """All fields of `Settings`."""
    fingerprint: str
    """Fingerprint of the space that the settings must resolve to."""
    table: TableSpec
    lake_id: str
    """Delta's id of the table of chunks, which tells lakes at the same path apart."""
    code: str
    """`code_version` of the process that asks."""

    def open(self) -> LakeWorker:
        """Load the model. Raises as `pipeline` does."""
        pipeline = self.pipeline()
        engine = pipeline.model.engine
        _ = engine.embedder  # loads the model
        return LakeWorker(engine, pipeline.lake, self.table)

    def pipeline(self) -> Pipeline:
        """The pipeline, after checking that this machine has the same code, model and lake.

        Raises ``ModelError`` or ``LakeError`` if one of them differs.
        """
        if code_version() != self.code:
            raise ModelError(
                f"workers must run the same embed_assets as the process that started them: they have the code "
                f"{code_version()}, it has {self.code}; install the same version on the cluster"
            )
        pipeline = Pipeline.from_settings(load_settings(**self.settings))
        found = pipeline.model.space.fingerprint
        if found != self.fingerprint:
            raise ModelError(
                "workers must have the model of the process that started them: "
                f"EMBED_MODEL={pipeline.settings.model!r} has the fingerprint {found[:8]!r} there, and "
                f"{self.fingerprint[:8]!r} here; put the same files on all machines, or name an EMBED_REVISION"
            )
        if lake_id(pipeline.lake) != self.lake_id:
            raise LakeError(
                f"workers must reach the lake of the process that started them: {pipeline.lake.root!r} is another one "
                "there, or none; set EMBED_LAKE to a bucket or to a folder that all machines share"
            )
        return pipeline


def worker_recipe(pipeline: Pipeline) -> WorkerRecipe:
    """What a worker elsewhere needs to do this pipeline's work: its settings, with places that mean the same in any
    folder. Creates the tables of documents and chunks unless they exist, because workers know the lake by them.
    """
    settings = pipeline.settings
    folder = Path(settings.model)
    model = str(folder.absolute()) if folder.is_dir() else settings.model
    # All fields, so that the environment of a worker's machine has no effect.
    places = {"source": pipeline.corpus.source.root, "lake": pipeline.lake.root, "model": model}
    fields = settings.model_dump() | places | {"compute": "local"}
    space = pipeline.model.space
    for table in (RAW, CHUNK_TABLE):
        pipeline.lake.create(table)
    return WorkerRecipe(fields, space.fingerprint, pipeline.embeddings_table, lake_id(pipeline.lake), code_version())


def open_compute(pipeline: Pipeline) -> Compute:
    """Where a run's texts are embedded, by EMBED_COMPUTE. To be closed at the run's end.

    Raises ``SettingsError`` when Ray is asked for and not installed.
    """
    settings, model = pipeline.settings, pipeline.model
    if settings.compute == "local":
        return LocalCompute(model.start, lambda: model.info)
    runs_on_gpu = bool(provider_of(settings.model, model.options).libraries) and settings.precision != "int8"
    options = RayOptions(
        address=settings.ray_address,
        replicas=settings.replica_range,
        gpus_per_replica=settings.ray_gpus_per_replica,
        cpus_per_replica=settings.ray_cpus_per_replica,
        wait_seconds=settings.ray_wait_seconds,
        device=settings.device if runs_on_gpu else "cpu",
    )
    return RayCompute(ClusterProcess(lambda: worker_recipe(pipeline), options), configured(model.options))


class LakeWorker:
    """Embeds windows and stages them."""

    def __init__(self, engine: Engine, lake: Lake, table: TableSpec) -> None:
        self._engine, self._lake, self._table = engine, lake, table

    @property
    def info(self) -> EngineInfo:
        """Where and how the model runs."""
        return self._engine.info

    def run(self, content: bytes, is_retry: bool, on_tick: OnTick = lambda texts, tokens: None) -> Done:
        """Embed a window and stage it; answers how many rows that are, and why texts have none."""
        with pa.ipc.open_stream(content) as stream:
            header = {k.decode(): v.decode() for k, v in (stream.schema.metadata or {}).items()}
            sent = stream.read_next_batch()
        staging = Staging(self._lake, self._table, header["key"])
        if is_retry and _is_staged(staging, header["name"], sent.num_rows):
            return Done(_answer(sent.num_rows, {}), EngineStats())
        parts = [_window(sent.slice(start, _PART_TEXTS)) for start in range(0, sent.num_rows, _PART_TEXTS)]
        embedded = self._embed(parts, int(header["expected"]), on_tick)
        batch = window_rows(embedded)
        if batch.num_rows:
            staging.write(batch, header["name"])
        return Done(_answer(batch.num_rows, embedded.rejected), embedded.stats)

    def _embed(self, parts: Sequence[Window], expected: int, on_tick: OnTick) -> EmbeddedWindow:
        """Embed a window in parts, of which one is prepared while the previous one is on the device."""
        window = Window([t for part in parts for t in part.texts], [h for part in parts for h in part.hashes])
        embedder = self._engine.embedder_for(window.texts, expected)
        done = list(embedder.embed_windows(iter(parts), on_tick))
        stats = EngineStats()
        rejected: dict[int, str] = {}
        start = 0
        for part in done:
            stats.add(part.stats)
            rejected |= {start + row: reason for row, reason in part.rejected.items()}
            start += len(part.window.texts)
        vectors = np.concatenate([part.vectors for part in done])
        return EmbeddedWindow(window, vectors, np.concatenate([part.is_truncated for part in done]), rejected, stats)


def _window(sent: pa.RecordBatch) -> Window:
    tokens = TokenizedTexts.from_lists(sent.column("input_ids"))
    return Window(sent.column("text").to_pylist(), sent.column("input_hash").to_pylist(), tokens)


def _is_staged(staging: Staging, name: str, rows: int) -> bool:
    """Whether a lost worker had staged the whole window. If it is missing or damaged, it is embedded again."""
    try:
        return bool(staging.read_window(name).num_rows == rows)
    except LakeError:
        return False


def _answer(rows: int, rejected: Mapping[int, str]) -> str:
    """What a worker says of a window: rows it staged, and why texts have none, by their place in the window."""
    return json.dumps({"rows": rows, "rejected": rejected})


class RayCompute:
    """The model on the workers of a Ray cluster, for one run."""

    max_partitions = 16

    def __init__(
        self, pool: ClusterProcess, configured: EngineInfo, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool, self._configured, self._clock = pool, configured, clock
        self._size = WindowSize(_WINDOW_SECONDS)
        self._room: threading.Semaphore | None = None
        self._spare_cpus: int | None = None
        self._is_introduced = False
        self._next_news = -math.inf
        self._lock = threading.Lock()

    @property
    def partitions_in_flight(self) -> int:
        """Enough to keep all workers busy with small partitions."""
        return min(self.max_partitions, WINDOWS_PER_WORKER * max(2, self._pool.most_replicas))

    def news(self) -> list[str]:
        """Where the workers are, once, then every few seconds how fast they are, and what they warned of."""
        lines, now = self._pool.take_news(), self._clock()
        report = self._pool.report if now >= self._next_news else None
        if report is None:
            return lines
        if not self._is_introduced:
            lines.append(str(report))
        self._is_introduced, self._next_news = True, now + _SECONDS_BETWEEN_NEWS
        return [*lines, report.describe_workers()]

    def require_alive(self) -> None:
        """Raise what ended the workers, if it is over."""
        self._pool.check()

    @property
    def info(self) -> EngineInfo:
        """Where and how the model runs on the workers; as configured, before one has loaded it."""
        return self._pool.info or self._configured

    @property
    def report(self) -> PoolReport | None:
        """What the workers did."""
        return self._pool.report

    def spare_cpus(self) -> int:
        """CPUs of the cluster that were free at the start, and are left when all workers have theirs."""
        if self._spare_cpus is None:
            self._pool.connect()
            report = self._pool.report
            self._spare_cpus = 0 if report is None else report.spare_cpus
        return self._spare_cpus

    def run_task(self, call: Callable[[], T]) -> Future[T]:
        """Have a call done on any machine of the cluster with a free CPU."""
        return self._pool.run_task(call)

    @property
    def has_room_for_tasks(self) -> bool:
        """Whether the cluster still has more CPUs than the workers take."""
        report = self._pool.report
        return report is not None and report.has_room_for_tasks

    def is_full(self, texts: int, tokens: int, expected: int) -> bool:
        """They take about the window's time, or are this partition's share of a worker and pay for the way there."""
        share = max(_LEAST_TEXTS, expected // (WINDOWS_PER_WORKER * self._pool.most_replicas))
        pays = tokens >= (self._size.tokens or 0) * _LEAST_SECONDS / _WINDOW_SECONDS
        return (texts >= share and pays) or self._size.is_full(texts, tokens)

    def adapt(self, stats: EngineStats) -> None:
        """Adapt the size of later windows to the speed of a finished one."""
        with self._lock:  # several partitions are embedded at once
            self._size.adapt(stats)

    def start(self, key: str, texts: Sequence[str], expected: int) -> Embedder:
        """The workers, once the first has loaded the model."""
        self._pool.start()
        with self._lock:
            if self._room is None:
                # What waits in this process, in the driver and with the workers is bounded, whatever the corpus.
                self._room = threading.Semaphore((WINDOWS_PER_WORKER + 1) * self._pool.most_replicas + 1)
        return _RayEmbedder(self._pool, self._room, key, self.info.dimension, expected)

    def close(self) -> None:
        """End the workers, and a local Ray."""
        self._pool.close()


class _RayEmbedder:
    """The workers, for the windows of one partition."""

    def __init__(
        self, pool: ClusterProcess, room: threading.Semaphore, key: str, dimension: int, expected: int
    ) -> None:
        self._pool, self._room, self._key, self._expected = pool, room, key, expected
        self.dimension = dimension
        self._texts = self._tokens = 0

    def embed_windows(self, windows: Iterable[Window], on_tick: OnTick) -> Iterator[EmbeddedWindow]:
        under_way: dict[Future[Done], tuple[Window, str]] = {}
        upcoming = iter(windows)
        following = next(upcoming, None)
        try:
            while following is not None or under_way:
                if following is not None and self._room.acquire(timeout=0 if under_way else _TICK_SECONDS):
                    self._send(following, under_way)
                    following = next(upcoming, None)
                    continue
                self._pool.check()
                finished, _ = wait(under_way, _TICK_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    window, name = under_way.pop(future)
                    self._room.release()
                    yield self._received(window, future.result(), name)
                on_tick(self._texts, self._tokens)
        finally:
            for future in under_way:
                future.add_done_callback(lambda _: self._room.release())

    def _send(self, window: Window, under_way: dict[Future[Done], tuple[Window, str]]) -> None:
        name = uuid.uuid4().hex
        header = {"key": self._key, "name": name, "expected": str(self._expected)}
        ids = token_lists(window.tokens, len(window.texts))
        arrays = [pa.array(window.hashes, pa.string()), pa.array(window.texts, pa.string()), ids]
        batch = pa.RecordBatch.from_arrays(arrays, schema=_SENT.with_metadata(header))
        try:
            under_way[self._pool.submit(bytes_of(batch))] = (window, name)
        except BaseException:
            self._room.release()
            raise

    def _received(self, window: Window, done: Done, name: str) -> EmbeddedWindow:
        answer = json.loads(done.answer)
        self._texts += done.stats.texts
        self._tokens += done.stats.tokens
        rejected = {int(row): str(reason) for row, reason in answer["rejected"].items()}
        none = np.empty((0, self.dimension), np.float32)
        staged_as = name if answer["rows"] else None
        return EmbeddedWindow(window, none, np.empty(0, bool), rejected, done.stats, staged_as)
