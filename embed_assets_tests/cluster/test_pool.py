"""Workers on a real cluster of four nodes: what they survive, and what is said when they don't.

The last test loses its nodes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embed_assets.cluster.nodes import RayOptions
from embed_assets.cluster.process import ClusterProcess
from embed_assets.cluster.report import PoolReport
from embed_assets.cluster.supervisor import Patience
from embed_assets.errors import EmbeddingError, ModelError, SettingsError, UserError
from embed_assets_tests.cluster.clusters import INFO, STORE_BYTES, EchoRecipe, kill, ray_cluster

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(nodes=3) as made:
        yield made


def pool(cluster: Any, recipe: EchoRecipe, **options: Any) -> ClusterProcess:
    made = replace(RayOptions(cluster.address), **options)
    # However busy this machine is: no window is late, and only one that never ends hangs. So deaths are exact.
    return ClusterProcess(lambda: recipe, made, Patience(slow=600.0, hung=15.0, room=made.wait_seconds))


def test_work_is_done_whatever_becomes_of_single_pieces(cluster: Any, tmp_path: Path) -> None:
    log = tmp_path / "begun"
    workers = pool(cluster, EchoRecipe(str(log)))
    try:
        assert workers.report is None
        workers.start()
        assert workers.info == INFO
        assert workers.most_replicas == 3
        with pytest.raises(ModelError, match="not this one"):
            workers.submit(b"refuse").result(240)
        contents = [b"die", b"break", b"hang", b"warn", *(b"w%d 0.05" % i for i in range(60))]
        futures = [workers.submit(content) for content in contents]
        assert [f.result(240).answer.encode() for f in futures[2:]] == contents[2:]
        with pytest.raises(EmbeddingError, match=r"4 workers died of the same window"):
            futures[0].result(240)
        with pytest.raises(EmbeddingError, match=r"4 workers died of .*\(ZeroDivisionError: the device is gone\)"):
            futures[1].result(240)
        begun = log.read_bytes().splitlines()
        assert begun.count(b"die") == begun.count(b"break") == 4
        assert begun.count(b"refuse") == begun.count(b"w0 0.05") == 1
        assert begun.count(b"hang") == 2, "another worker did what one never finished"
        report = report_of(workers)
        assert len(report.nodes) == 4
        assert "3 workers of 1 CPUs" in str(report)
        assert report.windows_begun_again >= 1 and 0 < report.tokens_per_second < 1000
        assert report.info == INFO
        news = "\n".join(workers.take_news())
        assert "pid" in news and "the budget was halved" in news and "the device is gone" in news
        assert "was lost" in news and "windows are given to others" in news
    finally:
        workers.close()
    with pytest.raises(EmbeddingError, match="stopped"):
        workers.submit(b"late")


def test_a_recipe_that_can_not_be_made_leaves_nobody_waiting() -> None:
    def fail() -> EchoRecipe:
        raise ModelError("the lake hiccups")

    workers = ClusterProcess(fail, RayOptions("127.0.0.1:1"))
    for _ in range(2):
        with pytest.raises(ModelError, match="hiccups"):
            workers.start()
    assert workers.report is None
    workers.close()


def report_of(workers: ClusterProcess) -> PoolReport:
    report = workers.report
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("recipe", "options", "kind", "words"),
    [
        (EchoRecipe(error="no such model"), {}, ModelError, r"no such model \(on .* pid \d+\)"),
        (EchoRecipe(dies_at_start=True), {"replicas": (1, 1)}, EmbeddingError, "was started 5 times and died"),
        (
            EchoRecipe(),
            {"device": "cuda", "wait_seconds": 3.0},
            SettingsError,
            "no worker fits: .* 3 CPUs and 0 GPUs",
        ),
    ],
)
def test_what_can_never_run_says_why(
    cluster: Any, recipe: EchoRecipe, options: dict[str, Any], kind: type[UserError], words: str
) -> None:
    workers = pool(cluster, recipe, **options)
    try:
        with pytest.raises(kind, match=words):
            workers.start()
    finally:
        workers.close()


def test_nobody_listens_at_the_address() -> None:
    workers = ClusterProcess(lambda: EchoRecipe(), RayOptions("127.0.0.1:1"))
    try:
        with pytest.raises(SettingsError, match=r"no connection to EMBED_RAY_ADDRESS='127.0.0.1:1'"):
            workers.start()
    finally:
        workers.close()


def test_the_process_that_drives_ray_is_killed(cluster: Any) -> None:
    workers = pool(cluster, EchoRecipe())
    try:
        workers.start()
        future = workers.submit(b"slow 60")
        assert workers._process is not None
        workers._process.kill()
        with pytest.raises(EmbeddingError, match=r"ended with signal 9.*run again"):
            future.result(60)
    finally:
        workers.close()


def test_a_node_that_drains_gets_no_new_windows(cluster: Any) -> None:
    workers = pool(cluster, EchoRecipe(), replicas=(3, 3))
    try:
        workers.start()
        for future in [workers.submit(b"where 0.2") for _ in range(30)]:
            leaving = future.result(240).answer
        command = ["drain-node", "--address", cluster.address, "--node-id", leaving, "--reason"]
        command += ["DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "3600"]
        subprocess.run([Path(sys.executable).parent / "ray", *command], check=True)
        until = time.monotonic() + 60
        while not any(node.is_draining for node in report_of(workers).nodes):
            assert time.monotonic() < until, "the notice is to be seen"
            time.sleep(0.1)
        after = {workers.submit(b"where 0.2").result(240).answer for _ in range(10)}
        assert after and leaving not in after
    finally:
        workers.close()
    [node] = [node for node in cluster.worker_nodes if node.node_id == leaving]
    cluster.worker_nodes.remove(node)
    kill(node)
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


def test_nodes_are_lost_one_and_then_all(cluster: Any, tmp_path: Path) -> None:
    log = tmp_path / "begun"
    workers = pool(cluster, EchoRecipe(str(log)), replicas=(3, 3), wait_seconds=60.0)
    try:
        workers.start()
        futures: list[Any] = []

        def submit(count: int) -> None:
            futures.extend(workers.submit(b"w%d 0.3" % i) for i in range(len(futures), len(futures) + count))

        until = time.monotonic() + 240
        while len({w.address for w in report_of(workers).workers}) < 3:
            assert time.monotonic() < until, "three workers are to have done something"
            submit(9 - sum(not future.done() for future in futures))
            time.sleep(0.2)
        submit(60)
        kill(cluster.worker_nodes.pop())
        assert [f.result(240).answer for f in futures] == [f"w{i} 0.3" for i in range(len(futures))]
        # What it was at, and what it had done and not yet told (which real workers find staged).
        assert report_of(workers).windows_begun_again <= 2
        assert len(log.read_bytes().splitlines()) <= len(futures) + 2
        future = workers.submit(b"slow 300")
        while cluster.worker_nodes:
            kill(cluster.worker_nodes.pop())
        with pytest.raises(EmbeddingError, match=r"all workers were lost, and for 60 s no node has come") as error:
            future.result(240)
        assert error.value.is_retryable
    finally:
        workers.close()
