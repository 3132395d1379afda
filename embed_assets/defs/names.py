"""What a corpus is called in Dagster: its assets, partitions, step and sensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import dagster as dg

from embed_assets.stages.pipeline import Pipeline

SOURCE = "source_files"
ASSETS = ("raw_documents", "chunks", "embeddings")
"""In the order in which they are made."""
DEPENDENCIES: Mapping[str, tuple[str, ...]] = {
    "raw_documents": (SOURCE,),
    "chunks": ("raw_documents",),
    # Embeddings show each chunk's title and uri, so they follow the documents as well.
    "embeddings": ("chunks", "raw_documents"),
}
POOL = "gpu"
"""The pool that the step holds: one device, one step at a time."""
AUTOMATED_TAG = "embed_assets/automated"
"""On runs that no person started."""
CODE_TAG = "embed_assets/code_versions"
"""On every run: what its code was, so that a change of it lifts a failure."""
ALLOW_EMPTY_TAG = "embed_assets/allow_empty"
"""On runs that are to drop everything when the source is empty."""
LASTING_TAG = "embed_assets/failed_for_good"
"""On runs that failed for a reason that stays: trying again later would not help."""


@dataclass(frozen=True, slots=True)
class Names:
    """Several corpora in one code location differ by their prefix; one alone needs none."""

    prefix: str = ""

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        """The names of a pipeline's corpus."""
        return cls(pipeline.settings.name_prefix)

    def key(self, asset: str) -> dg.AssetKey:
        """Dagster's key of `source_files` or one of `ASSETS`."""
        return dg.AssetKey([self.prefix, asset] if self.prefix else [asset])

    def user_string(self, asset: str) -> str:
        """The same as Dagster writes it in tags and selections."""
        return self.key(asset).to_user_string()

    def prefixed(self, name: str) -> str:
        """A name of Dagster's that must be unique in a code location or instance."""
        return f"{self.prefix}_{name}" if self.prefix else name

    @property
    def group(self) -> str:
        """The assets' group."""
        return self.prefix or "corpus"

    @property
    def partitions(self) -> dg.DynamicPartitionsDefinition:
        """The corpus's partitions; which ones there are is kept in Dagster's instance."""
        return dg.DynamicPartitionsDefinition(name=self.partitions_name)

    @property
    def partitions_name(self) -> str:
        """Their name in the instance."""
        return self.prefixed("corpus")


def code_tag(pipeline: Pipeline) -> str:
    """The code versions of the three assets, as the value of `CODE_TAG`."""
    return ", ".join(pipeline.code_versions[asset] for asset in ASSETS)
