"""The Ray cluster: connecting to it, or starting a local one, and how many workers fit it."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embed_assets.engine.hardware import available_cores
from embed_assets.errors import EmbeddingError, SettingsError, hide_secrets

_TOKEN = Path.home() / ".ray" / "auth_token"
_MOST_CORES = 4
"""A replica on CPUs takes no more unless told to: a model's batches do not speed up beyond, more replicas do."""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Where and how widely to run."""

    address: str | None = None
    """Of the head, or "auto"; None starts a local Ray for the run."""
    replicas: tuple[int, int] | None = None
    """At least and at most so many; None: as many as fit the cluster."""
    gpus_per_replica: float | None = None
    """None: one, if the cluster has GPUs and the device is not the CPU."""
    cpus_per_replica: int | None = None
    """None: one beside a GPU, else up to `_MOST_CORES`."""
    wait_seconds: float = 120.0
    """How long the first worker may take to find a place."""
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, and what it offers."""

    node_id: str
    cpus: float
    gpus: float
    free_cpus: float
    """Those that nobody has at present."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Workers: how many, and what each takes."""

    least: int
    most: int
    cpus: int
    gpus: float


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


def require_ray() -> None:
    """Raise ``SettingsError`` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise SettingsError(
            "EMBED_COMPUTE=ray needs Ray, which is not installed; run pip install 'embed-assets[ray]' "
            "or set EMBED_COMPUTE=local"
        )


def connect(options: RayOptions) -> Cluster:
    """A connection to the cluster at the address, else to a local Ray that is started for it.

    Raises ``SettingsError`` when it can't be had.
    """
    require_ray()
    # Nothing about people's clusters goes anywhere, unless they say so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A call after the end is an error, not a new connection to whatever cluster there is.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray

    url = _init(ray, options.address).dashboard_url
    address = str(ray.get_runtime_context().gcs_address)
    return Cluster(address, f"http://{url}" if url else "", options.address is None)


def _init(ray: Any, address: str | None) -> Any:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
    try:
        if address is None:
            return ray.init(address="local", num_cpus=available_cores(), **quiet)
        if address != "auto":
            probe(address)
        # Workers run this very code, wherever they are. A Ray job brings its own.
        shipped = None if _is_in_job() else {"py_modules": [str(Path(__file__).parent.parent)]}
        with_environment: dict[str, Any] = {"address": address, "runtime_env": shipped, **quiet}
        try:
            return ray.init(**with_environment)
        except ConnectionError:
            if not _use_token():
                raise
            return ray.init(**with_environment)
    except Exception as error:
        ray.shutdown()
        where = "a local Ray can't be started" if address is None else f"no connection to EMBED_RAY_ADDRESS={address!r}"
        reason = hide_secrets(" ".join(str(error).split())[:400])
        raise SettingsError(
            f"{where}: {reason}; the cluster must run, with the Ray and Python of this process, "
            "and this machine must be one of its nodes",
            is_retryable=not isinstance(error, ValueError) and "ersion mismatch" not in reason,
        ) from error


def _use_token() -> bool:
    """From now on, show clusters the user's token, as Ray's own commands do; False where there is none.

    Ray makes one for a local cluster, and then asks for it on all that are started later.
    """
    has_token = bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)) or _TOKEN.exists()
    if "RAY_AUTH_MODE" in os.environ or not has_token:
        return False
    import ray._raylet

    os.environ["RAY_AUTH_MODE"] = "token"
    core: Any = ray._raylet
    core.Config.initialize("")  # reads it again
    return True


def _is_in_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def disconnect(seconds: float = 10.0) -> None:
    """End the connection, and a local Ray. A head that is gone is not waited for."""
    import ray

    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    thread.join(seconds)


def probe(address: str) -> None:
    """Raise OSError when nobody listens at the head's address.

    A call by Ray would wait for it for a minute, and then end this process.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def list_nodes() -> list[Node]:
    """What the cluster's machines offer now."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    alive = {str(node["NodeID"]): node["Resources"] for node in ray.nodes() if node["Alive"]}
    return [
        Node(name, float(has.get("CPU", 0)), float(has.get("GPU", 0)), float(free.get(name, {}).get("CPU", 0)))
        for name, has in alive.items()
    ]


def plan_replicas(nodes: Sequence[Node], options: RayOptions) -> Replicas:
    """How many workers, and what each takes. Raises ``SettingsError`` when the settings contradict each other."""
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
    fit = sum(_fitting(node, cpus, gpus) for node in nodes)
    least, most = options.replicas or (1, max(1, fit))
    return Replicas(least, most, cpus, gpus)


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
    """Raise ``SettingsError`` where a worker will never fit: on this machine alone, nothing is added later."""
    if cluster.is_started_here and not sum(_fitting(node, replicas.cpus, replicas.gpus) for node in nodes):
        raise SettingsError(no_room(cluster, nodes, replicas))


def no_room(cluster: Cluster, nodes: Sequence[Node], replicas: Replicas) -> str:
    """Why no worker has started."""
    return (
        f"no worker fits: {_offer(cluster, nodes, replicas)}, or others use them; add nodes, set EMBED_DEVICE=cpu, "
        "or lower EMBED_RAY_CPUS_PER_REPLICA or EMBED_RAY_GPUS_PER_REPLICA"
    )


def workers_lost(cluster: Cluster, nodes: Sequence[Node], replicas: Replicas, seconds: float) -> EmbeddingError:
    """What to say when the nodes of all workers are gone, and no other ones came for so long."""
    return EmbeddingError(
        f"all workers were lost, and for {seconds:g} s no node has come for others: "
        f"{_offer(cluster, nodes, replicas)}; windows that were finished are kept, run again when there are nodes",
        is_retryable=True,
    )


def _offer(cluster: Cluster, nodes: Sequence[Node], replicas: Replicas) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return (
        f"a replica takes {replicas.cpus} CPUs and {replicas.gpus:g} GPUs of one node, {cluster} has "
        f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes"
    )


def gave_up(cluster: Cluster | None, error: Exception) -> EmbeddingError:
    """What to say when Ray ends a dataset, as it does when its memory monitor ends one of few workers of a node."""
    if "out of memory" in str(error).lower():
        return EmbeddingError(
            f"a worker of {cluster} took more memory than its node has, and Ray ended it; windows that were finished "
            "are kept; run again with more memory per worker (EMBED_RAY_CPUS_PER_REPLICA, EMBED_RAY_REPLICAS), or "
            "lower EMBED_MAX_BATCH_TOKENS",
            is_retryable=True,
        )
    lines = [line for line in hide_secrets(str(error)).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {' '.join(lines[-1:])[:300]}"
    return EmbeddingError(f"{cluster} gave up ({reason}); run again", is_retryable=True)


def lost(cluster: Cluster, reason: str) -> EmbeddingError:
    """What to say when the cluster does not answer any more."""
    return EmbeddingError(
        f"{cluster} was lost: it has not answered for a while ({hide_secrets(reason)[:200]}); "
        "windows that were finished are kept, run again when it is back",
        is_retryable=True,
    )
