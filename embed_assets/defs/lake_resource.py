"""The resource `lake` and an IO manager: the corpus's tables, for assets below ours."""
# No `from __future__ import annotations`: Dagster builds the schema of the configuration from the annotations.

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import dagster as dg
import pyarrow as pa
from deltalake import DeltaTable

from embed_assets.defs.names import Names
from embed_assets.defs.staleness import tables_of
from embed_assets.errors import LakeError, SettingsError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.spaces import find_spaces, space_table
from embed_assets.lake.tables import TableSpec
from embed_assets.stages.pipeline import Pipeline

if TYPE_CHECKING:
    import polars as pl

LAKE = "lake"
IO_MANAGER = "lake_io_manager"


class EmbeddingLake(dg.ConfigurableResource[None]):
    """Reads the corpus's tables: `embeddings`, `chunks`, `raw_documents` and `rejected_documents`.

    The embeddings are those of the active space, which is that of the settings once it was promoted.

    Every call reads the newest version of its table. Raises ``LakeError`` if it can't be read.
    """

    pipeline: ClassVar[Pipeline]

    def scan(self, table: str = "embeddings", partitions: Sequence[str] | None = None) -> "pl.LazyFrame":
        """The rows of some partitions, or of all, as a polars LazyFrame. Needs polars."""
        import polars as pl

        spec = self._spec(table)
        delta = self.pipeline.lake.open(spec)
        if delta is None:
            return pl.LazyFrame(pl.from_arrow(spec.schema.empty_table()))
        rows = pl.scan_delta(delta)
        return rows if partitions is None else rows.filter(pl.col("partition_key").is_in(list(partitions)))

    def reader(
        self,
        table: str = "embeddings",
        columns: Sequence[str] | None = None,
        partitions: Sequence[str] | None = None,
    ) -> pa.RecordBatchReader:
        """The rows of some partitions, or of all, as a stream of Arrow batches, in no particular order."""
        spec = self._spec(table)
        if unknown := [name for name in columns or () if name not in spec.schema.names]:
            raise LakeError(f"{table} has no column {unknown[0]!r}; it has {', '.join(spec.schema.names)}")
        schema = spec.schema if columns is None else pa.schema([spec.schema.field(name) for name in columns])
        return pa.RecordBatchReader.from_batches(schema, self._batches(spec, schema.names, partitions))

    def delta(self, table: str = "embeddings") -> DeltaTable:
        """The Delta table. Raises ``LakeError`` if it does not exist yet."""
        found = self.pipeline.lake.open(self._spec(table))
        if found is None:
            raise LakeError(f"the table {table!r} does not exist yet; materialize {table} first")
        return found

    def _spec(self, table: str) -> TableSpec:
        pipeline = self.pipeline.refreshed()
        tables = tables_of(pipeline)
        if table == "embeddings" and (active := find_spaces(pipeline.lake, pipeline.model.space.name).active):
            return pipeline.lake.full(space_table(active))
        if table not in tables:
            raise LakeError(f"the lake has no table {table!r}; it has {', '.join(tables)}")
        return tables[table]

    def _batches(
        self, spec: TableSpec, columns: Sequence[str], partitions: Sequence[str] | None
    ) -> Iterator[pa.RecordBatch]:
        with Snapshot(self.pipeline.lake.session()) as tables:
            if partitions is None:
                yield from tables.rows(spec, columns)
            for key in partitions or ():
                yield from tables.partition(key).rows(spec, columns)


class LakeIOManager(dg.ConfigurableIOManager):
    """Gives assets below ours the rows of their partitions, as the type that they ask for."""

    pipeline: ClassVar[Pipeline]

    def load_input(self, context: dg.InputContext) -> Any:
        """The rows of the upstream asset: of the run's partitions or, for an asset without partitions, all."""
        table = context.asset_key.path[-1]
        step = context.step_context
        is_of_partitions = step.has_partition_key or step.has_partition_key_range
        # Without partitions all rows, also of keys that this Dagster instance does not know.
        keys = list(context.asset_partition_keys) if is_of_partitions and context.has_asset_partitions else None
        lake: EmbeddingLake = _bound(EmbeddingLake, self.pipeline)
        wanted = context.dagster_type.typing_type
        name = f"{getattr(wanted, '__module__', '')}.{getattr(wanted, '__qualname__', wanted)}"
        if wanted is pa.RecordBatchReader:
            return lake.reader(table, partitions=keys)
        if wanted is pa.Table:
            return lake.reader(table, partitions=keys).read_all()
        if name.startswith("polars.") and name.endswith(".LazyFrame"):
            return lake.scan(table, keys)
        if name.startswith("polars.") and name.endswith(".DataFrame"):
            return lake.scan(table, keys).collect()
        raise SettingsError(
            f"the input {context.name!r} must be annotated with pl.LazyFrame, pl.DataFrame, pa.RecordBatchReader or "
            f"pa.Table, got {getattr(wanted, '__name__', wanted)}; annotate it, or take the resource {LAKE!r}"
        )

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Not for outputs: our assets write their tables themselves."""
        raise SettingsError(f"the IO manager {IO_MANAGER!r} only reads, got an output of {context.step_key!r}")


def lake_resources(pipeline: Pipeline) -> dict[str, object]:
    """The resource and the IO manager of a corpus, by their keys."""
    names = Names.of(pipeline)
    document = f"{EmbeddingLake.__doc__}\n\nLake: `{pipeline.lake.root}`, space: `{pipeline.model.space.name}`."
    lake = _bound(EmbeddingLake, pipeline, document)
    return {names.prefixed(LAKE): lake, names.prefixed(IO_MANAGER): _bound(LakeIOManager, pipeline)}


def _bound(kind: type[Any], pipeline: Pipeline, document: str | None = None) -> Any:
    """An instance whose class knows the pipeline: Dagster makes others from its fields.

    The lake's options may be secrets, so they are no fields, which Dagster would show.
    """
    attributes = {"__module__": kind.__module__, "__doc__": document or kind.__doc__, "pipeline": pipeline}
    return type(kind.__name__, (kind,), attributes)()
