"""How many replicas fit which nodes, and which settings are refused; without Ray."""

from __future__ import annotations

import pytest

from embed_assets.cluster.nodes import Cluster, Node, RayOptions, Replicas, check_room, plan_replicas
from embed_assets.errors import SettingsError
from embed_assets.settings import load_settings


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
        ([(8, 0)], RayOptions(replicas=(2, 5), cpus_per_replica=3), Replicas(2, 5, 3, 0.0, scales_down=True)),
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
