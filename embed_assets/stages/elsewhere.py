"""Vectors of other partitions, for EMBED_REUSE=table."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa

from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import MOST_VALUES, TableSpec, is_one_of
from embed_assets.lake.vectors import VECTOR_COLUMNS, HashIndex, hash_keys
from embed_assets.records import slices


class Elsewhere:
    """Vectors anywhere in a space's table: as it was when this process began, and what the process has added since.

    The table's hashes are read once, and its vectors only where one of them is wanted, so that a run's cost does not
    grow with the number of its partitions times the table's size. Safe to share by threads.
    """

    def __init__(self, at_start: Snapshot, table: TableSpec) -> None:
        """`at_start` still has the vectors of rows that this process drops later."""
        self._at_start, self._table = at_start, table
        self._lock = threading.Lock()

    def has(self, keys: np.ndarray) -> np.ndarray:
        """bool, shape (n,): which of the `hash_keys` probably have a vector somewhere."""
        with self._lock:
            return np.asarray(self._index.find(keys) >= 0)

    def add(self, keys: np.ndarray) -> None:
        """Note hashes whose vectors this process has committed."""
        with self._lock:
            self._index.add_new(keys)

    def vectors(self, inputs: pa.Array, now: Snapshot) -> Iterator[pa.RecordBatch]:
        """Batches with `VECTOR_COLUMNS` of the wanted input hashes, in the table as it is `now` and as it was."""
        wanted = inputs.filter(pa.array(self.has(hash_keys(inputs)))).to_pylist()
        tables = [now] if self._at_start.version(self._table) == now.version(self._table) else [now, self._at_start]
        for table in tables:
            for some in slices(wanted, MOST_VALUES):
                yield from table.rows(self._table, VECTOR_COLUMNS, is_one_of("input_hash", some))

    @cached_property
    def _index(self) -> HashIndex:
        index = HashIndex()
        for batch in self._at_start.rows(self._table, ["input_hash"]):
            index.add_new(hash_keys(batch.column("input_hash")))
        return index
