"""Is what the tables hold of a partition right? Questions that read it back, each with an answer in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from embed_assets.errors import LakeError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import CHUNK_TABLE, RAW, REJECTED, TableSpec
from embed_assets.lake.verify import measure_coverage, verify_vectors
from embed_assets.records import NOT_EMBEDDABLE
from embed_assets.settings import Settings


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer for one partition."""

    passed: bool
    detail: str
    """What was found, in one line."""
    numbers: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked about."""

    partition: PartitionSnapshot
    table: TableSpec
    """The space's."""
    prompt: str
    settings: Settings

    def column(self, table: TableSpec, name: str) -> Iterator[Any]:
        """The values of a column in the partition."""
        for batch in self.partition.rows(table, [name]):
            yield from batch.column(name).to_pylist()


@dataclass(frozen=True, slots=True)
class Check:
    """One question about an asset's partition."""

    asset: str
    name: str
    description: str
    ask: Callable[[Subject], Outcome]
    is_blocking: bool = False
    """A no stops the partition: what follows from it is not made."""


def check(question: Check, subject: Subject) -> Outcome:
    """The answer; a table that can't be read is a no."""
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
        return Outcome(True, f"the chunks of {found.documents} documents have all their text", asdict(found))
    detail = (
        f"{found.uncovered_characters} characters of {found.uncovered_documents} documents are in no chunk, "
        f"{found.gone_documents} documents with chunks are gone; "
        "sync, after 'embed-assets verify --repair' if the chunks seem fresh"
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
    gaps = verify_vectors(subject.partition, subject.table, subject.prompt)
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


def _share(what: str, part: int, whole: int, limit: float, setting: str) -> Outcome:
    percent = round(100 * part / whole, 2) if whole else 0.0
    detail = f"{part:,} of {whole:,} {what}: {percent:g} %, limit {limit:g} % (EMBED_{setting})"
    return Outcome(percent <= limit, detail, {"percent": percent, "count": part, "of": whole})


CHECKS: tuple[Check, ...] = (
    Check(
        "raw_documents",
        "rejected_share",
        "Not too many of the files and rows could not be read; the reasons are in `rejected_documents`.",
        _rejected_share,
    ),
    Check("chunks", "coverage", "The chunks have every document's text, whitespace aside.", _coverage, True),
    Check("chunks", "duplicate_share", "Not too many chunks have the text of another one.", _duplicate_share),
    Check(
        "embeddings",
        "vectors",
        "One finite, unit-norm vector of the table's dimension per chunk, for its current text.",
        _vectors,
        True,
    ),
    Check("embeddings", "truncated_share", "Of few chunks the model saw only the beginning.", _truncated_share),
)
