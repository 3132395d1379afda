"""Data quality checks that read a materialized partition back from the tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from embed_assets.engine.inputs import ModelInput
from embed_assets.errors import LakeError
from embed_assets.lake.coverage import measure_coverage
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, TableSpec
from embed_assets.lake.verify import verify_vectors
from embed_assets.records import NOT_EMBEDDABLE
from embed_assets.settings import Settings


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a check for one partition."""

    passed: bool
    detail: str
    """What was found, in one line."""
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    """Counts and percentages behind the result, by name."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a check is applied to."""

    partition: PartitionSnapshot
    table: TableSpec
    """Embeddings table of the space."""
    model_input: ModelInput
    settings: Settings

    def column(self, table: TableSpec, name: str) -> Iterator[Any]:
        """The values of a column in the partition's rows, in no particular order."""
        for batch in self.partition.rows(table, [name]):
            yield from batch.column(name).to_pylist()


@dataclass(frozen=True, slots=True)
class Check:
    """One check of an asset's partitions."""

    asset: str
    name: str
    description: str
    ask: Callable[[Subject], Outcome]
    """Evaluates the check. May raise ``LakeError``."""
    is_blocking: bool = False
    """Whether failing the check stops the partition, so that downstream assets are not materialized."""


def check(question: Check, subject: Subject) -> Outcome:
    """Evaluate a check. If a table can't be read, the check fails."""
    try:
        return question.ask(subject)
    except LakeError as error:
        return Outcome(False, str(error))


def _rejected_share(subject: Subject) -> Outcome:
    rejected = sum(reason != NOT_EMBEDDABLE for reason in subject.column(REJECTED, "reason"))
    documents = subject.partition.count(RAW)
    limit = subject.settings.max_rejected_percent
    return _share("documents rejected", rejected, documents + rejected, limit, "MAX_REJECTED_PERCENT")


def _coverage(subject: Subject) -> Outcome:
    found = measure_coverage(subject.partition)
    if not found.uncovered_documents and not found.gone_documents:
        return Outcome(True, f"the chunks cover the whole text of {found.documents} documents", asdict(found))
    detail = (
        f"{found.uncovered_characters} characters of {found.uncovered_documents} documents are in no chunk, "
        f"{found.gone_documents} documents with chunks are gone; "
        "run 'embed-assets sync', or first 'embed-assets verify --repair' if the chunks are reported as fresh"
    )
    return Outcome(False, detail, asdict(found))


def _duplicate_share(subject: Subject) -> Outcome:
    packed = bytearray()
    for text_hash in subject.column(CHUNK_TABLE, "text_hash"):
        packed += bytes.fromhex(text_hash)
    hashes = np.frombuffer(packed, dtype="S16")
    repeated = len(hashes) - len(np.unique(hashes))
    limit = subject.settings.max_duplicate_percent
    return _share("chunks repeat another one", repeated, len(hashes), limit, "MAX_DUPLICATE_PERCENT")


def _vectors(subject: Subject) -> Outcome:
    gaps = verify_vectors(subject.partition, subject.table, subject.model_input)
    counts = {kind: count for kind, count in asdict(gaps).items() if count}
    found = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items())
    good = "every chunk has one finite unit-norm vector, for its current text"
    detail = f"{found}; run 'embed-assets verify --repair'" if found else good
    return Outcome(not counts, detail, counts)


def _truncated_share(subject: Subject) -> Outcome:
    chunks = truncated = 0
    for flag in subject.column(subject.table, "is_truncated"):
        chunks += 1
        truncated += bool(flag)
    limit = subject.settings.max_truncated_percent
    return _share("chunks were cut to fit the model", truncated, chunks, limit, "MAX_TRUNCATED_PERCENT")


def _unknown_token_share(subject: Subject) -> Outcome:
    tokens = unknown = 0
    for batch in subject.partition.rows(CHUNK_TABLE, ["token_count", "unknown_tokens"]):
        tokens += pc.sum(batch.column("token_count")).as_py() or 0
        unknown += pc.sum(batch.column("unknown_tokens")).as_py() or 0
    limit = subject.settings.max_unknown_percent
    return _share("tokens are unknown to the model's tokenizer", unknown, tokens, limit, "MAX_UNKNOWN_PERCENT")


def _share(what: str, part: int, whole: int, limit: float, setting: str) -> Outcome:
    percent = round(100 * part / whole, 2) if whole else 0.0
    detail = f"{part:,} of {whole:,} {what}: {percent:g} %, limit {limit:g} % (EMBED_{setting})"
    return Outcome(percent <= limit, detail, {"percent": percent, "count": part, "of": whole})


CHECKS: tuple[Check, ...] = (
    Check(
        "raw_documents",
        "rejected_share",
        "The share of files and rows that could not be read is within the limit; reasons are in `rejected_documents`.",
        _rejected_share,
    ),
    Check(
        "chunks", "coverage", "The chunks cover the whole text of every document, except whitespace.", _coverage, True
    ),
    Check(
        "chunks",
        "duplicate_share",
        "The share of chunks that repeat another one is within the limit.",
        _duplicate_share,
    ),
    Check(
        "chunks",
        "unknown_token_share",
        "The share of tokens that the model's tokenizer has no word for is within the limit. Texts of unknown tokens "
        "all get nearly the same vector.",
        _unknown_token_share,
    ),
    Check(
        "embeddings",
        "vectors",
        "One finite, unit-norm vector of the table's dimension per chunk, for its current text.",
        _vectors,
        True,
    ),
    Check(
        "embeddings",
        "truncated_share",
        "The share of chunks truncated by the model is within the limit.",
        _truncated_share,
    ),
)


def evaluate(asset: str, names: Collection[str], subject: Subject) -> dict[str, Outcome]:
    """Outcomes of an asset's checks of these names, by name."""
    return {spec.name: check(spec, subject) for spec in CHECKS if spec.asset == asset and spec.name in names}
