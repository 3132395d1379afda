"""A large job in small: as many partitions, on a cluster of many nodes, within bounded memory."""

from __future__ import annotations

from embed_assets_tests.ray.simulation import TOKENS_PER_TEXT, simulate


def test_many_partitions_on_many_nodes_take_bounded_memory() -> None:
    done = simulate(partitions=60, chunks=1000, nodes=3)
    assert done.texts == 60_000
    assert done.tokens == done.plan.tokens == 60_000 * TOKENS_PER_TEXT
    assert done.windows < 3000, "windows grow with the speed, and are not one per chunk"
    assert done.peak_memory_bytes - done.memory_before_bytes < 300 << 20
