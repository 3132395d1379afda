"""The page: everything Dagster gets to see, in one place."""

from __future__ import annotations

import dagster as dg

from embed_assets.defs.assets import build_corpus_assets
from embed_assets.defs.results import RunObserver
from embed_assets.defs.specs import source_spec
from embed_assets.settings import Settings, load_settings
from embed_assets.stages.pipeline import Pipeline


def build_definitions(settings: Settings, observer: RunObserver | None = None) -> dg.Definitions:
    """The definitions over `settings`; progress goes to `observer`, or else to the runs' logs.

    Resolves the model's files, loads no model, and touches neither source nor lake (but for an int8 model, which is
    kept there).
    Raises ``SettingsError`` or ``ModelError``.
    """
    return definitions_over(Pipeline.from_settings(settings), observer)


def definitions_over(pipeline: Pipeline, observer: RunObserver | None = None) -> dg.Definitions:
    """The definitions over a pipeline that exists already."""
    return dg.Definitions(
        assets=[source_spec(pipeline), build_corpus_assets(pipeline, observer)],
        # One process per run: the model is loaded once, whatever the number of partitions.
        executor=dg.in_process_executor,
    )


defs = build_definitions(load_settings())
