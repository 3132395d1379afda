"""Write rejected_documents: documents that could not be read, and chunks that could not be embedded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import pyarrow as pa

from embed_assets.errors import LakeError, SupersededError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import REJECTED
from embed_assets.lake.writer import Provenance
from embed_assets.records import (
    NOT_EMBEDDABLE,
    REJECTED_ROWS,
    Rejection,
    is_chunk_of,
    rejection_batch,
    utc_now,
)
from embed_assets.scratch import SpooledBatches

_ATTEMPTS = 20
"""Attempts to merge with rows that other runs write at the same time. Each costs a read and a commit."""
_JUDGED_BY = ("reason", "detail", "document_id", "uri")
_ROWS_PER_BATCH = 4096
"""Rejections held in memory before they are spooled. More take more memory, fewer make more and smaller batches."""


class Rejections:
    """Collects a partition's rejections in a temporary file, since there may be one per row of a large file."""

    def __init__(self, key: str) -> None:
        self._key, self._now = key, utc_now()
        self._rows = SpooledBatches(REJECTED_ROWS)
        self._waiting: list[Rejection] = []
        self.count = 0

    def __enter__(self) -> Rejections:
        return self

    def __exit__(self, *args: object) -> None:
        self._rows.__exit__(*args)

    def add(self, rejection: Rejection) -> None:
        """Add a rejection. Not allowed after `batches`."""
        self.count += 1
        self._waiting.append(rejection)
        if len(self._waiting) >= _ROWS_PER_BATCH:
            self._write()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rejections as rows of rejected_documents. Can be called repeatedly."""
        if self._waiting:
            self._write()
        yield from self._rows

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Add rows of rejected_documents. Not allowed after `batches`."""
        self.count += batch.num_rows
        self._rows.add(batch)

    def _write(self) -> None:
        self._rows.add(rejection_batch(self._waiting, self._key, self._now))
        self._waiting.clear()


class Own(Protocol):
    """Tells which rows of rejected_documents belong to a stage, which replaces them or leaves them as they are."""

    def is_own(self, reason: str, detail: str) -> bool:
        """Whether a row is one of the stage's."""
        ...

    def is_kept(self, document_id: str, uri: str) -> bool:
        """Whether one of the stage's rows stays as it is."""
        ...


@dataclass(frozen=True, slots=True)
class UnreadFiles:
    """Files and rows that can't be read."""

    kept: Collection[str] = ()
    """Locations of files that were not read again, because they did not change."""

    def is_own(self, reason: str, detail: str) -> bool:
        """All but chunks."""
        return reason != NOT_EMBEDDABLE

    def is_kept(self, document_id: str, uri: str) -> bool:
        """By its file."""
        return uri in self.kept


@dataclass(frozen=True, slots=True)
class UnembeddedChunks:
    """Chunks that a space's model can't embed."""

    space: str
    changed: Collection[str] | None = None
    """Ids of the documents whose chunks are replaced; None: all."""

    def is_own(self, reason: str, detail: str) -> bool:
        """Chunks of the space."""
        return reason == NOT_EMBEDDABLE and is_chunk_of(self.space, detail)

    def is_kept(self, document_id: str, uri: str) -> bool:
        """By its document."""
        return self.changed is not None and document_id not in self.changed


def replace_rejections(
    partition: PartitionSnapshot,
    rejections: Rejections,
    own: Own,
    provenance: Provenance,
    check: Callable[[], None],
) -> int:
    """Replace a stage's `own` rows of the partition's rejected documents; returns how many of them stay as they are.

    All other rows stay, including those that another run writes at the same time. `check` is called before every
    attempt and raises if another run meanwhile wrote rows from newer inputs. Raises ``SupersededError`` if the table
    keeps changing.
    """
    is_damaged = provenance.rewrite
    provenance = replace(provenance, rewrite=False, previous="")  # what can't be read is replaced in any case
    for attempt in range(_ATTEMPTS):
        check()
        partition.reset_baseline(REJECTED)
        if not rejections.count and partition.tables.table(REJECTED) is None:
            return 0
        replaced, kept = _count_own(partition, own)
        if not rejections.count and not replaced and not is_damaged:
            return kept
        batches = chain(rejections.batches(), _others(partition, own))
        try:
            partition.replace(REJECTED, batches, provenance, lambda: partition.require_current(REJECTED))
            return kept
        except SupersededError:
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def _others(partition: PartitionSnapshot, own: Own) -> Iterator[pa.RecordBatch]:
    """The rows to keep. Damaged files yield none: replacing the partition's rows repairs it."""
    try:
        for batch in partition.rows(REJECTED, REJECTED_ROWS.names):
            kept = batch.filter(pa.array([not is_own or is_kept for is_own, is_kept in _judged(batch, own)]))
            if kept.num_rows:
                yield kept
    except LakeError as error:
        if error.is_retryable:  # a transient storage error is not damage
            raise


def _count_own(partition: PartitionSnapshot, own: Own) -> tuple[int, int]:
    """How many of the stage's rows are to be replaced, and how many stay. Damaged files count as one to replace."""
    replaced = kept = 0
    try:
        for batch in partition.rows(REJECTED, _JUDGED_BY):
            for is_own, is_kept in _judged(batch, own):
                replaced += is_own and not is_kept
                kept += is_own and is_kept
    except LakeError:
        return 1, kept
    return replaced, kept


def _judged(batch: pa.RecordBatch, own: Own) -> list[tuple[bool, bool]]:
    """For each row, whether it is the stage's own, and whether it stays if it is."""
    rows = zip(*(batch.column(name).to_pylist() for name in _JUDGED_BY), strict=True)
    return [(own.is_own(reason, detail), own.is_kept(document, uri)) for reason, detail, document, uri in rows]
