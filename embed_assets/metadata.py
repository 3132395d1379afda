"""Metadata fields of documents that become columns: their names and types, and values that fit them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

PREFIX = "meta_"
"""Of the columns' names."""
_TIMESTAMP = pa.timestamp("us", "UTC")
_KINDS: dict[str, tuple[Any, pa.DataType]] = {
    "string": (str, pa.string()),
    "int": (int, pa.int64()),
    "float": (float, pa.float64()),
    "bool": (bool, pa.bool_()),
    "timestamp": (datetime, _TIMESTAMP),
    "list<string>": (list[str], pa.list_(pa.field("element", pa.string()))),
    "list<int>": (list[int], pa.list_(pa.field("element", pa.int64()))),
}
_NAME = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
_INT64 = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True, slots=True)
class MetadataField:
    """A field, as in ``year:int``."""

    name: str
    kind: str
    """Key of `_KINDS`."""

    def __str__(self) -> str:
        return f"{self.name}:{self.kind}"

    @property
    def column(self) -> pa.Field:
        """The column that it becomes."""
        return pa.field(f"{PREFIX}{self.name}", _KINDS[self.kind][1])

    def value(self, raw: Any) -> Any:
        """A value of JSON as one of the field's type; None for null, or blank in place of something else than a text.

        Raises ``ValueError`` if it does not fit.
        """
        if raw is None or (self.kind != "string" and isinstance(raw, str) and not raw.strip()):
            return None
        if self.kind.startswith("list") and isinstance(raw, str):
            raw = _list_of(raw)
        try:
            found = _adapter(self.kind).validate_python(raw)
        except ValidationError as error:
            raise ValueError(f"metadata field {self.name!r} must be {self.kind}, got {raw!r}") from error
        if any(number not in _INT64 for number in _integers(found)):
            raise ValueError(f"metadata field {self.name!r} must be an int of 64 bits, got {raw!r}")
        if isinstance(found, datetime):
            return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
        return found


@cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(_KINDS[kind][0])


def _integers(value: Any) -> Sequence[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int)]


def _list_of(text: str) -> Any:
    """A list of JSON, as tables of text hold it; any other text is its only element."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return [text]


def parse_fields(text: str) -> tuple[MetadataField, ...]:
    """The fields that a setting names, as in ``author:string, tags:list<string>``. Raises ``ValueError``."""
    found: list[MetadataField] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, kind = (piece.strip() for piece in part.partition(":"))
        if not _NAME.fullmatch(name) or kind not in _KINDS:
            raise ValueError(f"must be NAME:TYPE with a type of {', '.join(_KINDS)}, but one is {part!r}")
        if name.lower() in {field.name.lower() for field in found}:
            raise ValueError(f"must name each field once, but {name!r} is there twice")
        found.append(MetadataField(name, kind))
    return tuple(found)


def values_of(
    fields: Sequence[MetadataField], metadata: str, above: Mapping[str, Any], beside: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Of each field the value that a document has; None where it has none.

    What is said `beside` the document counts more than its own `metadata`, a JSON object, and that more than what is
    said `above`, of all of its folder. Raises ``ValueError`` for a value of another type.
    """
    if not fields:
        return ()
    known = {**above, **json.loads(metadata), **beside}
    return tuple(field.value(known.get(field.name)) for field in fields)
