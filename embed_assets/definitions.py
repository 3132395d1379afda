"""Builds the Dagster definitions: assets, checks, sensors, jobs and resources."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import dagster as dg

from embed_assets.defs.active_asset import build_active_asset
from embed_assets.defs.arrivals import build_arrivals_sensor
from embed_assets.defs.assets import RETRIES, build_corpus_assets
from embed_assets.defs.automation import build_automation_sensor
from embed_assets.defs.lake_resource import lake_resources
from embed_assets.defs.maintenance_job import build_maintenance_job
from embed_assets.defs.names import Names
from embed_assets.defs.plan_job import build_plan_job
from embed_assets.defs.processes import one_process_executor
from embed_assets.defs.resources import ENGINE, engine_key, engine_resource
from embed_assets.defs.specs import source_spec
from embed_assets.settings import Settings, load_settings
from embed_assets.stages.pipeline import DatedListing, Pipeline
from embed_assets.stages.progress import RunObserver


def build_definitions(
    settings: Settings,
    observer: RunObserver | None = None,
    resources: Mapping[str, object] | None = None,
    executor: dg.ExecutorDefinition | None = None,
) -> dg.Definitions:
    """Build the definitions for `settings`; progress goes to `observer`, or by default to the runs' logs.

    Dagster initializes `resources`, such as a connection to a Ray cluster, before the step starts; an
    `EmbeddingEngine` among them, under `embedding_engine`, takes the place of the settings' values that it is given.
    To put several corpora into one code location, give each its own ``name_prefix`` and ``lake`` and use
    ``Definitions.merge``. `executor` is the code location's, if it has none: `one_process_executor` loads the model
    once for all steps of a run.

    Resolves the model's files without loading the model, and reads neither source nor lake, except for an int8 model,
    which is stored in the lake. Raises ``SettingsError`` or ``ModelError``.
    """
    made = definitions_over(Pipeline.from_settings(settings), observer, resources=resources)
    return made if executor is None else dg.Definitions.merge(made, dg.Definitions(executor=executor))


def definitions_over(
    pipeline: Pipeline,
    observer: RunObserver | None = None,
    retries: dg.RetryPolicy = RETRIES,
    resources: Mapping[str, object] | None = None,
    listed: DatedListing | None = None,
) -> dg.Definitions:
    """Build the definitions over an existing pipeline; `retries` applies to transient errors of the step.

    `observer` and `resources` are those of `build_definitions`. `listed` is the source, if it was listed just now: runs
    list it otherwise.
    """
    given = dict(resources or {})
    engine = engine_resource(pipeline.settings, given.pop(ENGINE, None))
    pipeline = engine.applied_to(pipeline)
    with warnings.catch_warnings():
        # The tests cover the beta and preview features that are used here: importing this module should not warn.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        corpus = build_corpus_assets(pipeline, observer, retries, set(given), listed)
        assets = dg.with_source_code_references([source_spec(pipeline), corpus, build_active_asset(pipeline)])
        automation = [] if pipeline.settings.read_only else [build_automation_sensor(Names.of(pipeline))]
        sensors = [build_arrivals_sensor(pipeline), *automation]
    return dg.Definitions(
        assets=assets,
        sensors=sensors,
        jobs=[build_plan_job(pipeline), build_maintenance_job(pipeline)],
        resources={engine_key(Names.of(pipeline)): engine, **lake_resources(pipeline), **given},
    )


def __getattr__(name: str) -> dg.Definitions:
    """Build `defs` from the environment on first access, so that importing `build_definitions` needs no settings."""
    if name != "defs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["defs"] = definitions = build_definitions(load_settings(), executor=one_process_executor)
    return definitions


def __dir__() -> list[str]:
    return [*globals(), "defs"]
