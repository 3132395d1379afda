"""Vectors of more dimensions that are there already: a space of their first dimensions needs no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from embed_assets.lake.nearest import vectors_of
from embed_assets.lake.snapshot import PartitionSnapshot, Snapshot
from embed_assets.lake.spaces import space_table
from embed_assets.lake.tables import TableSpec, dimension_of
from embed_assets.lake.vectors import VECTOR_COLUMNS, vector_array

_SHARED = ("weights", "tokenizer", "modules", "max_seq_length", "prompt", "context", "number_format")
"""Properties, but for their prefix, in which a space agrees with that of its longer vectors."""
_LEAST_NORM = 1e-6
"""Norm below which the first dimensions say nothing: the text is embedded."""


@dataclass(frozen=True, slots=True)
class LongerVectors:
    """A space of the same model that keeps more dimensions, or all of them."""

    table: TableSpec
    dimension: int
    """Dimensions to take of each of its vectors."""

    def rows(self, partition: PartitionSnapshot) -> Iterator[pa.RecordBatch]:
        """Batches with `VECTOR_COLUMNS`: the partition's vectors, cut to the dimensions and of unit norm again."""
        for batch in partition.rows(self.table, VECTOR_COLUMNS):
            vectors = vectors_of(batch)[:, : self.dimension]
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            cut = vector_array((vectors / np.maximum(norms, _LEAST_NORM)).astype(np.float32))
            place = batch.schema.get_field_index("embedding")
            yield batch.set_column(place, batch.schema.field("embedding"), cut)


def find_longer(tables: Snapshot, table: TableSpec, dimension: int | None) -> LongerVectors | None:
    """The space with the longest vectors whose first `dimension` ones are those of `table`; None if there is none."""
    if dimension is None:
        return None
    wanted = {name: table.properties[f"embed_assets.{name}"] for name in _SHARED}
    found: dict[int, TableSpec] = {}
    for space in tables.lake.spaces():
        other = space_table(space)
        delta = tables.table(other) if space != table.space else None
        if delta is None:
            continue
        stored = delta.metadata().configuration
        length = dimension_of(delta) or 0
        if length > dimension and all(stored.get(f"embed_assets.{n}", "") == value for n, value in wanted.items()):
            found[length] = other
    return LongerVectors(found[max(found)], dimension) if found else None
