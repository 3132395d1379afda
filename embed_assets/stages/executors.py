"""Executors for embedding partitions: worker threads, or the calling thread if one partition is embedded at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from embed_assets.stages.compute import Compute


class InlineExecutor(Executor):
    """Runs each call immediately in the calling thread, so that Ctrl-C interrupts it."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Run the call and return its future, already done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def failed(error: Exception) -> Future[Any]:
    """A future that ended with an error."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


@contextlib.contextmanager
def embedding_executor(compute: Compute) -> Iterator[Executor]:
    """An executor with a thread per concurrent partition, joined on exit.

    Close `compute` first: otherwise threads that wait for it never end.
    """
    if compute.max_partitions == 1:
        yield InlineExecutor()
        return
    with ThreadPoolExecutor(compute.max_partitions, thread_name_prefix="embed") as threads:
        yield threads
