"""What the workers of a cluster did, for the run's log and its metadata."""

from __future__ import annotations

from dataclasses import dataclass

from embed_assets.cluster.nodes import Node, Replicas
from embed_assets.engine.engine import EngineInfo

_SHOWN_WORKERS = 4


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What one worker did."""

    address: str
    """Of its machine, and its process there."""
    tokens: int
    tokens_per_second: float
    """While it was busy."""
    busy_percent: float
    """Of the time since it had loaded the model."""

    def __str__(self) -> str:
        return f"{self.address}: {self.tokens_per_second:,.0f} tokens/s, {self.busy_percent:.0f} % busy"


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What the cluster did so far."""

    cluster: str
    dashboard: str
    nodes: list[Node]
    replicas: Replicas
    workers: list[WorkerReport]
    """Those alive that did something, the slowest first."""
    starting: int
    """Workers that load the model."""
    tokens_per_second: float
    """Of all workers together, in the time in which any was at work."""
    windows_begun_again: int
    """Windows that were begun by another worker as well, because the first was lost or late: at most so many were
    embedded twice."""
    info: EngineInfo | None
    """Where and how the model runs on a worker that has loaded it."""

    def __str__(self) -> str:
        replicas, cpus, gpus = self.replicas, sum(n.cpus for n in self.nodes), sum(n.gpus for n in self.nodes)
        return (
            f"{self.cluster}, dashboard {self.dashboard or 'none'}: {len(self.nodes)} nodes with {cpus:g} CPUs and "
            f"{gpus:g} GPUs; up to {replicas.most} workers of {replicas.cpus} CPUs and {replicas.gpus:g} GPUs"
        )

    def describe_workers(self) -> str:
        """One line: how many ran, how fast they are together, and how fast and how busy the slowest are each."""
        if not self.workers:
            waiting = "no worker has a place yet" if self.info is None else "workers are at their first windows"
            return f"{self.starting} workers load the model" if self.starting else waiting
        shown = self.workers[:_SHOWN_WORKERS]
        each = "; ".join(map(str, shown))
        slowest = " the slowest:" if len(self.workers) > len(shown) else ""
        again = f"; {self.windows_begun_again} windows were begun again" if self.windows_begun_again else ""
        return f"{len(self.workers)} workers, {self.tokens_per_second:,.0f} tokens/s;{slowest} {each}{again}"

    @property
    def spare_cpus(self) -> int:
        """Of the CPUs that are free now, those that are left when all workers have theirs."""
        return max(0, int(sum(node.free_cpus for node in self.nodes)) - self.replicas.most * self.replicas.cpus)

    @property
    def has_room_for_tasks(self) -> bool:
        """Whether the nodes have more CPUs than all workers take."""
        return sum(node.cpus for node in self.nodes) >= self.replicas.most * self.replicas.cpus + 1

    @property
    def utilization_percent(self) -> float:
        """How busy the workers were on average."""
        return round(sum(w.busy_percent for w in self.workers) / len(self.workers), 1) if self.workers else 0.0
