"""The engine's numbers in a materialization's metadata."""

from __future__ import annotations

import dagster as dg

from embed_assets.defs.recording import MetadataValue
from embed_assets.engine.engine import EngineFacts
from embed_assets.engine.metrics import advise
from embed_assets.engine.ray import PoolReport
from embed_assets.stages.embeddings import Work

_MOST_ROWS = 32
"""Of the table of workers, the slowest first."""
_LEAST_BUSY_PERCENT = 70.0
_STARVED = (
    "workers were busy {:.0f} % of the time: the run's process reads and chunks no faster, or there is little to do; "
    "start fewer workers (EMBED_RAY_REPLICAS), or several runs at a time"
)


def engine_metadata(work: Work, facts: EngineFacts, report: PoolReport | None) -> dict[str, MetadataValue]:
    """What the engine did for a partition, how fast, on what; and if it embedded anything, what bounded it."""
    stats = work.engine
    metadata: dict[str, MetadataValue] = {
        "tokens": stats.tokens,
        "tokens_per_second": speed_of(work, report) if stats.tokens else 0.0,
        "padding_percent": round(stats.padding_percent, 2),
        "device": facts.device,
        "precision": facts.precision,
        "max_batch_tokens": facts.max_batch_tokens,
    }
    if stats.tokens:
        metadata |= _details(work, facts)
        if report is not None and report.workers:
            metadata |= _workers(report)
    return metadata


def speed_of(work: Work, report: PoolReport | None) -> float:
    """Tokens per second: of the model in this process, or of all workers together."""
    # With workers, the partition's own numbers have their seconds added up: an average, not what the cluster does.
    return round(work.engine.tokens_per_second if report is None else report.tokens_per_second, 1)


def _workers(report: PoolReport) -> dict[str, MetadataValue]:
    """Who did it: the workers that ran, since the run began."""
    rows = [
        dg.TableRecord(
            {"worker": w.address, "tokens": w.tokens, "tokens/s": w.tokens_per_second, "busy %": w.busy_percent}
        )
        for w in report.workers[:_MOST_ROWS]
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


def _details(work: Work, facts: EngineFacts) -> dict[str, MetadataValue]:
    stats = work.engine
    details: dict[str, MetadataValue] = {
        "backend": facts.backend,
        "startup_seconds": round(work.startup_seconds, 2),
        "engine_seconds": round(stats.seconds, 2),
        "tokenizer_wait_percent": round(stats.tokenizer_wait_percent, 2),
        "device_wait_percent": round(stats.input_wait_percent, 2),
        "gflops": round(stats.gflops, 1),
        "roofline_percent": round(stats.roofline_percent(facts.ceiling_gflops), 1),
        "advice": advise(stats, facts.ceiling_gflops, facts.device, facts.precision, facts.max_batch_tokens),
    }
    if stats.gpu_readings:
        details |= {"gpu_utilization_percent": round(stats.gpu_percent, 1), "gpu_memory_bytes": stats.gpu_memory_bytes}
    return details
