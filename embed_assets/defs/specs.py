"""The assets as Dagster shows them: keys, dependencies, descriptions, columns."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from embed_assets.lake.tables import CHUNK_TABLE, RAW, TableSpec
from embed_assets.records import COLUMN_DESCRIPTIONS
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
GROUP = "corpus"

corpus_partitions = dg.DynamicPartitionsDefinition(name="corpus")

_DESCRIPTIONS = {
    SOURCE: "The files of the corpus as their listing shows them. `embed-assets discover` observes them: "
    "a partition's data version is a hash over its paths, sizes and ETags or times.",
    "raw_documents": "One row per document: its text, where it was read, and a hash of its content. "
    "What could not be read is in the table `rejected_documents`, with the reason.",
    "chunks": "One row per chunk: a span of one document that fits the model, split at headings, blocks and sentences.",
    "embeddings": "One row per chunk with its unit-norm vector. Only texts that have no vector yet are embedded; "
    "each embedding space (model, prompt, dimension) has a table of its own.",
}
_KINDS = {
    SOURCE: {"file"},
    "raw_documents": {"python", "deltalake"},
    "chunks": {"python", "deltalake"},
    "embeddings": {"pytorch", "deltalake"},
}


def asset_specs(pipeline: Pipeline) -> list[dg.AssetSpec]:
    """The three assets of the step."""
    tables = {"raw_documents": RAW, "chunks": CHUNK_TABLE, "embeddings": pipeline.embeddings_table}
    return [
        dg.AssetSpec(
            key=name,
            deps=list(DEPENDENCIES[name]),
            description=_DESCRIPTIONS[name],
            group_name=GROUP,
            kinds=_KINDS[name],
            owners=["team:data"],
            code_version=pipeline.code_versions[name],
            skippable=True,
            partitions_def=corpus_partitions,
            metadata={
                "dagster/column_schema": _column_schema(tables[name]),
                "dagster/table_name": tables[name].path,
                "dagster/uri": pipeline.lake.uri(tables[name]),
            },
        )
        for name in ASSETS
    ]


def source_spec(pipeline: Pipeline) -> dg.AssetSpec:
    """The external asset that stands for the source."""
    return dg.AssetSpec(
        key=SOURCE,
        description=_DESCRIPTIONS[SOURCE],
        group_name=GROUP,
        kinds=_KINDS[SOURCE],
        owners=["team:data"],
        partitions_def=corpus_partitions,
        metadata={"dagster/uri": pipeline.source.root},
    )


def _column_schema(table: TableSpec) -> dg.TableSchema:
    return dg.TableSchema(
        columns=[
            dg.TableColumn(field.name, str(field.type), description=COLUMN_DESCRIPTIONS[field.name])
            for field in table.schema
        ]
    )
