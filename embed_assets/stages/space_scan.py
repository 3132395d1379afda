"""One pass over a space's table: what every vector must be, and a sample of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.lake.nearest import vectors_of
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import TableSpec, dimension_of
from embed_assets.lake.vectors import is_unit

SAMPLE = 2000
"""Vectors in a sample: twice as many move its figures by less than a tenth of the distance to the gates' limits."""
_COLUMNS = ("chunk_id", "input_hash", "is_truncated", "embedding")


@dataclass(slots=True)
class SpaceScan:
    """What a scan found, over all rows of a space."""

    dimension: int | None = None
    """Length that the table's vectors must have; None if it has no rows."""
    rows: int = 0
    wrong_dimension: int = 0
    not_finite: int = 0
    not_unit_norm: int = 0
    truncated: int = 0
    """Rows whose text was longer than the model reads."""
    chunk_ids: list[str] = field(default_factory=list)
    """The chunks of the sample: those with the smallest ids, which are hashes, so the same ones each time."""
    input_hashes: list[str] = field(default_factory=list)
    """The hash of what the model read, for each of the sample."""
    sample: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """float32, shape (sampled, dimension): vectors that are finite and of the right length."""

    @property
    def broken(self) -> int:
        """Rows whose vector is not what a vector must be."""
        return self.wrong_dimension + self.not_finite + self.not_unit_norm


def scan_space(tables: Snapshot, table: TableSpec) -> SpaceScan:
    """Read all vectors of a space. Memory holds one batch and the sample. Raises ``LakeError`` if one can't be read."""
    delta = tables.table(table)
    found = SpaceScan(None if delta is None else dimension_of(delta))
    for batch in tables.rows(table, _COLUMNS):
        found.rows += batch.num_rows
        found.truncated += batch.column("is_truncated").true_count
        _add(found, batch)
    return found


def _add(found: SpaceScan, batch: pa.RecordBatch) -> None:
    lengths = pc.list_value_length(batch.column("embedding")).to_numpy()
    found.dimension = found.dimension or int(lengths[0])
    is_right = lengths == found.dimension
    found.wrong_dimension += int((~is_right).sum())
    batch = batch if is_right.all() else batch.filter(pa.array(is_right))
    if not batch.num_rows:
        return
    vectors = vectors_of(batch)
    is_finite = np.isfinite(vectors).all(axis=1)
    found.not_finite += int((~is_finite).sum())
    found.not_unit_norm += int((is_finite & ~is_unit(vectors)).sum())
    usable = np.flatnonzero(is_finite)
    ids = batch.column("chunk_id").take(pa.array(usable)).to_pylist()
    hashes = batch.column("input_hash").take(pa.array(usable)).to_pylist()
    before = found.sample if len(found.chunk_ids) else np.empty((0, found.dimension), np.float32)
    all_ids, all_hashes = [*found.chunk_ids, *ids], [*found.input_hashes, *hashes]
    smallest = sorted(range(len(all_ids)), key=all_ids.__getitem__)[:SAMPLE]
    joined = np.concatenate([before, vectors[usable]])
    found.chunk_ids, found.input_hashes = [all_ids[i] for i in smallest], [all_hashes[i] for i in smallest]
    found.sample = joined[smallest]
