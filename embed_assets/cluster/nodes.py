"""What a cluster offers, and how many replicas of the model fit it. Pure functions over plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from embed_assets.errors import SettingsError

_MOST_CORES = 4
"""CPUs of a replica without a GPU, unless configured: a model's batches do not speed up beyond, more replicas do."""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Where and how widely to run."""

    address: str | None = None
    """Of the head, or "auto"; None starts a local Ray for the run."""
    replicas: tuple[int, int] | None = None
    """Least and most; None: as many as fit the cluster."""
    gpus_per_replica: float | None = None
    """None: one, if the cluster has GPUs and the device is not the CPU."""
    cpus_per_replica: int | None = None
    """None: one beside a GPU, else up to `_MOST_CORES`."""
    wait_seconds: float = 120.0
    """How long to wait for a node that has room for a replica."""
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, and what it offers."""

    node_id: str
    cpus: float
    gpus: float
    free_cpus: float
    """Those that nobody uses at present."""
    is_draining: bool = False
    """Whether it is about to go, as a spot machine after its notice."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Copies of the model: how many, and what each takes."""

    least: int
    most: int
    cpus: int
    gpus: float
    scales_down: bool = False
    """Whether those above the least number are removed while they have nothing to do."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A connection."""

    address: str
    """host:port of the head."""
    dashboard: str
    """URL; empty without one."""
    is_started_here: bool

    def __str__(self) -> str:
        return "Ray on this machine" if self.is_started_here else f"the Ray cluster at {self.address}"


def plan_replicas(nodes: Sequence[Node], options: RayOptions) -> Replicas:
    """How many replicas, and what each takes. Raises ``SettingsError`` when settings contradict each other."""
    wants_gpu = options.device.startswith("cuda") or bool(options.gpus_per_replica)
    if options.device not in ("auto", "cpu", "cuda"):
        raise SettingsError(
            f"with EMBED_COMPUTE=ray, EMBED_DEVICE must be auto, cpu or cuda, got {options.device!r}; "
            "Ray gives each replica its GPU"
        )
    if options.device == "cpu" and options.gpus_per_replica:
        raise SettingsError(
            f"EMBED_DEVICE=cpu uses no GPU, got EMBED_RAY_GPUS_PER_REPLICA={options.gpus_per_replica:g}; unset one"
        )
    if options.device == "cuda" and options.gpus_per_replica == 0:
        raise SettingsError("EMBED_DEVICE=cuda needs a GPU, got EMBED_RAY_GPUS_PER_REPLICA=0; unset one")
    has_gpus = options.device == "auto" and options.gpus_per_replica is None and any(node.gpus for node in nodes)
    gpus = (options.gpus_per_replica or 1.0) if wants_gpu or has_gpus else 0.0
    cpus = options.cpus_per_replica or (1 if gpus else _cores_per_replica(nodes))
    least, most = options.replicas or (1, max(1, sum(_fitting(node, cpus, gpus) for node in nodes)))
    return Replicas(least, most, cpus, gpus, scales_down=options.replicas is not None)


def _cores_per_replica(nodes: Sequence[Node]) -> int:
    """As many as every machine has free that has any: a job's own process may hold some for as long as it runs."""
    free = [node.free_cpus for node in nodes if node.free_cpus >= 1]
    smallest = min(free or (node.cpus for node in nodes if node.cpus >= 1), default=1.0)
    return max(1, min(_MOST_CORES, int(smallest)))


def _fitting(node: Node, cpus: int, gpus: float) -> int:
    by_cpu = math.floor(node.cpus / cpus)
    # Replicas share a GPU, but none spans two.
    by_gpu = by_cpu if not gpus else math.floor(node.gpus / gpus) if gpus >= 1 else int(node.gpus) * int(1 / gpus)
    return min(by_cpu, by_gpu)


def check_room(cluster: Cluster, nodes: Sequence[Node], replicas: Replicas) -> None:
    """Raise ``SettingsError`` if no replica will ever fit: to this machine alone, nothing is added later."""
    if cluster.is_started_here and not sum(_fitting(node, replicas.cpus, replicas.gpus) for node in nodes):
        raise SettingsError(no_room(cluster, nodes, replicas))


def no_room(cluster: Cluster, nodes: Sequence[Node], replicas: Replicas) -> str:
    """Why no replica has started."""
    return (
        f"no worker fits: {_offer(cluster, nodes, replicas)}, or others use them; add nodes, set EMBED_DEVICE=cpu, "
        "or lower EMBED_RAY_CPUS_PER_REPLICA or EMBED_RAY_GPUS_PER_REPLICA"
    )


def nodes_lost(cluster: Cluster, nodes: Sequence[Node], replicas: Replicas, seconds: float) -> str:
    """What to say when the nodes of all replicas are gone, and no other ones came for so long."""
    return (
        f"all workers were lost, and for {seconds:g} s no node has come for others: "
        f"{_offer(cluster, nodes, replicas)}; windows that were finished are kept, run again when there are nodes"
    )


def _offer(cluster: Cluster, nodes: Sequence[Node], replicas: Replicas) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return (
        f"a replica takes {replicas.cpus} CPUs and {replicas.gpus:g} GPUs of one node, {cluster} has "
        f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes"
    )
