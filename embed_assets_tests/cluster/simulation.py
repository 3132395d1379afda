"""A large job on a cluster of many nodes, simulated on one machine: planned, and synced by the fake model.

    python -m embed_assets_tests.cluster.simulation [PARTITIONS] [CHUNKS_PER_PARTITION] [NODES]

All is real but the model and the nodes, which are processes of this machine: documents, chunks, Dagster's run, windows,
workers, staging, commits.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from embed_assets.defs.instance import open_instance
from embed_assets.engine.capacity import Capacity, estimate_capacity
from embed_assets.engine.metrics import ModelCost
from embed_assets_tests.cluster.clusters import ray_cluster
from embed_assets_tests.conftest import REPOSITORY
from embed_assets_tests.defs.dagster_runs import latest

BGE_BASE = ModelCost(12 * 12 * 768 * 768, 12 * 768)
_LINE = "chunk {} of partition {} says one two three four five six seven.\n\n"
_CHUNK_TOKENS = 16


@dataclass(slots=True)
class Memory:
    """Of the processes that one has of each, whatever the corpus; the most that was seen, in bytes."""

    before: int = 0
    """Of the run's process, when it first had one that drives Ray: all libraries are loaded."""
    run: int = 0
    """The run's process: reads, chunks, commits."""
    driver: int = 0
    """Its child that drives Ray and hands out the windows."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What it came to."""

    planned: Capacity
    """For bge-base on 8 A100, with the tokens that `plan --count` counted."""
    planned_chunks: int
    plan_seconds: float
    chunks: int
    failed: list[str]
    sync_seconds: float
    workers: int
    """That ran, by the metadata of the last partition."""
    memory: Memory = field(default_factory=Memory)
    verified: bool = False


def write_corpus(folder: Path, partitions: int, chunks: int) -> None:
    """A folder for each partition, with one document of so many paragraphs of a chunk each."""
    for partition in range(partitions):
        (folder / f"p{partition:05d}").mkdir(parents=True)
        with (folder / f"p{partition:05d}/document.txt").open("w") as file:
            file.writelines(_LINE.format(n, partition) for n in range(chunks))


def simulate(partitions: int, chunks: int, nodes: int) -> Simulated:
    """Plan and sync so many partitions of so many chunks each on a cluster of so many nodes."""
    with tempfile.TemporaryDirectory() as name, ray_cluster(nodes) as cluster:
        folder = Path(name)
        shutil.copy(REPOSITORY / "dagster.yaml", folder)
        write_corpus(folder / "landing", partitions, chunks)
        settings = {
            "EMBED_MODEL": "fake:8",
            "EMBED_CHUNK_TOKENS": str(_CHUNK_TOKENS),
            "EMBED_COMPUTE": "ray",
            "EMBED_RAY_ADDRESS": cluster.address,
            "EMBED_RAY_REPLICAS": str(nodes),
        }
        plan, plan_seconds = _command(folder, settings, "plan", "--count")
        memory = Memory()
        synced, sync_seconds = _command(folder, settings, "sync", memory=memory)
        with contextlib.chdir(folder), open_instance() as instance:
            metadata = latest(instance, "embeddings", max(synced["partitions"])).metadata
        return Simulated(
            estimate_capacity(BGE_BASE, plan["tokens"], _CHUNK_TOKENS, "A100", devices=8, price_per_hour=1.5),
            plan["chunks_to_embed"],
            plan_seconds,
            synced["embedded"],
            [key for key, result in synced["partitions"].items() if result["error"]],
            sync_seconds,
            int(str(metadata["ray_workers"].value)),
            memory,
            _command(folder, settings, "verify")[0]["ok"],
        )


def _command(
    folder: Path, settings: dict[str, str], *arguments: str, memory: Memory | None = None
) -> tuple[Any, float]:
    """What a command says, and the seconds it took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "embed_assets.cli", *arguments, "--json"]
    environment = os.environ | settings | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    )
    if memory is not None:
        threading.Thread(target=_watch, args=(process.pid, memory), daemon=True).start()
    answer = json.loads(process.communicate()[0])
    return answer, round(time.perf_counter() - started, 1)


def _watch(pid: int, memory: Memory) -> None:
    """In a thread: keep the most that each process holds, until the run's ends."""
    try:
        run = psutil.Process(pid)
        while run.is_running() and run.status() != psutil.STATUS_ZOMBIE:
            memory.run = max(memory.run, run.memory_info().rss)
            drivers = [child for child in run.children() if "cluster.driver" in " ".join(child.cmdline())]
            if drivers and not memory.before:
                memory.before = run.memory_info().rss
            memory.driver = max([memory.driver, *map(_resident, drivers)])
            time.sleep(1)
    except psutil.NoSuchProcess:
        return


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    print(json.dumps(asdict(simulate(*(numbers + [1000, 10_000, 8][len(numbers) :]))), indent=2))
