"""Metadata of a materialization for Dagster's UI: numbers, a summary in words, and pictures."""

from __future__ import annotations

import sys
from typing import TypeAlias

import dagster as dg
import psutil

from embed_assets.cluster.report import PoolReport
from embed_assets.defs.staleness import History
from embed_assets.engine.engine import EngineInfo
from embed_assets.engine.metrics import EngineStats, advise
from embed_assets.pictures import draw_map, draw_token_lengths
from embed_assets.stages.compute import Compute
from embed_assets.stages.outcome import PartitionOutcome
from embed_assets.stages.pipeline import Pipeline

MetadataValue: TypeAlias = int | float | str | dg.MetadataValue
Metadata: TypeAlias = dict[str, MetadataValue]

_LEAST_DRAWN = 10
"""With fewer chunks, a histogram or a map shows nothing useful."""
_LEAST_CHANGED = 0.1
"""Share of a partition's rows that must change to draw the pictures again: with less, they look the same."""
_MOST_WORKERS_SHOWN = 32
"""Rows of the table of workers, slowest first; more make the event larger."""
_LEAST_BUSY_PERCENT = 70.0
"""Below this utilization, the metadata advises fewer workers: higher advises it sooner."""
_STARVED = (
    "workers were busy {:.0f} % of the time: reading and chunking are too slow for them, or there is little to embed; "
    "start fewer workers (EMBED_RAY_REPLICAS), which leaves it more CPUs, or add CPUs"
)


class MetadataWriter:
    """Builds the metadata of a run's materializations."""

    def __init__(self, pipeline: Pipeline, history: History) -> None:
        self._pipeline, self._history = pipeline, history
        self._rows = {asset: state.rows if state else 0 for asset, state in history.tables.items()}

    def of(self, asset: str, outcome: PartitionOutcome, compute: Compute) -> Metadata:
        """Metadata of one materialization. Every asset carries the same counts; those that do not apply to it are 0."""
        is_embeddings = asset == "embeddings"
        work = outcome if is_embeddings else PartitionOutcome(outcome.key)  # only embeddings report the model's work
        report = compute.report if is_embeddings else None
        replaced = outcome.replaced[asset]
        metadata: Metadata = {
            "summary": dg.MetadataValue.md(_summary(asset, outcome, report)),
            "documents": outcome.documents,
            "rejected": outcome.rejected,
            "chunks": 0 if asset == "raw_documents" else outcome.chunks,
            "embedded": work.embedded,
            "reused": work.reused,
            "dropped": work.dropped,
            **engine_metadata(work, compute.info, report),
            "peak_memory_bytes": peak_memory_bytes(),
            "dagster/partition_row_count": replaced.rows,
            "dagster/row_count": self._total_rows(asset, outcome),
            "data_files": replaced.state.files_hash,
        }
        if replaced.table_version is not None:
            metadata |= {"table_version": replaced.table_version, "table_id": replaced.table_id}
        if asset == "raw_documents":
            metadata["source"] = self._pipeline.corpus.source.root
            metadata["metadata_fields"] = self._pipeline.corpus.parsing.fields
        if is_embeddings:
            metadata |= {
                "reused_percent": round(100 * work.reused / work.chunks, 2) if work.chunks else 0.0,
                "truncated": work.truncated,
                "rejected_chunks": work.rejected_chunks,
                "space": self._pipeline.model.space.name,
                "compute": self._pipeline.settings.compute,
                "compile": self._pipeline.settings.compile,
            }
            pictures = self.pictures(outcome) if outcome.pictures is None else outcome.pictures
            metadata |= {name: dg.MetadataValue.md(picture) for name, picture in pictures.items()}
        return metadata

    def pictures(self, outcome: PartitionOutcome) -> dict[str, str]:
        """Markdown images of the chunks' token lengths and of a sample of the vectors; none that would look the same
        as those of the previous materialization."""
        if not self._is_worth_a_picture(outcome):
            return {}
        sample = outcome.sampled()
        return {
            "token_lengths": draw_token_lengths(sample.token_counts, self._pipeline.corpus.chunking.max_tokens),
            "map": draw_map(sample.vectors, sample.documents),
        }

    def _is_worth_a_picture(self, outcome: PartitionOutcome) -> bool:
        """Whether the pictures would differ visibly from those of the previous materialization."""
        rows = outcome.replaced["embeddings"].rows
        if rows < _LEAST_DRAWN:
            return False
        before = self._history.record("embeddings", outcome.key)
        is_new = before is None or before.code_version != self._pipeline.model.space.name or before.rows < _LEAST_DRAWN
        return is_new or outcome.embedded + outcome.dropped >= _LEAST_CHANGED * rows

    def _total_rows(self, asset: str, outcome: PartitionOutcome) -> int:
        """Rows of the whole table: those at the start of the run plus what the run has changed so far."""
        before, rows = self._history.record(asset, outcome.key), outcome.replaced[asset].rows
        self._rows[asset] += rows - (before.rows if before else 0)
        return max(self._rows[asset], rows)


