"""The feed's rules, without Ray: who does what, what is put again, and what a reader sees."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from embed_assets.engine.ray_cluster import Cluster, Node, RayOptions, Replicas, check_room, gave_up, plan_replicas
from embed_assets.engine.ray_feed import Feed
from embed_assets.errors import SettingsError
from embed_assets.settings import load_settings
from embed_assets_tests.ray.clusters import INFO


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


async def feed_with(clock: Clock, work: int, workers: str = "ab") -> Feed:
    feed = Feed(clock)
    for worker in workers:
        await feed.start(worker, f"node-{worker}", "here")
        await feed.ready(worker, INFO)
    for number in range(work):
        await feed.put(number, [f"ref{number}"])
    return feed


def test_a_reader_that_starts_again_sees_as_many_places_and_no_content_of_what_is_done() -> None:
    async def scenario() -> None:
        feed = await feed_with(Clock(), 3)
        await feed.forget(1)
        assert [await feed.get(position) for position in range(3)] == [(0, ["ref0"]), (1, []), (2, ["ref2"])]

    run(scenario())


def test_a_reader_waits_for_work() -> None:
    async def scenario() -> None:
        feed = Feed()
        waiting = asyncio.create_task(feed.get(0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await feed.put(0, ["ref"])
        assert await waiting == (0, ["ref"])

    run(scenario())


def test_work_is_done_by_one_worker_at_a_time_and_never_again_when_it_has_arrived() -> None:
    async def scenario() -> None:
        feed = await feed_with(Clock(), 1)
        assert not (await feed.begin("a", 0)).is_skipped
        assert (await feed.begin("b", 0)).is_skipped
        await feed.forget(0)
        assert (await feed.begin("b", 0)).is_skipped

    run(scenario())


def test_a_worker_that_starts_again_died_of_what_it_had_begun() -> None:
    async def scenario() -> None:
        feed = await feed_with(Clock(), 1)
        assert (await feed.begin("a", 0)).deaths == 0
        await feed.note_error(0, "no memory")
        await feed.start("a", "node-a", "here")
        turn = await feed.begin("a", 0)
        assert (turn.deaths, turn.is_retry, turn.last_error) == (1, True, "no memory")

    run(scenario())


def test_a_worker_that_dies_before_its_answer_has_left_did_not_die_of_that() -> None:
    async def scenario() -> None:
        feed = await feed_with(Clock(), 1)
        await feed.begin("a", 0)
        await feed.finish("a", 0, 0, 0.0, INFO)
        await feed.start("a", "node-a", "here")
        assert (await feed.begin("a", 0)).deaths == 0

    run(scenario())


def test_deaths_are_counted_also_when_others_have_the_work_before_the_worker_is_there_again() -> None:
    async def scenario() -> None:
        clock = Clock()
        feed = await feed_with(clock, 1, "abc")
        for worker in "abc":
            await feed.begin(worker, 0)
            clock.now += 601
            assert await feed.put_late_again(["node-a", "node-b", "node-c"], 10.0) == [0]
        for worker in "abc":
            await feed.start(worker, f"node-{worker}", "here")
        assert (await feed.begin("b", 0)).deaths == 3

    run(scenario())


def test_a_death_with_its_node_is_counted_once() -> None:
    async def scenario() -> None:
        feed = await feed_with(Clock(), 1)
        await feed.begin("a", 0)
        assert await feed.put_late_again(["node-b"], 10.0) == [0]
        await feed.start("a", "node-b", "there")
        assert (await feed.begin("b", 0)).deaths == 1

    run(scenario())


def test_the_work_of_a_lost_node_is_put_again_and_done_by_another_worker() -> None:
    async def scenario() -> None:
        clock = Clock()
        feed = await feed_with(clock, 2)
        await feed.begin("a", 0)
        await feed.begin("b", 1)
        assert await feed.put_late_again(["node-a", "node-b"], 10.0) == []
        assert await feed.put_late_again(["node-b"], 10.0) == [0]
        assert await feed.put_late_again(["node-b"], 10.0) == [], "once is enough for a while"
        assert await feed.get(2) == (0, ["ref0"])
        turn = await feed.begin("b", 0)
        assert (turn.is_skipped, turn.is_retry, turn.deaths) == (False, True, 1)
        assert (await feed.status()).begun_again == 1

    run(scenario())


def test_work_that_lies_with_a_lost_worker_is_put_again_when_others_overtake_it() -> None:
    async def scenario() -> None:
        clock = Clock()
        feed = await feed_with(clock, 3)
        await feed.begin("a", 1)
        clock.now += 5
        assert await feed.put_late_again(["node-a", "node-b"], 10.0) == []
        clock.now += 6
        assert await feed.put_late_again(["node-a", "node-b"], 10.0) == [0], "2 is behind 1, and may wait"

    run(scenario())


def test_work_that_lies_ready_behind_a_long_window_is_not_given_to_others_at_once() -> None:
    async def scenario() -> None:
        clock = Clock()
        feed = await feed_with(clock, 4)
        await feed.begin("a", 3)
        await feed.finish("a", 3, 50, 15.0, INFO)
        await feed.forget(3)
        await feed.begin("a", 0)
        await feed.begin("b", 2)
        clock.now += 29
        assert await feed.put_late_again(["node-a", "node-b"], 10.0) == []
        clock.now += 2
        assert await feed.put_late_again(["node-a", "node-b"], 10.0) == [1]

    run(scenario())


def test_a_result_that_does_not_arrive_is_asked_for_again() -> None:
    async def scenario() -> None:
        clock = Clock()
        feed = await feed_with(clock, 1)
        await feed.begin("a", 0)
        await feed.finish("a", 0, 50, 2.0, INFO)
        clock.now += 11
        assert await feed.put_late_again(["node-a", "node-b"], 10.0) == [0]
        assert (await feed.begin("b", 0)).is_retry

    run(scenario())


@pytest.mark.parametrize(("slowest", "late_after"), [(0.0, 600), (2.0, 60), (40.0, 160)])
def test_a_straggler_is_given_to_others_as_well(slowest: float, late_after: float) -> None:
    async def scenario() -> None:
        clock = Clock()
        feed = await feed_with(clock, 2)
        if slowest:
            await feed.begin("b", 1)
            await feed.finish("b", 1, 50, slowest, INFO)
            await feed.forget(1)
        await feed.begin("a", 0)
        clock.now += late_after - 1
        assert await feed.put_late_again(["node-a", "node-b"], 10.0) == []
        clock.now += 2
        assert await feed.put_late_again(["node-a", "node-b"], 10.0) == [0]
        assert (await feed.begin("b", 0)).deaths == 0, "it is slow, not dead"

    run(scenario())


def test_time_counts_while_any_worker_is_at_work() -> None:
    async def scenario() -> None:
        clock = Clock()
        feed = await feed_with(clock, 2)
        clock.now += 5
        await feed.begin("a", 0)
        clock.now += 2
        await feed.begin("b", 1)
        clock.now += 2
        await feed.finish("a", 0, 50, 4.0, INFO)
        clock.now += 3
        await feed.finish("b", 1, 50, 5.0, INFO)
        clock.now += 10
        assert (await feed.status()).active_seconds == 7

    run(scenario())


def test_messages_are_told_once_and_do_not_pile_up() -> None:
    async def scenario() -> None:
        feed = Feed()
        for n in range(150):
            await feed.tell(str(n))
        assert (await feed.status()).messages == [str(n) for n in range(50, 150)]
        assert (await feed.status()).messages == []

    run(scenario())


def test_a_model_that_one_worker_could_load_may_be_loaded_later() -> None:
    async def scenario() -> None:
        feed = Feed()
        await feed.start("a", "node", "here")
        await feed.fail("no memory", is_retryable=False)
        assert not (await feed.status()).is_retryable
        await feed.ready("a", INFO)
        await feed.fail("no memory", is_retryable=False)
        assert (await feed.status()).is_retryable

    run(scenario())


def nodes(*offers: tuple[float, float]) -> list[Node]:
    return [Node(str(i), cpus, gpus, cpus) for i, (cpus, gpus) in enumerate(offers)]


@pytest.mark.parametrize(
    ("offers", "options", "expected"),
    [
        ([(2, 0)], RayOptions(), Replicas(1, 1, 2, 0.0)),
        ([(64, 0), (64, 0)], RayOptions(), Replicas(1, 32, 4, 0.0)),
        ([(0, 0), (1, 0), (16, 0)], RayOptions(), Replicas(1, 17, 1, 0.0)),
        ([(8, 0), (16, 4)], RayOptions(), Replicas(1, 4, 1, 1.0)),
        ([(8, 0), (16, 4)], RayOptions(device="cpu"), Replicas(1, 6, 4, 0.0)),
        ([(16, 4)], RayOptions(gpus_per_replica=0.25), Replicas(1, 16, 1, 0.25)),
        ([(8, 4)], RayOptions(gpus_per_replica=0.25), Replicas(1, 8, 1, 0.25)),
        ([(16, 1), (16, 1)], RayOptions(gpus_per_replica=2), Replicas(1, 1, 1, 2.0)),
        ([(8, 0)], RayOptions(device="cuda"), Replicas(1, 1, 1, 1.0)),
        ([(8, 0)], RayOptions(replicas=(2, 5), cpus_per_replica=3), Replicas(2, 5, 3, 0.0)),
    ],
)
def test_replicas_that_fit(offers: list[tuple[float, float]], options: RayOptions, expected: Replicas) -> None:
    assert plan_replicas(nodes(*offers), options) == expected


def test_a_replica_takes_no_more_cpus_than_are_free() -> None:
    assert plan_replicas([Node("a", 3, 0, 2)], RayOptions()) == Replicas(1, 1, 2, 0.0)
    assert plan_replicas([Node("a", 3, 0, 0), Node("b", 8, 0, 6)], RayOptions()) == Replicas(1, 2, 4, 0.0)
    assert plan_replicas([Node("a", 3, 0, 0)], RayOptions()) == Replicas(1, 1, 3, 0.0), "all are taken: they may go"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (RayOptions(device="cuda:1"), "Ray gives each replica its GPU"),
        (RayOptions(device="cpu", gpus_per_replica=0.5), "EMBED_RAY_GPUS_PER_REPLICA=0.5"),
        (RayOptions(device="cuda", gpus_per_replica=0), "needs a GPU"),
    ],
)
def test_settings_that_contradict_each_other(options: RayOptions, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        plan_replicas(nodes((8, 1)), options)


def test_a_local_ray_without_a_gpu_says_so_at_once() -> None:
    local, offers = Cluster("127.0.0.1:1", "", True), nodes((2, 0))
    with pytest.raises(SettingsError, match="0 GPUs"):
        check_room(local, offers, plan_replicas(offers, RayOptions(device="cuda")))
    check_room(Cluster("host:1", "", False), offers, Replicas(1, 1, 1, 1.0))  # a cluster may grow


def test_what_ray_says_is_one_line() -> None:
    cluster = Cluster("head:1", "", False)
    memory = gave_up(cluster, RuntimeError("The actor died.\nOn how to address the out of memory issue: https://docs"))
    assert memory.is_retryable and "took more memory than its node has" in str(memory) and "https" not in str(memory)
    other = gave_up(cluster, RuntimeError("many\nlines\n\nthe last one\n"))
    assert str(other) == "the Ray cluster at head:1 gave up (RuntimeError: the last one); run again"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compute": "ray", "ray_address": "ray://host:1"}, "must be host:port or auto, got 'ray://host:1'"),
        ({"ray_gpus_per_replica": "1.5"}, "EMBED_RAY_GPUS_PER_REPLICA='1.5': must be a share of one GPU"),
        ({"ray_replicas": "4-2"}, "EMBED_RAY_REPLICAS='4-2': the minimum must not exceed"),
        ({"ray_replicas": "some"}, "EMBED_RAY_REPLICAS='some'"),
    ],
)
def test_settings_of_ray_are_checked(settings: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(**settings)
    assert words in str(error.value)


def test_the_address_is_ours_or_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:1")
    assert load_settings().ray_address == "head:1"
    monkeypatch.setenv("EMBED_RAY_ADDRESS", "head:2")
    assert load_settings().ray_address == "head:2"
    monkeypatch.delenv("EMBED_RAY_ADDRESS")
    for elsewhere in ("http://head:8265", "ray://head:10001", ""):
        monkeypatch.setenv("RAY_ADDRESS", elsewhere)
        load_settings()  # Ray's own commands take it; ours do without
    assert load_settings().ray_address is None
    assert load_settings(ray_replicas="3").replica_range == (3, 3)
    assert load_settings(ray_replicas="2-5").replica_range == (2, 5)
