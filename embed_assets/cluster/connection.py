"""Connects to a Ray cluster, or starts a local one, and asks it for its nodes."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any

from embed_assets.cluster.nodes import Cluster, Node, RayOptions
from embed_assets.engine.hardware import available_cores
from embed_assets.errors import SettingsError, hide_secrets

TOKEN_MODE = {"RAY_AUTH_MODE": "token"}
"""Environment of a process that shows clusters the user's token. Ray reads it once, when it is imported."""
_TOKEN = Path.home() / ".ray" / "auth_token"


class TokenRequired(Exception):
    """The cluster asks for a token, which the user has: connect from a process in `TOKEN_MODE`."""


def require_ray() -> None:
    """Raise ``SettingsError`` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise SettingsError(
            "EMBED_COMPUTE=ray needs Ray, which is not installed; run pip install 'embed-assets[ray]' "
            "or set EMBED_COMPUTE=local"
        )


def connect(options: RayOptions) -> Cluster:
    """A connection to the cluster at the address, else to a local Ray that is started for it.

    Raises ``SettingsError`` when it can't be had, and ``TokenRequired``.
    """
    require_ray()
    # Nothing about people's clusters goes anywhere, unless they say so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A call after the end is an error, not a new connection to whatever cluster there is.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray

    try:
        url = _init(ray, options.address).dashboard_url
    except Exception as error:
        ray.shutdown()
        if isinstance(error, ConnectionError) and options.address is not None and _has_unused_token():
            raise TokenRequired from error
        local = options.address is None
        where = "a local Ray can't be started" if local else f"no connection to EMBED_RAY_ADDRESS={options.address!r}"
        reason = hide_secrets(" ".join(str(error).split())[:400])
        raise SettingsError(
            f"{where}: {reason}; the cluster must run, with the Ray and Python of this process, "
            "and this machine must be one of its nodes",
            is_retryable=not isinstance(error, ValueError) and "ersion mismatch" not in reason,
        ) from error
    address = str(ray.get_runtime_context().gcs_address)
    return Cluster(address, f"http://{url}" if url else "", options.address is None)


def _init(ray: Any, address: str | None) -> Any:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
    if address is None:
        return ray.init(address="local", num_cpus=available_cores(), **quiet)
    if address != "auto":
        probe(address)
    # Workers run this very code, wherever they are. A Ray job brings its own.
    is_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    shipped = None if is_job else {"py_modules": [str(Path(__file__).parent.parent)]}
    return ray.init(address=address, runtime_env=shipped, **quiet)


def _has_unused_token() -> bool:
    """Whether the user has a token that was not shown.

    Ray makes one for a local cluster, and then asks for it on all that are started later.
    """
    has_token = bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)) or _TOKEN.exists()
    return has_token and "RAY_AUTH_MODE" not in os.environ


def disconnect(seconds: float = 10.0) -> None:
    """End the connection, and a local Ray. A head that is gone is not waited for."""
    import ray

    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    thread.join(seconds)


def probe(address: str) -> None:
    """Raise ``OSError`` if nobody listens at the head's address. Ray itself would wait for it for a minute."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def list_nodes(address: str) -> list[Node]:
    """The living machines of the cluster whose head is at an address. Raises if it does not answer."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    probe(address)
    status = get_cluster_status(address)
    return [_node(found) for found in [*status.active_nodes, *status.idle_nodes]]


def _node(found: Any) -> Node:
    has = {u.resource_name: (u.total, u.total - u.used) for u in found.resource_usage.usage}
    (cpus, free_cpus), (gpus, _) = has.get("CPU", (0.0, 0.0)), has.get("GPU", (0.0, 0.0))
    return Node(str(found.node_id), float(cpus), float(gpus), float(free_cpus), found.node_status == "DRAINING")
