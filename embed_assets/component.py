"""A Dagster component that defines a corpus in a few lines of YAML instead of Python.

Example of a `defs.yaml`, in a folder under `defs/` of a `dg` project:

    type: embed_assets.component.EmbeddedCorpus
    attributes:
      name_prefix: handbook
      source: s3://bucket/handbook
      lake: s3://bucket/lakes/handbook
      settings: {model: BAAI/bge-small-en-v1.5}
      owners: [team:search]
"""
# No `from __future__ import annotations`: Dagster builds the schema of the YAML from the annotations.

import functools
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal, Union

import dagster as dg
from dagster.components.component_scaffolding import scaffold_component
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo

from embed_assets.definitions import build_definitions
from embed_assets.defs.names import SOURCE
from embed_assets.settings import Settings, load_settings
from embed_assets.spelling import did_you_mean

_OWN = ("source", "lake", "name_prefix")
"""Settings that are attributes of the component itself."""
_Template = Annotated[str, StringConstraints(pattern=r"\{\{.*\}\}")]
"""A value that Dagster computes: {{ env.NAME }}."""


def _described(name: str) -> dg.Resolver:
    """An attribute with the description of a setting."""
    described: dg.Resolver = dg.Resolver.default(description=Settings.model_fields[name].description)
    return described


def _setting(name: str) -> tuple[Any, Any]:
    """Type, rules and description of a setting as an optional value in YAML."""
    field = Settings.model_fields[name]
    kinds: list[Any] = [dict[str, JsonValue]] if name.endswith("_options") else [_with_rules(field)]
    if any(isinstance(rule, BeforeValidator) for rule in field.metadata):
        kinds.append(Literal["auto"])
    return Union[(*kinds, _Template)], Field(None, description=field.description)


def _with_rules(field: FieldInfo) -> Any:
    rules = [rule for rule in field.metadata if not isinstance(rule, BeforeValidator)]
    return Annotated[(field.annotation, *rules)] if rules else field.annotation


CorpusSettings = create_model(
    "CorpusSettings",
    __config__=ConfigDict(extra="forbid"),
    __module__=__name__,
    **{name: _setting(name) for name in Settings.model_fields if name not in _OWN},  # type: ignore[call-overload]
)


def _resolved(context: dg.ResolutionContext, given: BaseModel) -> dict[str, Any]:
    return dict(context.resolve_value(given.model_dump(exclude_unset=True)))


class Freshness(dg.Model, dg.Resolvable):
    """How old the assets may be, by the time of their last materialization: they stay as they are while nothing changes
    in the source, so this is for sources that must change."""

    fail_after_hours: float = Field(gt=0, description="Older assets are overdue.")
    warn_after_hours: float | None = Field(None, gt=0, description="Older assets are about to be.")

    def policy(self) -> dg.FreshnessPolicy:
        """Dagster's policy."""
        warn = None if self.warn_after_hours is None else timedelta(hours=self.warn_after_hours)
        return dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=self.fail_after_hours), warn_window=warn)


class CorpusScaffolder(dg.Scaffolder[Any]):
    """Writes a `defs.yaml` in which the places of the documents and of the tables are to be filled in."""

    def scaffold(self, request: dg.ScaffoldRequest[Any]) -> None:
        """Write the file."""
        word = "".join(c if c.isascii() and c.isalnum() else "_" for c in request.target_path.name)
        prefix = word.lstrip("_0123456789")[:60]
        places = {"source": "FOLDER_OR_URL_OF_THE_DOCUMENTS", "lake": "FOLDER_OR_URL_OF_THE_TABLES"}
        scaffold_component(request, {"name_prefix": prefix, **places})


@dg.scaffold_with(CorpusScaffolder)
class EmbeddedCorpus(dg.Component, dg.Model, dg.Resolvable):
    """Keeps a Delta table of embeddings in sync with a corpus.

    Settings that are not given come from the environment.
    """

    source: Annotated[str, _described("source")]
    lake: Annotated[str, _described("lake")]
    name_prefix: Annotated[str, _described("name_prefix")] = ""
    settings: Annotated[
        dict[str, Any],
        dg.Resolver(
            _resolved, model_field_type=CorpusSettings, description="All other settings, by their lower-case names."
        ),
    ] = {}  # noqa: RUF012 (a pydantic field)
    owners: Annotated[list[str], dg.Resolver.default(description="Email addresses, or team:NAME.")] = []  # noqa: RUF012
    tags: Annotated[dict[str, str], dg.Resolver.default(description="Tags of the assets.")] = {}  # noqa: RUF012
    group_name: Annotated[
        str | None, dg.Resolver.default(description="Group of the assets; default: the prefix, else corpus.")
    ] = None
    kinds: Annotated[list[str], dg.Resolver.default(description="Kinds of the assets, besides their own.")] = []  # noqa: RUF012
    freshness: Annotated[
        Freshness | None, dg.Resolver.default(description="How old the assets may be; default: as old as the source.")
    ] = None

    @classmethod
    @functools.cache
    def model(cls) -> type[BaseModel]:
        """The schema of the YAML. For an unknown attribute, its error suggests the name that was probably meant."""
        known = super().model()

        def check(values: object) -> object:
            given = values if isinstance(values, Mapping) else {}
            settings = given.get("settings")
            _require_known(given, known.model_fields, "an attribute of EmbeddedCorpus")
            _require_known(settings if isinstance(settings, Mapping) else {}, CorpusSettings.model_fields, "a setting")
            return values

        validators: dict[str, Any] = {"check": model_validator(mode="before")(check)}
        # Not also strings, as Dagster has them: an error inside would be shown as one of the whole attribute.
        described = {name: known.model_fields[name].description for name in ("settings", "freshness")}
        settings: Any = CorpusSettings, Field(default_factory=CorpusSettings, description=described["settings"])
        freshness: Any = Freshness.model(), Field(None, description=described["freshness"])
        return create_model(
            known.__name__, __base__=known, __validators__=validators, settings=settings, freshness=freshness
        )

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Build the definitions of the corpus. Raises ``SettingsError`` or ``ModelError``."""
        own = {name: getattr(self, name) for name in _OWN}
        return build_definitions(load_settings(**own, **self.settings)).map_asset_specs(func=self._attributed)

    def _attributed(self, spec: dg.AssetSpec) -> dg.AssetSpec:
        merged = spec.merge_attributes(tags=self.tags, kinds=set(self.kinds))
        changes: dict[str, Any] = {} if self.group_name is None else {"group_name": self.group_name}
        if self.owners:
            changes["owners"] = self.owners
        if self.freshness is not None and spec.key.path[-1] != SOURCE:
            changes["freshness_policy"] = self.freshness.policy()
        return merged.replace_attributes(**changes)


def _require_known(given: Mapping[str, object], known: Collection[str], what: str) -> None:
    for name in given.keys() - known:
        raise ValueError(f"{name!r} is not {what}{did_you_mean(name, known)}; correct or remove it")
