"""The stages of one partition, bound to the settings: what Dagster's step, the command line and tests call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from embed_assets.corpus.chunking import ChunkOptions
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.parsing import read_documents
from embed_assets.corpus.source import Source, SourcePartition
from embed_assets.engine.engine import Engine, EngineFacts, EngineOptions, configured
from embed_assets.engine.model import EmbeddingSpace, resolve_space
from embed_assets.engine.openvino_backend import load_int8_backend
from embed_assets.engine.quantization import CALIBRATION_TEXTS, QuantizedModel, quantize
from embed_assets.engine.ray_cluster import RayOptions, require_ray
from embed_assets.engine.ray_process import RayProcess
from embed_assets.errors import LakeError, ModelError, SettingsError
from embed_assets.lake.models import keep_model, read_model
from embed_assets.lake.reader import PartitionState, read_partition, table_version
from embed_assets.lake.tables import CHUNK_TABLE, Lake, TableSpec
from embed_assets.lake.writer import Provenance, Replaced
from embed_assets.records import Document, hash_text
from embed_assets.settings import Settings
from embed_assets.stages.chunks import SourceText, chunk_batches, materialize_chunks, stored_texts
from embed_assets.stages.embeddings import Embeddings, Progress, known_inputs, materialize_embeddings
from embed_assets.stages.raw_documents import RawDocuments, materialize_raw_documents
from embed_assets.stages.remote import RayCompute, WorkerRecipe, code_version, lake_id
from embed_assets.stages.sampling import sample_chunks
from embed_assets.stages.windows import Compute, LocalCompute


@dataclass(frozen=True, slots=True)
class Estimate:
    """What materializing a partition would come to."""

    to_embed: int
    to_reuse: int
    to_drop: int
    tokens: int
    """Tokens of the texts to embed, special tokens included."""


@dataclass(frozen=True)
class Pipeline:
    """Source, settings, space and lake, and the three stages over them. The model is loaded when first needed."""

    settings: Settings
    source: Source
    lake: Lake
    parse_options: ParseOptions
    chunk_options: ChunkOptions
    model_space: EmbeddingSpace
    """The space of the model as it is, in floating point."""
    quantized: QuantizedModel | None = None
    """The model in int8, once it was made."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Pipeline:
        """Resolves the model's files; opens neither source nor, unless for the int8 model, lake.

        Raises ``SettingsError`` or ``ModelError``.
        """
        space = resolve_space(
            settings.model,
            settings.revision,
            settings.prompt,
            settings.query_prompt,
            settings.truncate_dim,
            settings.trust_remote_code,
            settings.allow_pickled_weights,
        )
        lake = Lake.from_settings(settings)
        if settings.precision == "int8" and settings.device not in ("auto", "cpu"):
            raise SettingsError(
                f"EMBED_PRECISION=int8 runs on CPUs, got EMBED_DEVICE={settings.device!r}; set EMBED_DEVICE=cpu"
            )
        if settings.compute == "ray":
            require_ray()
        return cls(
            settings,
            Source.from_settings(settings),
            lake,
            ParseOptions.from_settings(settings),
            _chunk_options(settings, space),
            space,
            _read_quantized(lake, space) if settings.precision == "int8" else None,
        )

    @cached_property
    def space(self) -> EmbeddingSpace:
        """What the vectors are comparable in. In int8 it is known only once the model was quantized."""
        if self.settings.precision != "int8":
            return self.model_space
        return self.model_space.quantized("" if self.quantized is None else self.quantized.artifact_hash)

    @property
    def is_calibrated(self) -> bool:
        """The space is known: always, but in int8 before the model was quantized."""
        return self.settings.precision != "int8" or self.quantized is not None

    def refreshed(self) -> Pipeline:
        """This pipeline, with the int8 model if somebody made it meanwhile."""
        if self.is_calibrated:
            return self
        found = _read_quantized(self.lake, self.model_space)
        return self if found is None else replace(self, quantized=found)

    def calibrated(self) -> Pipeline:
        """This pipeline, its model quantized if int8 is asked for and nobody did it before.

        Calibrates on a sample of the source's chunks and keeps the model in the lake, for all later runs everywhere.
        Without a chunk in the source there is nothing to calibrate on, nor to embed: then it stays as it is.
        """
        known = self.refreshed()
        sample = [] if known.is_calibrated else self.sample_chunks(CALIBRATION_TEXTS)
        if not sample:
            return known
        texts = [self.model_space.prompt + text for text in sample]
        made = quantize(self.model_space, texts, [hash_text(text) for text in texts])
        load_int8_backend(self.model_space.quantized(made.artifact_hash), made.xml, made.weights)  # checks it
        kept = QuantizedModel.from_files(keep_model(self.lake, self.model_space.name, made.files))
        return replace(self, quantized=kept)

    def sample_chunks(self, count: int, max_tokens: int | None = None) -> list[str]:
        """Texts of up to `count` chunks of the source, the same ones for the same corpus; shorter ones if asked for."""
        options = self.chunk_options if max_tokens is None else ChunkOptions(max_tokens)
        return sample_chunks(self.source, self.parse_options, self.space.tokenizer, options, count)

    @cached_property
    def engine(self) -> Engine:
        """The model, one per process. Raises ``ModelError`` while an int8 model was not made yet."""
        if not self.is_calibrated:
            raise ModelError(
                f"the int8 model of {self.model_space.model!r} was not made yet; run 'embed-assets sync' with documents"
            )
        return Engine(self.space, self._engine_options, self.quantized)

    @property
    def engine_facts(self) -> EngineFacts:
        """Where and how the model runs in this process; as configured, while it is not loaded."""
        return self.engine.facts if self.is_calibrated else configured(self._engine_options)

    def open_compute(self) -> Compute:
        """Where a run's texts are embedded, by EMBED_COMPUTE. To be closed at the run's end."""
        if self.settings.compute == "local":
            return self._in_this_process()
        settings = self.settings
        runs_on_cpu = settings.precision == "int8" or self.model_space.directory is None
        options = RayOptions(
            address=settings.ray_address,
            replicas=settings.replica_range,
            gpus_per_replica=settings.ray_gpus_per_replica,
            cpus_per_replica=settings.ray_cpus_per_replica,
            wait_seconds=settings.ray_wait_seconds,
            device="cpu" if runs_on_cpu else settings.device,
        )
        return RayCompute(RayProcess(self.worker_recipe, options), configured(self._engine_options))

    def _in_this_process(self) -> LocalCompute:
        return LocalCompute(lambda: self.engine, lambda: self.engine_facts)

    def worker_recipe(self) -> WorkerRecipe:
        """What a worker elsewhere needs to do this pipeline's work: its settings, with places that mean the same in
        any folder."""
        folder = Path(self.settings.model)
        model = str(folder.absolute()) if folder.is_dir() else self.settings.model
        # All fields: the environment of a worker's machine has no say.
        fields = self.settings.model_dump() | {"lake": self.lake.root, "model": model, "compute": "local"}
        return WorkerRecipe(fields, self.space.fingerprint, self.embeddings_table, lake_id(self.lake), code_version())

    @property
    def _engine_options(self) -> EngineOptions:
        settings = self.settings
        return EngineOptions(settings.device, settings.precision, settings.max_batch_tokens, settings.compile)

    @property
    def embeddings_table(self) -> TableSpec:
        """The table of the settings' space."""
        return TableSpec("embeddings", self.space.name, self.space.describe())

    @cached_property
    def code_versions(self) -> dict[str, str]:
        """Per asset, what decides its output beside its input."""
        return {
            "raw_documents": self.parse_options.version,
            "chunks": self.chunk_options.version(self.space.tokenizer_hash),
            "embeddings": self.space.name,
        }

    def materialize_raw_documents(
        self,
        partition: SourcePartition,
        provenance: Provenance,
        known: PartitionState | None = None,
        rewrite: bool = False,
    ) -> RawDocuments:
        """Read the partition's files into raw_documents and rejected_documents; `known` is what the table had of them
        when the source was listed."""
        options = self.parse_options
        return materialize_raw_documents(self.lake, self.source, partition, options, provenance, known, rewrite)

    def materialize_chunks(
        self, key: str, provenance: Provenance, known: Sequence[PartitionState] = (), rewrite: bool = False
    ) -> Replaced:
        """Split the partition's documents into chunks; `known` is how they lie in raw_documents, if that is known."""
        tokenizer, options = self.space.tokenizer, self.chunk_options
        return materialize_chunks(self.lake, key, tokenizer, options, provenance, known, rewrite)

    def materialize_embeddings(
        self,
        key: str,
        provenance: Provenance,
        compute: Compute | None = None,
        on_window: Callable[[int, int], None] = lambda texts, tokens: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        rewrite: bool = False,
        known: Sequence[PartitionState] = (),
    ) -> Embeddings:
        """Give the partition's chunks their vectors, by `compute` or else in this process.

        `on_window` hears of each window's texts and the tokens so far, `on_progress` every few seconds how far it is.

        `rewrite` commits the rows even if the table seems to hold them already; `known` is how documents and chunks
        lie in their tables, as far as that is known.
        """
        return materialize_embeddings(
            self.lake,
            self.embeddings_table,
            key,
            self.space.prompt,
            compute or self._in_this_process(),
            provenance,
            self._reuse_versions(),
            on_window,
            on_progress,
            rewrite,
            known,
        )

    @cached_property
    def version_at_start(self) -> int | None:
        """The embeddings table's version when it was first asked for: what rows had that were dropped since."""
        return table_version(self.lake, self.embeddings_table)

    def _reuse_versions(self) -> list[int]:
        """Versions of the whole table in which to look for vectors, with REUSE=table: now, and before this process."""
        if self.settings.reuse != "table":
            return []
        versions = {table_version(self.lake, self.embeddings_table), self.version_at_start}
        return sorted((v for v in versions if v is not None), reverse=True)

    def require_embeddings(self) -> None:
        """Raise ``LakeError`` when nothing was embedded in the space yet."""
        if self.lake.open(self.embeddings_table) is None:
            raise LakeError(
                f"there are no embeddings in {self.embeddings_table.path!r} under the lake {self.lake.root!r}; "
                "run 'embed-assets sync' first"
            )
        self.lake.check_tables(self.embeddings_table)

    def estimate(
        self, partition: SourcePartition, stale: frozenset[str], elsewhere: set[str], is_damaged: bool
    ) -> Estimate:
        """Count what materializing would embed, reuse and drop, by reading and splitting; nothing is written.

        `stale` names the assets that would run: what is fresh is read from its table instead. `elsewhere` has the
        inputs that other partitions would embed before, and gets this one's. `is_damaged` tests every vector.
        """
        reuse_table = self.settings.reuse == "table"
        known, ids = known_inputs(self.lake, self.embeddings_table, partition.key, reuse_table, is_damaged)
        if not stale:
            return Estimate(0, len(ids), 0, 0)  # what it lacks the model could not embed
        to_embed: dict[str, int] = {}
        kept = chunks = 0
        for chunk_id, text, token_count in self._future_chunks(partition, stale):
            chunks += 1
            kept += chunk_id in ids
            input_hash = hash_text(self.space.prompt + text)
            if input_hash not in known and not (reuse_table and input_hash in elsewhere):
                to_embed[input_hash] = token_count + max(0, self.space.prompt_tokens - 1)
        if reuse_table:
            elsewhere.update(to_embed)
        return Estimate(len(to_embed), chunks - len(to_embed), len(ids) - kept, sum(to_embed.values()))

    def _future_chunks(self, partition: SourcePartition, stale: frozenset[str]) -> Iterator[tuple[str, str, int]]:
        """(chunk_id, text, token_count) of the chunks that the partition will have."""
        key = partition.key
        if "raw_documents" in stale:
            documents = (
                SourceText(d.document_id, d.text, d.media_type)
                for d in read_documents(self.source, partition, self.parse_options)
                if isinstance(d, Document)
            )
            batches = chunk_batches(documents, key, self.space.tokenizer, self.chunk_options)
        elif "chunks" in stale:
            batches = chunk_batches(stored_texts(self.lake, key), key, self.space.tokenizer, self.chunk_options)
        else:
            batches = read_partition(self.lake, CHUNK_TABLE, key, ["chunk_id", "text", "token_count"])
        for batch in batches:
            columns = (batch.column(name).to_pylist() for name in ("chunk_id", "text", "token_count"))
            yield from zip(*columns, strict=True)


