"""Generations of embeddings: how to work in a space that is not that of the settings."""

from __future__ import annotations

from embed_assets.errors import LakeError, ModelError, SettingsError
from embed_assets.lake.spaces import find_spaces, space_table
from embed_assets.lake.tables import settings_of
from embed_assets.settings import load_settings
from embed_assets.stages.pipeline import Pipeline
from embed_assets.stages.recipe import settings_from


def pipeline_of(pipeline: Pipeline, space: str) -> Pipeline:
    """The pipeline that embeds into `space`: with the settings of now, but for those that make the space.

    Does not load the model. Raises ``LakeError`` if the space has no table, or its model is not what it was.
    """
    if space == pipeline.refreshed().model.space.name:
        return pipeline.refreshed()
    delta = pipeline.lake.open(space_table(space))
    if delta is None:
        known = ", ".join(pipeline.lake.spaces()) or "none"
        raise LakeError(f"there is no space {space!r} in the lake {pipeline.lake.root!r}, only {known}")
    properties = delta.metadata().configuration
    try:
        settings = load_settings(**settings_from(settings_of(delta), properties, pipeline.settings))
        made = Pipeline.from_settings(settings)
    except (ModelError, SettingsError) as error:
        raise LakeError(f"the model of the space {space!r} can't be used: {error}; {_advice(space)}") from error
    if made.model.space.name != space:
        raise LakeError(
            f"the model of the space {space!r} must be the one that made it, {settings.model!r} now gives the space "
            f"{made.model.space.name!r}; restore its files, or {_advice(space)}"
        )
    return made


def active_pipeline(pipeline: Pipeline) -> Pipeline:
    """The pipeline of the space that readers use. Raises ``LakeError`` if nothing was embedded yet."""
    refreshed = pipeline.refreshed()
    spaces = find_spaces(pipeline.lake, refreshed.model.space.name)
    return refreshed if spaces.active is None else pipeline_of(refreshed, spaces.active)


def _advice(space: str) -> str:
    return f"if nobody needs it any more, promote another space and run 'embed-assets retire {space}'"
