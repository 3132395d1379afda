"""A large job in small: as many partitions, on a cluster of many nodes, within bounded memory."""

from __future__ import annotations

import pytest

from embed_assets_tests.cluster.simulation import simulate

pytestmark = pytest.mark.long


def test_many_partitions_on_many_nodes_take_bounded_memory() -> None:
    done = simulate(partitions=30, chunks=1000, nodes=2)
    assert done.chunks == done.planned_chunks == 30_000
    assert done.planned.tokens == 30_000 * 16 and done.planned.runs > 1
    assert done.failed == [] and done.verified
    assert 1 <= done.workers <= 2
    assert done.memory.before > 0 and done.memory.run - done.memory.before < 300 << 20
    assert 0 < done.memory.driver < 400 << 20