def engine_metadata(outcome: PartitionOutcome, info: EngineInfo, report: PoolReport | None) -> Metadata:
    """Tokens, speed and device of a partition's embedding; if it embedded anything, also bottlenecks and workers."""
    stats = outcome.engine
    metadata: Metadata = {
        "tokens": stats.tokens,
        "tokens_per_second": _speed(stats, report) if stats.tokens else 0.0,
        "padding_percent": round(stats.padding_percent, 2),
        "device": info.device,
        "precision": info.precision,
        "max_batch_tokens": info.max_batch_tokens,
    }
    if stats.tokens:
        metadata |= _engine_details(outcome, info)
        if report is not None and report.workers:
            metadata |= _workers(report)
    return metadata


def _speed(stats: EngineStats, report: PoolReport | None) -> float:
    """Tokens per second of the model in this process, or of all workers together."""
    # With workers, a partition's stats sum up the seconds of all of them: an average worker, not the cluster.
    return round(stats.tokens_per_second if report is None else report.tokens_per_second, 1)


def _engine_details(outcome: PartitionOutcome, info: EngineInfo) -> Metadata:
    stats = outcome.engine
    details: Metadata = {
        "backend": info.backend,
        "startup_seconds": round(outcome.startup_seconds, 2),
        "engine_seconds": round(stats.seconds, 2),
        "tokenizer_wait_percent": round(stats.tokenizer_wait_percent, 2),
        "device_wait_percent": round(stats.input_wait_percent, 2),
        "gflops": round(stats.gflops, 1),
        "roofline_percent": round(stats.roofline_percent(info.ceiling_gflops), 1),
        "advice": advise(stats, info.ceiling_gflops, info.device, info.precision, info.max_batch_tokens),
    }
    if stats.gpu_readings:
        details |= {"gpu_utilization_percent": round(stats.gpu_percent, 1), "gpu_memory_bytes": stats.gpu_memory_bytes}
    return details


def _workers(report: PoolReport) -> Metadata:
    """Metadata of the workers that ran since the run began."""
    rows = [
        dg.TableRecord(
            {"worker": w.address, "tokens": w.tokens, "tokens/s": w.tokens_per_second, "busy %": w.busy_percent}
        )
        for w in report.workers[:_MOST_WORKERS_SHOWN]
    ]
    busy = report.utilization_percent
    return {
        "ray_cluster": str(report),
        "ray_dashboard": dg.MetadataValue.url(report.dashboard) if report.dashboard else "none",
        "ray_workers": len(report.workers),
        "ray_nodes": len(report.nodes),
        "ray_utilization_percent": busy,
        "ray_windows_begun_again": report.windows_begun_again,
        "ray_tokens_per_second_per_worker": dg.MetadataValue.table(rows),
        **({"advice": _STARVED.format(busy)} if busy < _LEAST_BUSY_PERCENT else {}),
    }


def _summary(asset: str, outcome: PartitionOutcome, report: PoolReport | None) -> str:
    """Markdown summary of why the asset ran and what changed."""
    replaced = outcome.replaced[asset]
    lines = [f"**Why:** {'; '.join(outcome.reasons[asset]) or 'asked for'}.", ""]
    if asset == "raw_documents":
        lines.append(f"- {outcome.documents:,} documents read, {outcome.rejected:,} files or rows rejected")
    elif asset == "chunks":
        lines.append(f"- {outcome.documents:,} documents split into {replaced.rows:,} chunks")
    else:
        rate = _speed(outcome.engine, report)
        speed = f", {outcome.tokens:,} tokens at {rate:,.0f}/s" if outcome.embedded else ""
        lines.append(f"- {outcome.embedded:,} texts embedded{speed}")
        lines.append(f"- {outcome.reused:,} vectors reused, {outcome.dropped:,} rows dropped")
        if outcome.rejected_chunks:
            lines.append(f"- {outcome.rejected_chunks:,} chunks the model can't embed: see `rejected_documents`")
    where = "no table yet" if replaced.table_version is None else f"table version {replaced.table_version}"
    lines.append(f"- {where}, {'one commit' if replaced.is_committed else 'no commit: it held exactly these rows'}")
    return "\n".join(lines)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
