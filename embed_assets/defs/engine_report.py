"""The engine's numbers in a materialization's metadata."""

from __future__ import annotations

from embed_assets.defs.recording import MetadataValue
from embed_assets.engine.engine import EngineFacts
from embed_assets.engine.metrics import advise
from embed_assets.stages.embeddings import Work


def engine_metadata(work: Work, facts: EngineFacts) -> dict[str, MetadataValue]:
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
    return metadata


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
