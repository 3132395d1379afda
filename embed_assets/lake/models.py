"""Store quantized models in the lake: one Delta table per model, written once, in a single commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa
from deltalake import CommitProperties, write_deltalake

from embed_assets.errors import LakeError
from embed_assets.lake.tables import Lake, lake_errors

_PART_BYTES = 16 << 20
"""Bytes of a file per row. It bounds what a reader or writer holds per row; smaller parts mean more rows."""
_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), False),
        pa.field("part", pa.int32(), False),
        pa.field("data", pa.binary(), False),
    ]
)


def read_model(lake: Lake, name: str) -> dict[str, bytes] | None:
    """Contents of the model's files by file name, or None if the model is not in the lake. Raises ``LakeError``."""
    delta = lake.open_path(_path(name))
    if delta is None:
        return None
    parts: dict[str, dict[int, bytes]] = {}
    with lake_errors(f"the model {_path(name)!r} can't be read", lake.root):
        for batch in pa.RecordBatchReader.from_stream(delta.scan(_SCHEMA.names)):
            for file, part, data in zip(*(batch.column(column).to_pylist() for column in _SCHEMA.names), strict=True):
                parts.setdefault(file, {})[part] = bytes(data)
    return {file: b"".join(found[part] for part in sorted(found)) for file, found in parts.items()}


def keep_model(lake: Lake, name: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Store a model's files by file name. Returns the stored files: those of another process if it was first.

    Raises ``LakeError`` if they can't be written.
    """
    lake.require_writable()
    uri = f"{lake.root}/{_path(name)}"
    try:
        with lake_errors(f"the model {_path(name)!r} can't be written", lake.root):
            reader = pa.RecordBatchReader.from_batches(_SCHEMA, _parts(files))
            # Only one process can commit version 0 of a table; tried again, the commit would be a later version.
            once, options = CommitProperties(max_commit_retries=0), lake.options or None
            write_deltalake(
                uri, reader, mode="error", name=_path(name), storage_options=options, commit_properties=once
            )
    except LakeError:
        if (kept := read_model(lake, name)) is None:
            raise
        return kept
    return dict(files)


def _parts(files: Mapping[str, bytes]) -> Iterator[pa.RecordBatch]:
    for file, data in files.items():
        for part, start in enumerate(range(0, max(1, len(data)), _PART_BYTES)):
            values = ([file], [part], [data[start : start + _PART_BYTES]])
            arrays = [pa.array(value, field.type) for value, field in zip(values, _SCHEMA, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _path(name: str) -> str:
    return f"models/{name}-int8"
