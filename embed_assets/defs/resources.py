"""The resource `embedding_engine`: how and where the model runs. It changes nothing that is stored, so it can be set
for a single run."""
# No `from __future__ import annotations`: Dagster builds the schema of the configuration from the annotations.

import os
from collections.abc import Mapping
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from embed_assets.defs.names import Names
from embed_assets.errors import SettingsError
from embed_assets.settings import PREFIX, Settings, load_settings, variable_of
from embed_assets.stages.pipeline import Pipeline

ENGINE = "embedding_engine"


def _setting(name: str) -> Any:
    """The field of a setting: its default and description. Its rules are applied by `EmbeddingEngine.applied_to`."""
    setting = Settings.model_fields[name]
    return Field(setting.default, description=setting.description)


class EmbeddingEngine(dg.ConfigurableResource[None]):
    """How and where the model runs: the settings that recompute nothing."""

    device: str = _setting("device")
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8"] = _setting("precision")
    max_batch_tokens: int | None = _setting("max_batch_tokens")
    compile: bool = _setting("compile")
    compute: Literal["local", "ray"] = _setting("compute")
    ray_address: str | None = _setting("ray_address")
    ray_replicas: str = _setting("ray_replicas")
    ray_gpus_per_replica: float | None = _setting("ray_gpus_per_replica")
    ray_cpus_per_replica: int | None = _setting("ray_cpus_per_replica")
    ray_wait_seconds: float = _setting("ray_wait_seconds")

    def applied_to(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this engine. Raises ``SettingsError`` if a value is wrong or would change the vectors."""
        settings = pipeline.settings
        if (self.precision == "int8") != (settings.precision == "int8"):
            raise SettingsError(
                f"the precision of a run must stay in its embedding space, which is that of {PREFIX}PRECISION="
                f"{settings.precision!r}, got {self.precision!r} in the resource {ENGINE!r}: int8 vectors are another "
                f"space; set {PREFIX}PRECISION for the whole deployment"
            )
        values = {name: _value(getattr(self, name)) for name in _NAMES}
        try:
            return pipeline.with_settings(load_settings(**settings.model_dump() | values))
        except SettingsError as error:
            raise SettingsError(f"the resource {ENGINE!r} can't be used: {error}") from error


_NAMES = tuple(EmbeddingEngine.model_fields)


def engine_resource(settings: Settings, given: object = None) -> EmbeddingEngine:
    """The engine of a deployment: with the fields that are set in `given`, an `EmbeddingEngine`, and the settings.

    Its description says what is in force and where it comes from. Raises ``SettingsError`` if `given` is something
    else.
    """
    if given is not None and not isinstance(given, EmbeddingEngine):
        raise SettingsError(f"the resource {ENGINE!r} must be an EmbeddingEngine, got {type(given).__name__}")
    chosen = {} if given is None else {name: getattr(given, name) for name in given.model_fields_set}
    values = {name: getattr(settings, name) for name in _NAMES} | chosen
    lines = [
        f"| `{name}` | {_shown(name, _value(value))} | {_origin(name, settings, chosen)} |"
        for name, value in values.items()
    ]
    table = "\n".join(["| setting | in force | from |", "|---|---|---|", *lines])
    # Dagster takes a resource's description from its class.
    described = type(EmbeddingEngine.__name__, (EmbeddingEngine,), {"__doc__": f"{EmbeddingEngine.__doc__}\n\n{table}"})
    engine = described(**values)
    assert isinstance(engine, EmbeddingEngine)
    return engine


def _value(given: object) -> object:
    """A field's value; that of a `dg.EnvVar` from the environment. Raises ``SettingsError`` if the variable is missing
    or no number."""
    variable = getattr(given, "env_var_name", None)
    if variable is None:
        return given
    try:
        value = given.get_value()  # type: ignore[attr-defined]
    except ValueError:
        value = None
    if value is None:
        raise SettingsError(
            f"the resource {ENGINE!r} reads the variable {variable}, which must be set"
            f"{' to a whole number' if isinstance(given, int) else ''}, got {os.environ.get(variable)!r}; set it"
        )
    return value


def _shown(name: str, value: object) -> str:
    unset = "none" if name == "ray_address" else "auto"
    return unset if value is None else f"`{value}`"


def _origin(name: str, settings: Settings, chosen: Mapping[str, object]) -> str:
    if name in chosen:
        return getattr(chosen[name], "env_var_name", "the resource")
    if name not in settings.model_fields_set:
        return "default"
    return variable_of(name, getattr(settings, name)) or "the code location"


def engine_key(names: Names) -> str:
    """Key of the engine of a corpus among a code location's resources."""
    return names.prefixed(ENGINE)
