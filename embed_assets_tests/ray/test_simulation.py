"""A large job in small: planned and synced on a cluster of many nodes."""

from __future__ import annotations

from embed_assets_tests.ray.simulation import simulate


def test_many_partitions_on_many_nodes() -> None:
    done = simulate(partitions=8, chunks=500, nodes=2)
    assert done.chunks == done.planned_chunks == 4_000
    assert done.planned.tokens == 4_000 * 16 and done.planned.runs > 1
    assert done.failed == [] and done.verified
    assert 1 <= done.workers <= 2
    assert 0 < done.memory.feed < 300 << 20, "what waits is with the run's process, and bounded there"
    assert done.memory.run > 0 and done.memory.driver > 0
