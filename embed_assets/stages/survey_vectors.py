"""What the report shows of a space's vectors: a map of a sample, distributions, outliers, and what copies find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import numpy as np

from embed_assets.lake.copies import bytes_per_vector, copies_of, search_copy
from embed_assets.lake.nearest import nearest_chunks
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import MOST_VALUES, is_one_of
from embed_assets.quality.duplicates import find_duplicates
from embed_assets.records import slices
from embed_assets.report import data
from embed_assets.report.projection import METHOD, outliers, project
from embed_assets.scratch import scratch_file
from embed_assets.stages.evaluation import embed_queries
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.probing import queries_of
from embed_assets.stages.space_scan import SpaceScan, scan_space

_BARS = 40
"""Bars of a histogram."""
_NEIGHBORS = 10
_RECALL_QUERIES = 100
"""Queries that the recall of copies is measured with: it moves by about 0.01 with others."""
_PLACE = ("chunk_id", "partition_key", "document_id", "title", "heading_path", "text")


@dataclass(frozen=True)
class VectorSurvey:
    """Looks at the vectors of one space."""

    pipeline: Pipeline
    tables: Snapshot

    @cached_property
    def scan(self) -> SpaceScan:
        """All vectors, and a sample of them. Raises ``LakeError``."""
        return scan_space(self.tables, self.pipeline.embeddings_table)

    @cached_property
    def passages(self) -> list[data.Passage]:
        """The chunks of the sample, in its order."""
        found = self.passages_by_id(self.scan.chunk_ids)
        return [found[chunk_id] for chunk_id in self.scan.chunk_ids]

    def passages_by_id(self, ids: Sequence[str]) -> dict[str, data.Passage]:
        """The chunks with these ids, by id."""
        found: dict[str, data.Passage] = {}
        for some in slices(ids, MOST_VALUES):
            for batch in self.tables.rows(self.pipeline.embeddings_table, _PLACE, is_one_of("chunk_id", some)):
                for chunk_id, *values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    found[chunk_id] = data.Passage(*values)
        return found

    def map(self) -> data.VectorMap | data.Absent:
        """The sample in two dimensions."""
        if not self.scan.chunk_ids:
            return data.Absent("No vectors yet: run 'embed-assets sync'.")
        places = project(self.scan.sample)
        points = tuple(
            data.MapPoint(**asdict(passage), x=float(x), y=float(y))
            for passage, (x, y) in zip(self.passages, places, strict=True)
        )
        return data.VectorMap(points, self.scan.rows, METHOD)

    def outliers(self) -> data.Outliers | data.Absent:
        """The chunks of the sample that are farthest from all others."""
        if len(self.scan.chunk_ids) <= _NEIGHBORS:
            return data.Absent("There are too few vectors for outliers.")
        scores, rows = outliers(self.scan.sample, _NEIGHBORS)
        found = tuple(data.Outlier(**asdict(self.passages[i]), score=float(scores[i])) for i in rows.tolist())
        return data.Outliers(_NEIGHBORS, len(scores), float(np.median(scores)), found)

    def tokens(self) -> data.Histogram | data.Absent:
        """Lengths of all chunks in tokens."""
        counts = np.zeros(1, np.int64)
        for batch in self.tables.rows(self.pipeline.embeddings_table, ["token_count"]):
            more = np.bincount(batch.column("token_count").to_numpy(), minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        limit = self.pipeline.corpus.chunking.max_tokens
        lengths = np.repeat(np.arange(len(counts)), counts)
        return _histogram(lengths, (0.0, float(max(limit, len(counts) - 1))), limit)

    def norms(self) -> data.Histogram | data.Absent:
        """Norms of the sampled vectors, which should all be 1."""
        norms = np.linalg.norm(self.scan.sample.astype(np.float64), axis=1) if self.scan.chunk_ids else np.empty(0)
        spread = float(max(1e-6, np.abs(norms - 1).max())) if len(norms) else 1e-6
        return _histogram(norms, (1 - spread, 1 + spread))

    def duplicates(self) -> data.Duplicates | data.Absent:
        """Chunks that repeat another one, by partition, and the nearest pairs of different texts."""
        if not self.scan.rows:
            return data.Absent("No vectors yet: run 'embed-assets sync'.")
        with scratch_file() as scratch:
            found = find_duplicates(partial(self.tables.rows, self.pipeline.embeddings_table), scratch)
        exact = tuple(
            data.PartitionDuplicates(key, counts.chunks, counts.repeats, ())
            for key, counts in sorted(found.partitions.items())
            if counts.repeats
        )
        ids = {chunk_id for pair in found.examples for chunk_id in (pair.chunk_id, pair.other_chunk_id)}
        passages = self.passages_by_id(sorted(ids))
        near = tuple(
            data.NearPair(pair.cosine, passages[pair.chunk_id], passages[pair.other_chunk_id])
            for pair in found.examples
        )
        return data.Duplicates(exact, near, self.pipeline.settings.max_duplicate_percent)

    def copies(self) -> tuple[data.DerivedCopy, ...] | data.Absent:
        """The copies of the space, with what a search of each finds of the ten nearest chunks."""
        space = self.pipeline.model.space.name
        kinds = copies_of(self.tables, space)
        if not kinds:
            return data.Absent("There are no copies: 'embed-assets derive binary' makes one.")
        queries = queries_of(self.pipeline, self.tables)[:_RECALL_QUERIES]
        vectors = (
            embed_queries(self.pipeline, [query.text for query in queries])
            if queries
            else np.empty((0, self.scan.dimension or 0))
        )
        table = self.pipeline.embeddings_table
        exact = [{hit.row["chunk_id"] for hit in hits} for hits in nearest_chunks(self.tables, table, vectors, 10, [])]
        found = []
        for kind in kinds:
            width = bytes_per_vector(kind, vectors.shape[1])
            near = (search_copy(self.tables, space, kind, vector, 10, []) for vector in vectors)
            shares = [
                len(ids & {hit.row["chunk_id"] for hit in hits}) / len(ids)
                for ids, hits in zip(exact, near, strict=True)
                if ids
            ]
            recall = float(np.mean(shares)) if shares else None
            found.append(data.DerivedCopy(kind, width, recall, f"{len(shares)} queries made from chunks"))
        return tuple(found)


def _histogram(values: np.ndarray, ends: tuple[float, float], limit: int | None = None) -> data.Histogram | data.Absent:
    if not len(values):
        return data.Absent("No chunks yet: run 'embed-assets sync'.")
    counts, _ = np.histogram(values, _BARS, ends)
    limits = () if limit is None else (data.Limit(float(limit), f"a chunk has at most {limit}"),)
    least, median, most = (float(f(values)) for f in (np.min, np.median, np.max))
    return data.Histogram(*ends, tuple(counts.tolist()), least, median, most, limits)