def _read_quantized(lake: Lake, space: EmbeddingSpace) -> QuantizedModel | None:
    if space.directory is None:
        raise SettingsError(
            f"EMBED_PRECISION=int8 needs a real model, got EMBED_MODEL={space.model!r}; set EMBED_PRECISION=auto"
        )
    files = read_model(lake, space.name)
    return None if files is None else QuantizedModel.from_files(files)


def _chunk_options(settings: Settings, space: EmbeddingSpace) -> ChunkOptions:
    """The chunk limit: what was asked for, else what fits the model beside its prompt."""
    fits = space.max_seq_length - space.prompt_tokens
    max_tokens = settings.chunk_tokens or fits
    room = max_tokens - space.tokenizer.special_tokens
    if room < 8:
        raise SettingsError(
            f"a chunk needs room for at least 8 tokens of text, but of the {max_tokens} tokens of a chunk "
            f"(the model takes {space.max_seq_length}, the prompt {space.prompt_tokens}) special tokens leave {room}; "
            "shorten EMBED_PROMPT or raise EMBED_CHUNK_TOKENS"
        )
    if settings.chunk_overlap_tokens >= room:
        raise SettingsError(
            f"CHUNK_OVERLAP_TOKENS must be smaller than the {room} tokens of text in a chunk of "
            f"CHUNK_TOKENS={max_tokens}, got {settings.chunk_overlap_tokens}; lower EMBED_CHUNK_OVERLAP_TOKENS"
        )
    return ChunkOptions(max_tokens, settings.chunk_overlap_tokens)
