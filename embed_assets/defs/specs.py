"""Asset specs for Dagster: keys, dependencies, descriptions, column schemas and column lineage."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from embed_assets.defs.automation import build_condition
from embed_assets.defs.lake_resource import IO_MANAGER
from embed_assets.defs.names import ASSETS, DEPENDENCIES, SOURCE, Names
from embed_assets.defs.staleness import tables_of
from embed_assets.lake.tables import TableSpec
from embed_assets.records import COLUMN_DESCRIPTIONS
from embed_assets.stages.pipeline import Pipeline

_DESCRIPTIONS = {
    SOURCE: "The files of the corpus as their listing shows them. The sensor `arrivals`, `embed-assets discover` and "
    "every run observe them: a partition's data version is a hash over its paths, sizes and ETags or times.",
    "raw_documents": "One row per document: its text, where it was read, and a hash of its content. "
    "Files and rows that could not be read are in the table `rejected_documents`, with the reason.",
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
_SPAN = ("heading_path", "char_start", "char_end", "token_count")
_LINEAGE: Mapping[str, Mapping[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "raw_documents": {},
    "chunks": {
        ("chunk_id",): (("raw_documents", "document_id"), ("raw_documents", "text")),
        ("text", "text_hash", "chunk_index", *_SPAN): (("raw_documents", "text"),),
    },
    "embeddings": {("is_truncated", "input_hash", "embedding"): (("chunks", "text"),)},
}
"""By asset, groups of columns with the (asset, column) pairs that they are computed from."""
_COPIED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "raw_documents": (),
    "chunks": tuple(("raw_documents", column) for column in ("partition_key", "document_id")),
    "embeddings": (
        *(("chunks", c) for c in ("partition_key", "chunk_id", "document_id", "chunk_index", "text", *_SPAN)),
        ("raw_documents", "uri"),
        ("raw_documents", "title"),
    ),
}
"""By asset, the (asset, column) pairs that are copied unchanged."""


def asset_specs(pipeline: Pipeline) -> list[dg.AssetSpec]:
    """Specs of the three assets that the step materializes."""
    names = Names.of(pipeline)
    # A deployment that only reads must not request runs, which would be refused.
    condition = None if pipeline.settings.read_only else build_condition(pipeline)
    tables = tables_of(pipeline)
    return [
        dg.AssetSpec(
            key=names.key(asset),
            deps=[names.key(dependency) for dependency in DEPENDENCIES[asset]],
            description=_DESCRIPTIONS[asset],
            group_name=names.group,
            kinds=_KINDS[asset],
            owners=["team:data"],
            code_version=pipeline.code_versions[asset],
            skippable=True,
            automation_condition=condition,
            partitions_def=names.partitions,
            metadata={
                "dagster/column_schema": _column_schema(tables[asset]),
                "dagster/column_lineage": _column_lineage(names, asset),
                "dagster/table_name": tables[asset].path,
                "dagster/uri": pipeline.lake.uri(tables[asset]),
                "dagster/io_manager_key": names.prefixed(IO_MANAGER),
            },
        )
        for asset in ASSETS
    ]


def source_spec(pipeline: Pipeline) -> dg.AssetSpec:
    """Spec of the external asset that represents the source files."""
    names = Names.of(pipeline)
    return dg.AssetSpec(
        key=names.key(SOURCE),
        description=_DESCRIPTIONS[SOURCE],
        group_name=names.group,
        kinds=_KINDS[SOURCE],
        owners=["team:data"],
        partitions_def=names.partitions,
        metadata={"dagster/uri": pipeline.corpus.source.root},
    )


_METADATA = "a field of the document's metadata; null where it has none"


def _column_schema(table: TableSpec) -> dg.TableSchema:
    return dg.TableSchema(
        columns=[
            dg.TableColumn(field.name, str(field.type), description=COLUMN_DESCRIPTIONS.get(field.name, _METADATA))
            for field in table.schema
        ]
    )


def _column_lineage(names: Names, asset: str) -> dg.TableColumnLineage:
    sources = {column: found for columns, found in _LINEAGE[asset].items() for column in columns}
    sources |= {column: ((dependency, column),) for dependency, column in _COPIED[asset]}
    return dg.TableColumnLineage(
        deps_by_column={
            column: [dg.TableColumnDep(names.key(dependency), name) for dependency, name in found]
            for column, found in sources.items()
        }
    )
