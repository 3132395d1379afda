"""The engine's numbers in a materialization's metadata."""

from __future__ import annotations

import dagster as dg

from embed_assets.defs.recording import MetadataValue
from embed_assets.engine.engine import EngineFacts
from embed_assets.engine.metrics import advise
from embed_assets.engine.ray import PoolReport
from embed_assets.stages.embeddings import Work


def engine_metadata(work: Work, facts: EngineFacts, report: PoolReport | None) -> dict[str, MetadataValue]:
    """What the engine did for a partition, how fast, on what; and if it embedded anything, what bounded it."""
    stats = work.engine
    metadata: dict[str, MetadataValue] = {
        "tokens": stats.tokens,
        "tokens_per_second": round(stats.tokens_per_second, 1),
        "padding_percent": round(stats.padding_percent, 2),
        "device": facts.device,
        "precision": facts.precision,
        "max_batch_tokens": facts.max_batch_tokens,
    }
    if stats.tokens:
        metadata |= _details(work, facts)
        if report is not None and report.workers:
            # `stats` has the seconds of all workers together: their average, not what the cluster does.
            metadata |= {"tokens_per_second": report.tokens_per_second, **_workers(report)}
    return metadata


def _workers(report: PoolReport) -> dict[str, MetadataValue]:
    """Who did it: all workers that ran, since the run began."""
    rows = [
        dg.TableRecord(
            {"worker": w.place, "tokens": w.tokens, "tokens/s": w.tokens_per_second, "busy %": w.busy_percent}
        )
        for w in report.workers
    ]
    return {
        "ray_cluster": str(report),
        "ray_dashboard": dg.MetadataValue.url(report.dashboard) if report.dashboard else "none",
        "ray_workers": len(report.workers),
        "ray_nodes": len(report.nodes),
        "ray_utilization_percent": round(sum(w.busy_percent for w in report.workers) / len(report.workers), 1),
        "ray_tokens_per_second_per_worker": dg.MetadataValue.table(rows),
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
