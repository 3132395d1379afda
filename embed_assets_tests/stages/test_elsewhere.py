"""Reuse from the whole table costs what is wanted of it, however many partitions ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import Lake, TableSpec
from embed_assets.lake.vectors import VectorStore, hash_keys
from embed_assets.records import hash_text
from embed_assets.stages.elsewhere import Elsewhere
from embed_assets_tests.lake.test_lake import RUN, SPACE, embeddings, replace_partition, unit


class Counting(Snapshot):
    """Counts reads of a table."""

    reads = 0

    def rows(self, table: TableSpec, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        self.reads += 1
        return super().rows(table, columns, where)


def test_the_table_is_read_once_and_again_only_for_what_is_wanted(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    replace_partition(lake, SPACE, "a", [embeddings("a", unit(5))], RUN, dimension=4)
    [stored] = Snapshot(lake).rows(SPACE, ["input_hash"])
    at_start, now = Counting(lake), Counting(lake)
    elsewhere = Elsewhere(at_start, SPACE)
    unknown = pa.array([hash_text(f"unknown {i}") for i in range(3)])
    for _ in range(50):
        assert list(elsewhere.vectors(unknown, now)) == []
    assert (at_start.reads, now.reads) == (1, 0)
    with VectorStore() as store:
        wanted = pa.concat_arrays([unknown, stored.column("input_hash")])
        for batch in elsewhere.vectors(wanted, now):
            store.add(batch)
        assert store.has(hash_keys(wanted)).tolist() == [False] * 3 + [True] * 5
    assert (at_start.reads, now.reads) == (1, 1)


def test_what_this_process_has_added_counts_too(tmp_path: Path) -> None:
    elsewhere = Elsewhere(Snapshot(Lake(str(tmp_path / "lake"))), SPACE)
    keys = hash_keys([hash_text("a"), hash_text("b")])
    assert not elsewhere.has(keys).any()
    elsewhere.add(keys[:1])
    elsewhere.add(keys[:1])
    assert elsewhere.has(keys).tolist() == [True, False]
    assert not elsewhere.has(np.empty(0, keys.dtype)).size
