"""The corpus as a Dagster component: a few lines of YAML instead of Python.

In a project of `dg`, a folder under `defs/` with a `defs.yaml`:

    type: embed_assets.component.EmbeddedCorpus
    attributes:
      name_prefix: handbook
      source: s3://bucket/handbook
      lake: s3://bucket/lakes/handbook
      settings: {model: BAAI/bge-small-en-v1.5}
"""
# No postponed annotations here: Dagster makes the YAML's schema of them.

import functools
from typing import Any

import dagster as dg
from pydantic import BaseModel, create_model, model_validator

from embed_assets.definitions import build_definitions
from embed_assets.settings import load_settings
from embed_assets.spelling import did_you_mean


class EmbeddedCorpus(dg.Component, dg.Model, dg.Resolvable):
    """Keeps a Delta table of embeddings in step with a corpus.

    What is not given comes from the environment.
    """

    source: str
    """Folder or fsspec URL of the documents."""
    lake: str
    """Folder or URL of the Delta tables; each corpus needs one of its own."""
    name_prefix: str = ""
    """Put before the assets' names: one corpus of several."""
    settings: dict[str, Any] = {}  # noqa: RUF012 (a pydantic field)
    """All other settings, by their names in lower case: `model`, `partition_by`, `chunk_tokens`, ..."""

    @classmethod
    @functools.cache
    def model(cls) -> type[BaseModel]:
        """The schema of the YAML. A name that it does not have is told with the one that was meant."""
        known = super().model()

        def check(values: object) -> object:
            for name in set(values) - set(known.model_fields) if isinstance(values, dict) else ():
                meant = did_you_mean(name, known.model_fields)
                raise ValueError(f"{name!r} is no attribute of EmbeddedCorpus{meant}; correct or remove it")
            return values

        validators: dict[str, Any] = {"check": model_validator(mode="before")(check)}
        return create_model(known.__name__, __base__=known, __validators__=validators)

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Assets, checks and sensors of the corpus. Raises ``SettingsError`` or ``ModelError``."""
        given = {"source": self.source, "lake": self.lake, "name_prefix": self.name_prefix, **self.settings}
        return build_definitions(load_settings(**given))
