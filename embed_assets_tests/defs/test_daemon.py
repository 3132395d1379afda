"""`dagster dev` with its daemon, sensors and runs, as `make ui` starts it, without a click."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import dagster as dg
import pytest

from embed_assets.defs.instance import open_instance
from embed_assets.defs.names import ASSETS
from embed_assets_tests.conftest import Project, topic
from embed_assets_tests.defs.dagster_runs import DAGSTER, dagster_says, events, latest

pytestmark = pytest.mark.long

_PATIENCE_SECONDS = 240


@contextlib.contextmanager
def dagster_dev(project: Project) -> Iterator[None]:
    """Run the webserver and the daemon on the project; all their processes are ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(DAGSTER), "dev", "--host", "127.0.0.1", "--port", str(port), "-m", "embed_assets.definitions"]
    log = (project.root / "dev.log").open("ab")
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def until(project: Project, condition: Callable[[], bool]) -> float:
    """Wait until the condition holds; the seconds that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < _PATIENCE_SECONDS, (project.root / "dev.log").read_text()[-4000:]
        time.sleep(1)
    return time.monotonic() - started


def is_idle(instance: dg.DagsterInstance) -> bool:
    unfinished = [s for s in dg.DagsterRunStatus if s.value not in ("SUCCESS", "FAILURE", "CANCELED")]
    return not instance.get_runs(dg.RunsFilter(statuses=unfinished))


def test_arrivals_edits_touches_and_settings_without_a_click(project: Project) -> None:
    project.set(SETTLE_SECONDS="1")
    fresh = dict.fromkeys(ASSETS, "fresh")

    def keys() -> set[str]:
        return {row["partition_key"] for row in project.rows("partition_key")}

    with open_instance() as instance:
        with dagster_dev(project):
            for key in "abc":
                project.write(f"{key}/try.rst", topic("try"))
            print(f"new folders: {until(project, lambda: keys() == set('abc') and is_idle(instance)):.0f} s")
            assert dagster_says(instance, "a", "b", "c") == dict.fromkeys("abc", fresh)

            project.write("b/try.rst", topic("try") + "\n\nA new last paragraph.")
            made = events(instance, "embeddings")
            waited = until(project, lambda: events(instance, "embeddings") == made + 1 and is_idle(instance))
            print(f"edit: {waited:.0f} s")
            metadata = latest(instance, "embeddings", "b").metadata
            assert metadata["embedded"].value in (1, 2) and metadata["reused"].value > 5  # type: ignore[operator]

            counts = {asset: events(instance, asset) for asset in ASSETS}
            os.utime(project.landing / "c/try.rst", (1, 1))
            waited = until(project, lambda: events(instance, "raw_documents") == counts["raw_documents"] + 1)
            print(f"touch: {waited:.0f} s")
            time.sleep(20)  # longer than a tick of the condition: nothing may run
            assert is_idle(instance)
            assert {asset: events(instance, asset) for asset in ASSETS} == counts | {
                "raw_documents": counts["raw_documents"] + 1
            }
            last = instance.get_runs(limit=1)[0]
            assert last.asset_selection == {dg.AssetKey("raw_documents")}

        project.set(CHUNK_TOKENS="100")
        with dagster_dev(project):
            waited = until(project, lambda: set(we_all(instance)) == {"fresh"} and is_idle(instance))
            print(f"new chunk size: {waited:.0f} s")
        assert {row["token_count"] for row in project.rows("token_count")} <= set(range(101))
        assert all(run.is_success for run in instance.get_runs())


def we_all(instance: dg.DagsterInstance) -> list[str]:
    return [state for states in dagster_says(instance, "a", "b", "c").values() for state in states.values()]
