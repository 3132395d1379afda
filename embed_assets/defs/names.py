"""Names of a corpus in Dagster: assets, partitions, step, jobs, sensors and run tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import dagster as dg

from embed_assets.stages.pipeline import Pipeline

SOURCE = "source_files"
ASSETS = ("raw_documents", "chunks", "embeddings")
"""In the order in which they are materialized."""
ACTIVE = "active_embeddings"
"""The asset of the space that readers use."""
DEPENDENCIES: Mapping[str, tuple[str, ...]] = {
    "raw_documents": (SOURCE,),
    "chunks": ("raw_documents",),
    # Embeddings carry their document's title and uri, so they depend on the documents as well.
    "embeddings": ("chunks", "raw_documents"),
}
POOL = "gpu"
"""The concurrency pool of the step: its limit is the number of devices, one step for each."""
AUTOMATED_TAG = "embed_assets/automated"
"""Run tag: the automation condition requested this run."""
CODE_TAG = "embed_assets/code_versions"
"""Run tag: the code versions of the run, so that changed code is attempted again after a failure."""
ALLOW_EMPTY_TAG = "embed_assets/allow_empty"
"""Run tag: drop all partitions if the source is empty."""
PERMANENT_FAILURE_TAG = "embed_assets/failed_for_good"
"""Run tag: the run failed with errors that are not retryable."""


@dataclass(frozen=True, slots=True)
class Names:
    """Dagster names of one corpus."""

    prefix: str = ""
    """Tells several corpora in one code location apart; a single one needs none."""

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """Names of a pipeline's corpus, by its setting `name_prefix`."""
        return cls(pipeline.settings.name_prefix)

    def key(self, asset: str) -> dg.AssetKey:
        """Asset key of `source_files` or of one of `ASSETS`."""
        return dg.AssetKey([self.prefix, asset] if self.prefix else [asset])

    def space_key(self, space: str) -> dg.AssetKey:
        """Key under which a space is recorded while it is not the configured one."""
        return dg.AssetKey([*self.key("embeddings").path, space])

    def user_string(self, asset: str) -> str:
        """Asset key as Dagster writes it in tags and selections, such as `prefix/chunks`."""
        return self.key(asset).to_user_string()

    def prefixed(self, name: str) -> str:
        """The name with the prefix, for names that must be unique in a code location or instance."""
        return f"{self.prefix}_{name}" if self.prefix else name

    @property
    def group(self) -> str:
        """Name of the asset group."""
        return self.prefix or "corpus"

    @property
    def partitions(self) -> dg.DynamicPartitionsDefinition:
        """Definition of the corpus's partitions; their keys are stored in the Dagster instance."""
        return dg.DynamicPartitionsDefinition(name=self.partitions_name)

    @property
    def partitions_name(self) -> str:
        """Name of the partitions definition, under which the instance stores the keys."""
        return self.prefixed("corpus")


def code_tag(pipeline: Pipeline) -> str:
    """Value of `CODE_TAG`: the code versions of the three assets."""
    return ", ".join(pipeline.code_versions[asset] for asset in ASSETS)
