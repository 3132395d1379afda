"""What a materialization's page shows: numbers, a summary in words, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import dagster as dg
import numpy as np

from embed_assets.defs.engine_report import engine_metadata, speed_of
from embed_assets.defs.pictures import draw_map, draw_token_lengths
from embed_assets.defs.recording import MetadataValue, peak_memory_bytes
from embed_assets.defs.results import PartitionResult
from embed_assets.defs.staleness import History
from embed_assets.engine.engine import EngineFacts
from embed_assets.engine.ray import PoolReport
from embed_assets.lake.reader import read_partition
from embed_assets.lake.tables import CHUNK_TABLE
from embed_assets.lake.writer import Replaced
from embed_assets.stages.embeddings import Work
from embed_assets.stages.pipeline import Pipeline

_MAPPED_VECTORS = 300
_LEAST_DRAWN = 10
"""Fewer chunks make no histogram and no map."""
_LEAST_CHANGED = 0.1
"""Share of a partition's rows; with fewer new ones the pictures look the same."""


@dataclass(frozen=True, slots=True)
class Made:
    """One asset's partition that was made."""

    asset: str
    key: str
    reasons: Sequence[str]
    """Why it was missing or stale."""
    replaced: Replaced
    result: PartitionResult
    """The partition's numbers so far."""
    facts: EngineFacts
    work: Work = field(default_factory=Work)
    report: PoolReport | None = None
    """What workers elsewhere did in this run."""


class Reporter:
    """Writes the metadata of a run's materializations."""

    def __init__(self, pipeline: Pipeline, history: History) -> None:
        self._pipeline, self._history = pipeline, history
        self._rows = {asset: state.rows if state else 0 for asset, state in history.tables.items()}

    def metadata(self, made: Made) -> dict[str, MetadataValue]:
        """All assets carry the numbers that the contract names; what is not theirs is 0."""
        result, work, replaced = made.result, made.work, made.replaced
        chunks = 0 if made.asset == "raw_documents" else result.chunks
        metadata: dict[str, MetadataValue] = {
            "summary": dg.MetadataValue.md(_summary(made)),
            "documents": result.documents,
            "rejected": result.rejected,
            "chunks": chunks,
            "embedded": work.embedded,
            "reused": work.reused,
            "dropped": work.dropped,
            **engine_metadata(work, made.facts, made.report),
            "peak_memory_bytes": peak_memory_bytes(),
            "dagster/partition_row_count": replaced.rows,
            "dagster/row_count": self._total_rows(made),
        }
        metadata["data_files"] = replaced.state.files_hash
        if replaced.table_version is not None:
            metadata |= {"table_version": replaced.table_version, "table_id": replaced.table_id}
        if made.asset == "raw_documents":
            metadata["source"] = self._pipeline.source.root
        if made.asset == "embeddings":
            metadata |= {
                "reused_percent": round(100 * work.reused / work.chunks, 2) if work.chunks else 0.0,
                "truncated": work.truncated,
                "rejected_chunks": work.rejected_chunks,
                "space": self._pipeline.space.name,
            }
        if made.asset == "embeddings" and self._is_worth_a_picture(made):
            metadata |= self._pictures(made.key)
        return metadata

    def _is_worth_a_picture(self, made: Made) -> bool:
        """There is something to see that the pictures of before do not show."""
        if made.replaced.rows < _LEAST_DRAWN:
            return False
        before = self._history.record("embeddings", made.key)
        is_new = before is None or before.code_version != self._pipeline.space.name or before.rows < _LEAST_DRAWN
        changed = made.work.embedded + made.work.dropped
        return is_new or changed >= _LEAST_CHANGED * made.replaced.rows

    def _total_rows(self, made: Made) -> int:
        """Rows of the whole table: as they were when the run began, and what the run changed."""
        before = self._history.record(made.asset, made.key)
        self._rows[made.asset] += made.replaced.rows - (before.rows if before else 0)
        return max(self._rows[made.asset], made.replaced.rows)

    def _pictures(self, key: str) -> dict[str, MetadataValue]:
        """The token lengths, and a sample of the vectors on a plane."""
        pipeline = self._pipeline
        lengths: list[int] = []
        for batch in read_partition(pipeline.lake, CHUNK_TABLE, key, ["token_count"]):
            lengths += batch.column("token_count").to_pylist()
        vectors: list[np.ndarray] = []
        documents: list[str] = []
        stride = max(1, len(lengths) // _MAPPED_VECTORS)
        row = 0
        for batch in read_partition(pipeline.lake, pipeline.embeddings_table, key, ["document_id", "embedding"]):
            wanted = range(-row % stride, batch.num_rows, stride)
            documents += [batch.column("document_id")[i].as_py() for i in wanted]
            # Copies: a view of one vector would keep its whole batch in memory.
            vectors += [batch.column("embedding")[i].values.to_numpy().copy() for i in wanted]
            row += batch.num_rows
        if not lengths or not vectors:
            return {}
        return {
            "token_lengths": draw_token_lengths(lengths, pipeline.chunk_options.max_tokens),
            "map": draw_map(np.stack(vectors), documents),
        }


def _summary(made: Made) -> str:
    """Why it ran and what came of it, in Markdown."""
    result, work, replaced = made.result, made.work, made.replaced
    lines = [f"**Why:** {'; '.join(made.reasons) or 'asked for'}.", ""]
    if made.asset == "raw_documents":
        lines.append(f"- {result.documents:,} documents read, {result.rejected:,} files or rows rejected")
    elif made.asset == "chunks":
        lines.append(f"- {result.documents:,} documents split into {replaced.rows:,} chunks")
    else:
        rate = speed_of(work, made.report)
        speed = f", {work.engine.tokens:,} tokens at {rate:,.0f}/s" if work.embedded else ""
        lines.append(f"- {work.embedded:,} texts embedded{speed}")
        lines.append(f"- {work.reused:,} vectors reused, {work.dropped:,} rows dropped")
        if work.rejected_chunks:
            lines.append(f"- {work.rejected_chunks:,} chunks the model can't embed: see `rejected_documents`")
    where = "no table yet" if replaced.table_version is None else f"table version {replaced.table_version}"
    lines.append(f"- {where}, {'one commit' if replaced.is_committed else 'no commit: it held exactly these rows'}")
    return "\n".join(lines)
