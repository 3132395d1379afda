"""Threads that embed partitions: none where one partition is embedded at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from embed_assets.stages.compute import Compute


class ThisThread(Executor):
    """Does at once what it is given. Ctrl-C interrupts it where it is."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """A future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def lanes_for(compute: Compute) -> Iterator[Executor]:
    """Where the partitions of a run are embedded. `compute` must be closed first: then whoever waits for it ends."""
    if compute.most_partitions == 1:
        yield ThisThread()
        return
    with ThreadPoolExecutor(compute.most_partitions, thread_name_prefix="embed") as lanes:
        yield lanes
