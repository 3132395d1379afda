"""Quantized models in the lake, beside the spaces they make: one Delta table each, written once, by one commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa
from deltalake import write_deltalake

from embed_assets.errors import LakeError
from embed_assets.lake.tables import Lake, lake_errors

_PART_BYTES = 16 << 20
_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), False),
        pa.field("part", pa.int32(), False),
        pa.field("data", pa.binary(), False),
    ]
)


def read_model(lake: Lake, name: str) -> dict[str, bytes] | None:
    """The files of the model `name` by their names, or None when it was not made yet."""
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
    """Keep the files of the model `name`; returns the files that are kept, which are others' if they were first."""
    uri = f"{lake.root}/{_path(name)}"
    try:
        with lake_errors(f"the model {_path(name)!r} can't be written", lake.root):
            reader = pa.RecordBatchReader.from_batches(_SCHEMA, _parts(files))
            # Version 0 of a table can be made only once, however many try.
            write_deltalake(uri, reader, mode="error", name=_path(name), storage_options=lake.options or None)
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
