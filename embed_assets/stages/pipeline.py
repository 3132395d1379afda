"""The configured pipeline: corpus, model and lake; and estimates of what materializing would embed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from embed_assets.cluster.connection import require_ray
from embed_assets.corpus.source import SourcePartition
from embed_assets.engine.backends.quantization import CALIBRATION_TEXTS
from embed_assets.errors import LakeError
from embed_assets.lake.snapshot import Snapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, Lake, TableSpec
from embed_assets.lake.vectors import hash_keys
from embed_assets.settings import Settings
from embed_assets.stages.changes import Changes, is_known
from embed_assets.stages.chunk_rows import StoredChunks
from embed_assets.stages.corpus import Corpus
from embed_assets.stages.elsewhere import Elsewhere
from embed_assets.stages.embeddings import known_inputs
from embed_assets.stages.longer_vectors import LongerVectors, find_longer
from embed_assets.stages.model import Model
from embed_assets.stages.partition_vectors import Target
from embed_assets.stages.recipe import recipe_of

_STORED = ("chunk_id", "token_count", "unknown_tokens")
_CHUNK_COLUMNS = ("chunk_id", "before", "input_hash", "token_count", "unknown_tokens")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What materializing a partition would do."""

    to_embed: int
    """Texts to embed; identical ones count once."""
    to_reuse: int
    """Chunks whose vector exists already."""
    to_drop: int
    """Rows of embeddings whose chunk will no longer exist."""
    tokens: int
    """Tokens of the texts to embed, special tokens included."""
    unknown_tokens: int = 0
    """Those of them that the model's tokenizer has no word for."""


@dataclass(frozen=True)
class Pipeline:
    """The objects that the settings describe; the stages are functions that take them."""

    settings: Settings
    lake: Lake
    model: Model
    corpus: Corpus

    @classmethod
    def from_settings(cls, settings: Settings) -> Pipeline:
        """Build the pipeline. Resolves the model's files, but opens neither the source nor, except for int8, the lake.

        Raises ``SettingsError``, ``ModelError`` or ``LakeError``.
        """
        lake = Lake.from_settings(settings)
        if settings.compute == "ray":
            require_ray()
        model = Model.from_settings(settings, lake)
        return cls(settings, lake, model, Corpus.from_settings(settings, model.float_space))

    def with_settings(self, settings: Settings) -> Pipeline:
        """This pipeline with settings that differ in how and where the model runs, and in nothing that is stored.

        Raises ``SettingsError`` or ``ModelError``.
        """
        if settings == self.settings:
            return self
        if settings.compute == "ray":
            require_ray()
        return replace(self, settings=settings, model=Model.from_settings(settings, self.lake))

    def refreshed(self) -> Pipeline:
        """This pipeline, with the int8 model if another process has stored it meanwhile. Raises ``LakeError``."""
        model = self.model.refreshed(self.lake)
        return self if model is self.model else replace(self, model=model)

    def calibrated(self) -> Pipeline:
        """This pipeline; with int8, its model is quantized on a sample of the source unless that was done already."""
        known = self.refreshed()
        if known.model.is_calibrated:
            return known
        return replace(self, model=known.model.calibrated(self.lake, self.corpus.sample(CALIBRATION_TEXTS)))

    @property
    def embeddings_table(self) -> TableSpec:
        """The embeddings table of the configured space."""
        space = self.model.space
        return TableSpec("embeddings", space.name, space.describe(), recipe_of(self.settings))

    @cached_property
    def target(self) -> Target:
        """Where vectors are stored, and where else they may be reused from: in the lake as it is at first access."""
        table, space = self.embeddings_table, self.model.space
        longer = find_longer(Snapshot(self.lake), table, space.truncate_dim)
        if self.settings.reuse != "table":
            return Target(table, space.model_input, longer=longer)
        at_start = Snapshot(self.lake)
        at_start.version(table)
        return Target(table, space.model_input, Elsewhere(at_start, table), longer)

    @cached_property
    def code_versions(self) -> dict[str, str]:
        """Code version of each asset: what determines its output besides its input."""
        return {
            "raw_documents": self.corpus.parsing.version,
            "chunks": self.corpus.chunking.version(self.model.space.tokenizer_hash),
            "embeddings": self.model.space.name,
        }

    def require_embeddings(self) -> None:
        """Raise ``LakeError`` if nothing was embedded in the space yet, or a table is damaged."""
        if self.lake.open(self.embeddings_table) is None:
            raise LakeError(
                f"there are no embeddings in {self.embeddings_table.path!r} under the lake {self.lake.root!r}; "
                "run 'embed-assets sync' first"
            )
        self.lake.check_tables(self.embeddings_table)


@dataclass(frozen=True, slots=True)
class DatedListing:
    """The source as it was listed, and the lake's documents right before that."""

    partitions: dict[str, SourcePartition]
    """Partitions that have files, by key, in order of their keys."""
    hidden: Sequence[str]
    """Paths of files and folders that are skipped because their names begin with a dot."""
    documents_version: int | None
    """Version of the table raw_documents; None if it did not exist."""

    @classmethod
    def of(cls, pipeline: Pipeline) -> DatedListing:
        """List the source. Raises ``SourceError`` or ``LakeError``."""
        with Snapshot(pipeline.lake) as tables:
            version = tables.version(RAW)
        listing = pipeline.corpus.source.listing()
        return cls(listing.partitions, listing.hidden, version)


