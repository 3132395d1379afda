"""Ray clusters of several nodes on this machine, and workers to try them with."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from embed_assets.cluster.worker import Done
from embed_assets.engine.backend import OnTick, Window
from embed_assets.engine.engine import EngineInfo
from embed_assets.engine.metrics import EngineStats
from embed_assets.errors import ModelError
from embed_assets.records import hash_text
from embed_assets.stages.compute import Compute

STORE_BYTES = 100 << 20
INFO = EngineInfo("cpu", "float32", 1024, "test", 0.0, 1)


@contextlib.contextmanager
def ray_cluster(nodes: int, cpus: int = 1, **head: Any) -> Iterator[Any]:
    """A cluster of so many nodes and a head, by default without CPUs and dashboard; has ``address``, ``head_node`` and
    ``worker_nodes``."""
    # A folder of its own, short enough for sockets: there Ray looks for a cluster when none is named.
    with pytest.MonkeyPatch.context() as environment, tempfile.TemporaryDirectory(prefix="ray") as folder:
        environment.setenv("RAY_TMPDIR", folder)
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        options = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
        # Any ports that are free: a head whose agent finds its own taken by another one's never takes a job.
        ports = {"dashboard_port": None, "dashboard_agent_listen_port": None}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **ports, **options, **head})
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=cpus, wait=False, **options)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            for node in [*cluster.worker_nodes, cluster.head_node]:
                if node is not None:
                    kill(node)


def kill(node: Any) -> None:
    """End a node and all its processes, as a power cut does."""
    node.kill_all_processes(check_alive=False, allow_graceful=False)


def is_at_work(node: Any) -> bool:
    """Whether a worker on it embeds a window. Ray names an actor's process after the method under way."""
    with contextlib.suppress(psutil.Error):  # a process that ended since it was listed
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return any("Replica.run" in " ".join(child.cmdline()) for child in raylet.children())
    return False


def windows_of(compute: Compute, texts: Iterable[tuple[str, int]], expected: int) -> Iterator[Window]:
    """Texts with their tokens in windows, cut as the stage cuts them."""
    found: dict[str, str] = {}
    tokens = 0
    for text, count in texts:
        found[hash_text(text)] = text
        tokens += count
        if compute.is_full(len(found), tokens, expected):
            yield Window(list(found.values()), list(found))
            found, tokens = {}, 0
    if found:
        yield Window(list(found.values()), list(found))


@dataclass(frozen=True)
class EchoRecipe:
    """Workers that give back what they get; some contents have them do something else."""

    log: str = ""
    """File to which every piece of work is written that is begun."""
    error: str = ""
    """Why the model can't be loaded."""
    dies_at_start: bool = False

    def open(self) -> EchoWorker:
        if self.error:
            raise ModelError(self.error)
        if self.dies_at_start:
            os._exit(1)
        return EchoWorker(self.log)


class EchoWorker:
    info = INFO

    def __init__(self, log: str) -> None:
        self._log = log

    def run(self, content: bytes, is_retry: bool, on_tick: OnTick) -> Done:
        is_first = True
        if self._log:
            is_first = content not in Path(self._log).read_bytes().splitlines() if Path(self._log).exists() else True
            with open(self._log, "ab") as file:
                file.write(content + b"\n")
        name, _, seconds = content.partition(b" ")
        if name == b"hang" and is_first:
            time.sleep(300)
        if name == b"die":
            os._exit(1)
        if name == b"break":
            raise ZeroDivisionError("the device is gone")
        if name == b"refuse":
            raise ModelError("not this one")
        time.sleep(float(seconds or 0))
        if name == b"warn":
            logging.getLogger("embed_assets.engine").warning("the budget was halved")
        answer = _node_id() if name == b"where" else content.decode()
        return Done(answer, EngineStats(texts=1, tokens=10, seconds=0.1))


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
