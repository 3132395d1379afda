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

import dagster as dg

from embed_assets.definitions import build_definitions
from embed_assets.settings import load_settings


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
    settings: dict[str, str | int | float | bool] = {}  # noqa: RUF012 (a pydantic field)
    """All other settings, by their names in lower case: `model`, `partition_by`, `chunk_tokens`, ..."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Assets, checks and sensors of the corpus. Raises ``SettingsError`` or ``ModelError``."""
        given = {"source": self.source, "lake": self.lake, "name_prefix": self.name_prefix, **self.settings}
        return build_definitions(load_settings(**given))
