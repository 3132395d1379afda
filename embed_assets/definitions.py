"""The page: everything Dagster gets to see, in one place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import dagster as dg

from embed_assets.defs.arrivals import build_arrivals_sensor
from embed_assets.defs.assets import RETRIES, build_corpus_assets
from embed_assets.defs.automation import build_automation_sensor
from embed_assets.defs.maintenance_job import build_maintenance_job
from embed_assets.defs.names import Names
from embed_assets.defs.plan_job import build_plan_job
from embed_assets.defs.processes import one_process_executor
from embed_assets.defs.progress import RunObserver
from embed_assets.defs.specs import source_spec
from embed_assets.settings import Settings, load_settings
from embed_assets.stages.pipeline import Pipeline


def build_definitions(
    settings: Settings, observer: RunObserver | None = None, resources: Mapping[str, object] | None = None
) -> dg.Definitions:
    """The definitions over `settings`; progress goes to `observer`, or else to the runs' logs.

    The step asks for `resources` before it begins: what is to be there for it, as a connection to a Ray cluster.

    Several of them, with different ``name_prefix`` and ``lake``, go into one code location by ``Definitions.merge``.
    Resolves the model's files, loads no model, and touches neither source nor lake (but for an int8 model, which is
    kept there). Raises ``SettingsError`` or ``ModelError``.
    """
    return definitions_over(Pipeline.from_settings(settings), observer, resources=resources)


def definitions_over(
    pipeline: Pipeline,
    observer: RunObserver | None = None,
    retries: dg.RetryPolicy = RETRIES,
    resources: Mapping[str, object] | None = None,
) -> dg.Definitions:
    """The definitions over a pipeline that exists already; `retries` is for what may pass."""
    with warnings.catch_warnings():
        # That parts of Dagster are new is known, and held by tests: no news for whoever loads this.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        corpus = build_corpus_assets(pipeline, observer, retries, set(resources or ()))
        assets = dg.with_source_code_references([source_spec(pipeline), corpus])
        sensors = [build_arrivals_sensor(pipeline), build_automation_sensor(Names.of(pipeline))]
    return dg.Definitions(
        assets=assets,
        sensors=sensors,
        jobs=[build_plan_job(pipeline), build_maintenance_job(pipeline)],
        resources=resources,
        executor=one_process_executor,
    )


def __getattr__(name: str) -> dg.Definitions:
    """`defs`, made when Dagster asks for it: whoever imports `build_definitions` needs no environment."""
    if name != "defs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["defs"] = made = build_definitions(load_settings())
    return made


def __dir__() -> list[str]:
    return [*globals(), "defs"]
