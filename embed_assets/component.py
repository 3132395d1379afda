"""A Dagster component that defines a corpus in a few lines of YAML instead of Python.

Example of a `defs.yaml`, in a folder under `defs/` of a `dg` project:

    type: embed_assets.component.EmbeddedCorpus
    attributes:
      name_prefix: handbook
      source: s3://bucket/handbook
      lake: s3://bucket/lakes/handbook
      settings: {model: BAAI/bge-small-en-v1.5}
"""
# No `from __future__ import annotations`: Dagster builds the schema of the YAML from the annotations.

import functools
from typing import Any

import dagster as dg
from pydantic import BaseModel, create_model, model_validator

from embed_assets.definitions import build_definitions
from embed_assets.settings import load_settings
from embed_assets.spelling import did_you_mean


class EmbeddedCorpus(dg.Component, dg.Model, dg.Resolvable):
    """Keeps a Delta table of embeddings in sync with a corpus.

    Settings that are not given come from the environment.
    """

    source: str
    """Folder or fsspec URL of the documents."""
    lake: str
    """Folder or URL of the Delta tables; each corpus needs one of its own."""
    name_prefix: str = ""
    """Prefix of the assets' names; tells several corpora apart."""
    settings: dict[str, Any] = {}  # noqa: RUF012 (a pydantic field)
    """All other settings, by their lower-case names: `model`, `partition_by`, `chunk_tokens`, ..."""

    @classmethod
    @functools.cache
    def model(cls) -> type[BaseModel]:
        """The schema of the YAML. For an unknown attribute, its error suggests the name that was probably meant."""
        known = super().model()

        def check(values: object) -> object:
            for name in set(values) - set(known.model_fields) if isinstance(values, dict) else ():
                meant = did_you_mean(name, known.model_fields)
                raise ValueError(f"{name!r} is not an attribute of EmbeddedCorpus{meant}; correct or remove it")
            return values

        validators: dict[str, Any] = {"check": model_validator(mode="before")(check)}
        return create_model(known.__name__, __base__=known, __validators__=validators)

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Build the definitions of the corpus. Raises ``SettingsError`` or ``ModelError``."""
        given = {"source": self.source, "lake": self.lake, "name_prefix": self.name_prefix, **self.settings}
        return build_definitions(load_settings(**given))
