"""Embeds a few stored chunks again, to tell whether a space's rows hold what its model gives for their texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import is_one_of
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.space_scan import SpaceScan

CHUNKS = 32
"""Chunks that are embedded again: if one row in ten is wrong, at least one of them is with 97 % probability."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Stored vectors, and those that the model gives for the same texts now."""

    chunk_ids: list[str]
    stored: np.ndarray
    """float32, shape (chunks, dimension)."""
    again: np.ndarray
    """float32, shape (chunks, dimension)."""

    @property
    def cosines(self) -> np.ndarray:
        """float32, shape (chunks,): how near each stored vector is to what the model gives."""
        return np.asarray(np.einsum("ij,ij->i", self.stored, self.again))

    def filled_again(self, dimensions: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the dimensions, which do not vary in the stored vectors, that vary in what the model gives."""
        spread = self.again.std(axis=0)
        typical = float(np.sqrt(np.mean(np.square(spread))))
        return tuple(i for i in dimensions if spread[i] > 0.05 * typical)


def reproduce(pipeline: Pipeline, tables: Snapshot, scan: SpaceScan) -> Reproduction | None:
    """Embed the first chunks of a sample again; None if there are none, or the model rejects them all.

    Raises ``ModelError`` or ``LakeError``.
    """
    wanted = {chunk_id: row for row, chunk_id in enumerate(scan.chunk_ids[:CHUNKS])}
    if not wanted:
        return None
    texts: dict[str, str] = {}
    where = is_one_of("chunk_id", wanted)
    for batch in tables.rows(pipeline.embeddings_table, ["chunk_id", "text", "title", "heading_path"], where):
        for chunk_id, *input_parts in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            texts[chunk_id] = pipeline.model.space.model_input.of(*input_parts)
    ids = [chunk_id for chunk_id in wanted if chunk_id in texts]
    found = pipeline.model.engine.embedder.embed([texts[chunk_id] for chunk_id in ids])
    kept = [i for i in range(len(ids)) if i not in found.rejected]
    if not kept:
        return None
    stored = scan.sample[[wanted[ids[i]] for i in kept]]
    return Reproduction([ids[i] for i in kept], stored, found.vectors[kept])
