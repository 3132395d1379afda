"""Rows of rejected_documents: what could not be read, and what could not be embedded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from embed_assets.errors import LakeError, SupersededError
from embed_assets.lake.inputs import Inputs
from embed_assets.lake.reader import read_partition
from embed_assets.lake.tables import REJECTED, Lake
from embed_assets.lake.writer import Provenance, replace_partition
from embed_assets.records import (
    NOT_EMBEDDABLE,
    REJECTED_DOCUMENTS,
    Rejection,
    batched_bytes,
    is_chunk_of,
    utc_now,
)

_ATTEMPTS = 20


def replace_rejections(
    lake: Lake, key: str, rejections: Sequence[Rejection], provenance: Provenance, space: str | None = None
) -> None:
    """Make `rejections` the partition's rejected documents, or (with `space`) the chunks that this space's model
    can't embed. All other rows stay, those too that another run writes at the same time."""
    for attempt in range(_ATTEMPTS):
        rows = Inputs(lake, key, [REJECTED])
        present = _present(lake, key)
        others = [row for row in present if not _is_replaced(row, space)]
        if space is not None and not rejections and len(others) == len(present):
            return
        try:
            replace_partition(lake, REJECTED, key, _batches(key, rejections, others), provenance, check=rows.check)
            return
        except SupersededError:
            if attempt == _ATTEMPTS - 1:
                raise


def _present(lake: Lake, key: str) -> list[dict[str, Any]]:
    try:
        batches = read_partition(lake, REJECTED, key, REJECTED_DOCUMENTS.names)
        return [row for batch in batches for row in batch.to_pylist()]
    except LakeError:
        return []  # damaged: what is written now mends it


def _is_replaced(row: dict[str, Any], space: str | None) -> bool:
    if space is None:
        return bool(row["reason"] != NOT_EMBEDDABLE)
    return row["reason"] == NOT_EMBEDDABLE and is_chunk_of(space, row["detail"])


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