@dataclass(frozen=True)
class Estimator:
    """Estimates what materializing partitions would embed, by reading and splitting their documents. Writes nothing.

    One estimator serves one plan. Ask for partitions in the order in which a sync processes them.
    """

    pipeline: Pipeline
    tables: Snapshot
    """Snapshot of the lake that is read."""
    find: Callable[[SourcePartition], Changes | None] = lambda files: None
    """Finds what changed in a partition whose documents and chunks are otherwise those of its files."""

    def estimate(self, partition: SourcePartition, stale: frozenset[str], is_damaged: bool) -> Estimate:
        """What materializing a partition would do.

        `stale` names the assets that would run; fresh ones are read from their tables. With `is_damaged`, existing
        vectors are validated and unusable ones count as missing.
        """
        if not stale:
            return Estimate(0, self._stored_rows.get(partition.key, 0), 0, 0)
        table = self.pipeline.embeddings_table
        rows = self.tables.partition(partition.key)
        known, ids = known_inputs(rows, table, is_damaged)
        for batch in self._longer.rows(rows) if self._longer else ():
            known.update(batch.column("input_hash").to_pylist())
        to_embed: dict[str, tuple[int, int]] = {}
        kept = chunks = 0
        for chunk_id, before, input_hash, token_count, unknown in self._future_chunks(partition, stale):
            chunks += 1
            kept += chunk_id in ids
            if input_hash not in known:
                to_embed[input_hash] = token_count + self._tokens_of(before), unknown or 0
        if self._elsewhere is not None:
            keys = hash_keys(list(to_embed))
            is_known = self._elsewhere.has(keys).tolist()
            to_embed = {h: counts for (h, counts), known in zip(to_embed.items(), is_known, strict=True) if not known}
            self._elsewhere.add(keys)  # later partitions reuse what earlier ones would embed
        tokens, unknown_tokens = (
            (sum(counts) for counts in zip(*to_embed.values(), strict=True)) if to_embed else (0, 0)
        )
        return Estimate(len(to_embed), chunks - len(to_embed), len(ids) - kept, tokens, unknown_tokens)

    @cached_property
    def _elsewhere(self) -> Elsewhere | None:
        """Vectors of the whole table and of the partitions estimated before, if those are reused."""
        is_wide = self.pipeline.settings.reuse == "table"
        return Elsewhere(self.tables, self.pipeline.embeddings_table) if is_wide else None

    @cached_property
    def _longer(self) -> LongerVectors | None:
        """Vectors that the space's are the first dimensions of."""
        return find_longer(self.tables, self.pipeline.embeddings_table, self.pipeline.model.space.truncate_dim)

    def _tokens_of(self, before: str) -> int:
        """Tokens of what is before the texts of chunks."""
        if before not in self._prefixes:
            self._prefixes[before] = len(self.pipeline.model.space.tokenizer.encode([before])[0])
        return self._prefixes[before]

    @cached_property
    def _prefixes(self) -> dict[str, int]:
        return {"": 0}

    @cached_property
    def _stored_rows(self) -> dict[str, int]:
        """Rows of each partition's embeddings. Chunks without one were rejected by the model."""
        state = self.tables.state(self.pipeline.embeddings_table)
        return {} if state is None else {key: files.rows for key, files in state.partitions.items()}

    def _future_chunks(
        self, partition: SourcePartition, stale: frozenset[str]
    ) -> Iterator[tuple[str, str, str, int, int | None]]:
        """Yield the values of `_CHUNK_COLUMNS` of each chunk that the partition will have."""
        corpus, tables = self.pipeline.corpus, self.tables.partition(partition.key)
        if "raw_documents" in stale:
            changes = self.find(partition) if self._can_read_chunks(partition.key) else None
            batches = corpus.chunks_of(partition) if changes is None else self._changed_chunks(changes)
        elif "chunks" in stale:
            batches = corpus.chunks(tables.rows(RAW, corpus.text_columns), partition.key)
        else:
            batches = StoredChunks(tables, self.pipeline.model.space.model_input).with_inputs(_STORED)
        for batch in batches:
            columns = (batch.column(name).to_pylist() for name in _CHUNK_COLUMNS)
            yield from zip(*columns, strict=True)

    def _can_read_chunks(self, key: str) -> bool:
        """Whether the partition's stored chunks can be read; a sync makes all of them anew if not."""
        try:
            for _ in self.tables.partition(key).rows(CHUNK_TABLE, [*_STORED, "text", "document_id"]):
                pass
        except LakeError:
            return False
        return True

    def _changed_chunks(self, changes: Changes) -> Iterator[pa.RecordBatch]:
        """The chunks of a partition of which only the changed files are read."""
        corpus, key = self.pipeline.corpus, changes.files.key
        gone = set(changes.stale)

        def changed() -> Iterator[pa.RecordBatch]:
            for batch in corpus.parsed(changes.files):
                gone.difference_update(changes.as_before(batch))
                yield batch.filter(pc.invert(is_known(batch, changes.known)))

        yield from corpus.chunks(changed(), key)
        names = pa.array(gone, pa.string())
        stored = StoredChunks(self.tables.partition(key), self.pipeline.model.space.model_input)
        for batch in stored.with_inputs([*_STORED, "document_id"]):
            yield batch.filter(pc.invert(pc.is_in(batch.column("document_id"), value_set=names)))
