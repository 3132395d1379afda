"""What the report shows of a space's vectors: a map of a sample, distributions, outliers, and what copies find."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import numpy as np

from embed_assets.lake.copies import Copy, bytes_per_vector, copies_of
from embed_assets.lake.nearest import Hit, nearest_chunks
from embed_assets.lake.row_source import StoredRows
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import MOST_VALUES, is_one_of, partition_predicate
from embed_assets.quality.duplicates import DEFAULT_COSINE, find_duplicates
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
_EXAMPLE_PARTITIONS = 100
"""Partitions of which repeated texts are shown: each is read for them."""
_EXAMPLES = 3
_RECALL_QUERIES = 100
"""Queries that the recall of copies is measured with: it moves by about 0.01 with others."""
_SCORE_TOLERANCE = 1e-6
"""Scores of equal vectors differ by less, whatever rows they are computed with."""
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
        repeated = {key: counts for key, counts in found.partitions.items() if counts.repeats or counts.near_duplicates}
        worst = sorted(repeated, key=lambda key: -repeated[key].repeats / repeated[key].chunks)[:_EXAMPLE_PARTITIONS]
        examples = {key: self._repeated_texts(key) for key in worst if repeated[key].repeats}
        partitions = tuple(
            data.PartitionDuplicates(key, counts.chunks, counts.repeats, counts.near_duplicates, examples.get(key, ()))
            for key, counts in repeated.items()
        )
        ids = {chunk_id for pair in found.examples for chunk_id in (pair.chunk_id, pair.other_chunk_id)}
        passages = self.passages_by_id(sorted(ids))
        pairs = tuple(
            data.NearPair(pair.cosine, passages[pair.chunk_id], passages[pair.other_chunk_id])
            for pair in found.examples
        )
        return data.Duplicates(partitions, pairs, DEFAULT_COSINE, self.pipeline.settings.max_duplicate_percent)

    def _repeated_texts(self, key: str) -> tuple[data.RepeatedText, ...]:
        """The texts that most chunks of a partition have."""
        table, wanted = self.pipeline.embeddings_table, partition_predicate(key)
        counts = Counter[str]()
        for batch in self.tables.rows(table, ["input_hash"], wanted):
            counts.update(batch.column(0).to_pylist())
        most = {text: count for text, count in counts.most_common(_EXAMPLES) if count > 1}
        texts, places = {}, defaultdict[str, list[str]](list)
        predicate = f"{wanted} AND {is_one_of('input_hash', list(most))}"
        for batch in self.tables.rows(table, ["input_hash", "text", "document_id"], predicate):
            for text_hash, text, document in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                texts[text_hash] = text
                if len(places[text_hash]) < _EXAMPLES and document not in places[text_hash]:
                    places[text_hash].append(document)
        return tuple(data.RepeatedText(texts[each], count, tuple(places[each])) for each, count in most.items())

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
        exact = nearest_chunks(self.tables, table, vectors, 10, [])
        found = []
        for kind in kinds:
            width = bytes_per_vector(kind, vectors.shape[1])
            copy, source = Copy(self.tables, space, kind), StoredRows(self.tables, table)
            near = (copy.nearest(source, vector, 10, []) for vector in vectors)
            shares = [_recall(wanted, hits) for wanted, hits in zip(exact, near, strict=True) if wanted]
            recall = float(np.mean(shares)) if shares else None
            found.append(data.DerivedCopy(kind, width, recall, f"{len(shares)} queries made from chunks"))
        return tuple(found)


def _recall(wanted: Sequence[Hit], found: Sequence[Hit]) -> float:
    """Share of the nearest chunks that were found, or others that are as near: equal texts are."""
    least = min(hit.score for hit in wanted) - _SCORE_TOLERANCE
    return min(1.0, sum(hit.score >= least for hit in found) / len(wanted))


def _histogram(values: np.ndarray, ends: tuple[float, float], limit: int | None = None) -> data.Histogram | data.Absent:
    if not len(values):
        return data.Absent("No chunks yet: run 'embed-assets sync'.")
    counts, _ = np.histogram(values, _BARS, ends)
    limits = () if limit is None else (data.Limit(float(limit), f"a chunk has at most {limit}"),)
    least, median, most = (float(f(values)) for f in (np.min, np.median, np.max))
    return data.Histogram(*ends, tuple(counts.tolist()), least, median, most, limits)
