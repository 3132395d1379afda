"""Rows of rejected_documents: what could not be read, and what could not be embedded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from embed_assets.lake.reader import read_partition
from embed_assets.lake.tables import REJECTED, Lake
from embed_assets.lake.writer import Provenance, replace_partition
from embed_assets.records import REJECTED_DOCUMENTS, Rejection, batched_bytes, utc_now

NOT_EMBEDDABLE = "not_embeddable"
"""Reason code of a chunk that the model has no vector for; the detail names the chunk."""


def replace_rejections(
    lake: Lake, key: str, rejections: Sequence[Rejection], provenance: Provenance, of_chunks: bool
) -> None:
    """Make `rejections` the partition's rejected documents or (`of_chunks`) chunks; the other kind's rows stay."""
    present = [
        row for batch in read_partition(lake, REJECTED, key, REJECTED_DOCUMENTS.names) for row in batch.to_pylist()
    ]
    others = [row for row in present if (row["reason"] == NOT_EMBEDDABLE) != of_chunks]
    if of_chunks and not rejections and len(others) == len(present):
        return
    replace_partition(lake, REJECTED, key, _batches(key, rejections, others), provenance)


def _batches(key: str, rejections: Sequence[Rejection], others: Sequence[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    now = utc_now()
    rows = [
        {
            "partition_key": key,
            "document_id": rejection.document_id,
            "uri": rejection.uri,
            "reason": rejection.reason,
            "detail": rejection.detail,
            "rejected_at": now,
        }
        for rejection in rejections
    ]
    return batched_bytes(((len(row["detail"]), row) for row in (*rows, *others)), REJECTED_DOCUMENTS)
