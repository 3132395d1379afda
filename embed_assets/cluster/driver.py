"""The process that drives a Ray cluster for a run: reads windows from its parent, and runs the supervisor."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import IO, Any

import pyarrow as pa

from embed_assets.children import own_pipes, receive, send
from embed_assets.cluster.connection import TokenRequired, connect, disconnect, list_nodes
from embed_assets.cluster.nodes import Cluster, Node, Replicas, check_room, plan_replicas
from embed_assets.cluster.process import NeedsToken, Order, TaskCall, TaskDone
from embed_assets.cluster.supervisor import Lost, Supervisor, Then
from embed_assets.cluster.worker import ModelActor
from embed_assets.engine.faults import reason_of
from embed_assets.errors import EmbeddingError, UserError, hide_secrets

_LOOK_SECONDS = 2.0
_SILENT_LOOKS = 5
"""So many looks in a row without an answer, and the cluster is lost. Ray itself waits for a minute."""


class RayActor:
    """A `ModelActor` on the cluster."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, then: Then, *arguments: Any) -> None:
        """Call a method; `then` gets the result in a thread of Ray's."""

        def ended(future: Future[Any]) -> None:
            error = future.exception()
            then(future.result() if error is None else Lost(reason_of_loss(error)))

        getattr(self._actor, method).remote(*arguments).future().add_done_callback(ended)

    def kill(self) -> None:
        """End its process, without waiting: on a node that is gone, Ray would."""
        import ray

        threading.Thread(target=ray.kill, args=(self._actor,), name="kill", daemon=True).start()


def reason_of_loss(error: BaseException) -> str:
    """Why a call was lost, in one line, from Ray's error of many; for one that the call raised, that error."""
    if "out of memory" in str(error).lower() or type(error).__name__ == "OutOfMemoryError":
        return "it took more memory than its node has, and Ray ended it"
    if isinstance(cause := getattr(error, "cause", None), Exception):
        return hide_secrets(reason_of(cause))[:200]
    lines = [line.strip() for line in hide_secrets(str(error)).splitlines() if line.strip()]
    return " ".join(lines[:1])[:200] or type(error).__name__


def _starter(order: Order, replicas: Replicas) -> Callable[[], RayActor]:
    """Starts actors, wherever there is room: an autoscaler adds nodes for those that find none."""
    import ray

    class Replica(ModelActor):
        progress = ray.method(concurrency_group="progress")(ModelActor.progress)

    actor = ray.remote(
        num_cpus=replicas.cpus,
        num_gpus=replicas.gpus or None,
        scheduling_strategy="SPREAD",
        concurrency_groups={"progress": 1},
        max_restarts=0,  # the supervisor starts another one, and gives its windows to those that are there
    )(Replica)
    return lambda: RayActor(actor.remote(order.recipe, replicas.cpus, replicas.gpus))


def _task_starter(tell: Callable[[object], None]) -> Callable[[TaskCall], None]:
    """Starts tasks; `tell` hears their results. Ray starts one again, elsewhere, if its node is lost."""
    import ray

    function = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_call)

    def start(task: TaskCall) -> None:
        def ended(future: Future[Any]) -> None:
            try:
                tell(TaskDone(task.number, future.result()))
            except Exception as error:
                failure = EmbeddingError(f"a task on the cluster failed: {reason_of_loss(error)}; run again", True)
                tell(TaskDone(task.number, None, failure))

        function.remote(task.call).future().add_done_callback(ended)

    return start


def _call(call: Callable[[], Any]) -> Any:
    """In a process of a task: do the call, with a thread for its one CPU."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    pa.set_cpu_count(1)
    return call()


def _watch(cluster: Cluster, supervisor: Supervisor, tell: Callable[[object], None]) -> None:
    """In a thread: look at the cluster every few seconds. Ends this process when its head is lost."""
    silent = 0
    while True:
        time.sleep(_LOOK_SECONDS)
        try:
            supervisor.look(list_nodes(cluster.address))
            silent = 0
        except Exception as error:
            silent += 1
            if silent >= _SILENT_LOOKS:
                reason = hide_secrets(reason_of(error))[:200]
                message = (
                    f"{cluster} was lost: it has not answered for a while ({reason}); windows that were finished are "
                    "kept, run again when it is back"
                )
                tell(EmbeddingError(message, is_retryable=True))
                os._exit(1)  # Ray's calls would wait for it


def _read(requests: IO[bytes], supervisor: Supervisor, start_task: Callable[[TaskCall], None]) -> None:
    """In a thread: pass on the parent's windows and tasks, until it closes the pipe or is gone.

    As bytes, not as references: the copy of an object that a lost node had may delay another worker for ten seconds.
    """
    reason = EmbeddingError("the run has ended")
    try:
        while True:
            message = pickle.loads(receive(requests))
            if isinstance(message, TaskCall):
                start_task(message)
            else:
                supervisor.submit(*message)
    except EOFError:
        pass
    except Exception as error:
        reason = EmbeddingError(f"Ray failed: {hide_secrets(reason_of(error))[:300]}; run again", is_retryable=True)
    supervisor.fail(reason)


def _drive(order: Order, requests: IO[bytes], tell: Callable[[object], None]) -> None:
    cluster = connect(order.options)
    nodes: list[Node] = list_nodes(cluster.address)
    replicas = plan_replicas(nodes, order.options)
    check_room(cluster, nodes, replicas)
    supervisor = Supervisor(cluster, nodes, replicas, _starter(order, replicas), tell, order.patience)
    threading.Thread(target=_watch, args=(cluster, supervisor, tell), name="watch", daemon=True).start()
    threading.Thread(
        target=_read, args=(requests, supervisor, _task_starter(tell)), name="requests", daemon=True
    ).start()
    supervisor.run()
    disconnect()


def _main() -> None:
    requests, answers = own_pipes()
    lock = threading.Lock()

    def tell(message: object) -> None:
        with lock, contextlib.suppress(OSError):
            send(answers, pickle.dumps(message))

    try:
        _drive(pickle.loads(receive(requests)), requests, tell)
    except TokenRequired:
        tell(NeedsToken())
    except UserError as error:
        tell(error)
    except Exception as error:
        tell(EmbeddingError(f"Ray failed: {hide_secrets(reason_of(error))[:300]}; run again", is_retryable=True))
    os._exit(0)  # whatever Ray's threads still wait for


if __name__ == "__main__":
    _main()
