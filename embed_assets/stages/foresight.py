"""Guesses, before Dagster is loaded, whether a sync will need the model, so that it loads meanwhile.

A wrong guess costs time and nothing else: a model that loads in vain, or later than it could have.
"""

from __future__ import annotations

from embed_assets.corpus.source import SourcePartition
from embed_assets.engine import user_cache
from embed_assets.errors import LakeError, SourceError
from embed_assets.locations import local_path
from embed_assets.records import hash_parts
from embed_assets.stages.pipeline import DatedListing, Pipeline

_KIND = "synced"


def load_model_early(pipeline: Pipeline) -> DatedListing | None:
    """Start loading the model if the source is not as the last sync on this machine left it.

    Returns the source's listing, if it was listed for that. Only for local sources: listing another takes as long as
    this may save.
    """
    process = pipeline.model.process
    if process is None or pipeline.settings.compute != "local" or local_path(pipeline.corpus.source.root) is None:
        return None
    try:
        listed = DatedListing.of(pipeline)
    except (SourceError, LakeError):
        return None  # the sync itself will say so
    if listed.partitions and user_cache.read(_KIND, _name(pipeline)) != _state(pipeline, listed.partitions):
        process.start()
    return listed


def remember_synced(pipeline: Pipeline, partitions: dict[str, SourcePartition]) -> None:
    """Remember the state of a source that was synced completely."""
    user_cache.write(_KIND, _name(pipeline), _state(pipeline, partitions))


def _name(pipeline: Pipeline) -> str:
    return hash_parts((pipeline.lake.root, pipeline.corpus.source.root))


def _state(pipeline: Pipeline, partitions: dict[str, SourcePartition]) -> str:
    versions = (part for key, files in sorted(partitions.items()) for part in (key, files.version))
    return hash_parts((*pipeline.code_versions.values(), *versions))
