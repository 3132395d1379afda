"""Write rejected_documents: documents that could not be read, and chunks that could not be embedded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import pyarrow as pa

from embed_assets.errors import LakeError, SupersededError
from embed_assets.lake.snapshot import PartitionSnapshot
from embed_assets.lake.tables import REJECTED
from embed_assets.lake.writer import Provenance
from embed_assets.records import (
    NOT_EMBEDDABLE,
    REJECTED_DOCUMENTS,
    Rejection,
    is_chunk_of,
    rejection_batch,
    utc_now,
)
from embed_assets.scratch import SpooledBatches

_ATTEMPTS = 20
"""Attempts to merge with rows that other runs write at the same time. Each costs a read and a commit."""
_ROWS_PER_BATCH = 4096
"""Rejections held in memory before they are spooled. More take more memory, fewer make more and smaller batches."""


class Rejections:
    """Collects a partition's rejections in a temporary file, since there may be one per row of a large file."""

    def __init__(self, key: str) -> None:
        self._key, self._now = key, utc_now()
        self._rows = SpooledBatches(REJECTED_DOCUMENTS)
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


def replace_rejections(
    partition: PartitionSnapshot,
    rejections: Rejections,
    provenance: Provenance,
    check: Callable[[], None],
    space: str | None = None,
) -> None:
    """Replace the partition's rejected documents or, with `space`, the chunks that this space's model can't embed.

    All other rows stay, including those that another run writes at the same time. `check` is called before every
    attempt and raises if another run meanwhile wrote rows from newer inputs. Raises ``SupersededError`` if the table
    keeps changing.
    """
    provenance = replace(provenance, rewrite=False)  # what can't be read is replaced in any case
    for attempt in range(_ATTEMPTS):
        check()
        partition.reset_baseline(REJECTED)
        if not rejections.count and partition.tables.table(REJECTED) is None:
            return
        if space is not None and not rejections.count and not _has_own(partition, space):
            return
        batches = chain(rejections.batches(), _others(partition, space))
        try:
            partition.replace(REJECTED, batches, provenance, lambda: partition.require_current(REJECTED))
            return
        except SupersededError:
            if attempt == _ATTEMPTS - 1:
                raise


def _others(partition: PartitionSnapshot, space: str | None) -> Iterator[pa.RecordBatch]:
    """The rows to keep. Damaged files yield none: replacing the partition's rows repairs it."""
    try:
        for batch in partition.rows(REJECTED, REJECTED_DOCUMENTS.names):
            kept = batch.filter(pa.array([not is_own for is_own in _is_own(batch, space)]))
            if kept.num_rows:
                yield kept
    except LakeError as error:
        if error.is_retryable:  # a transient storage error is not damage
            raise


def _has_own(partition: PartitionSnapshot, space: str) -> bool:
    try:
        return any(any(_is_own(batch, space)) for batch in partition.rows(REJECTED, ["reason", "detail"]))
    except LakeError:
        return True


def _is_own(batch: pa.RecordBatch, space: str | None) -> list[bool]:
    """For each row, whether it is to be replaced: rejected documents or, with `space`, that space's chunks."""
    rows = zip(batch.column("reason").to_pylist(), batch.column("detail").to_pylist(), strict=True)
    if space is None:
        return [reason != NOT_EMBEDDABLE for reason, _ in rows]
    return [reason == NOT_EMBEDDABLE and is_chunk_of(space, detail) for reason, detail in rows]
