"""The settings that make an embedding space: kept in its table, so that it stays usable when the settings change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deltalake import DeltaTable

from embed_assets.settings import Settings

_NAMES = (
    *("model", "revision", "prompt", "context", "query_prompt", "truncate_dim"),
    *("chunk_tokens", "chunk_overlap_tokens"),
)
"""Not what allows a model to run code, nor where texts are sent: that stays with whoever runs this."""
_PREFIX = "embed_assets."


def recipe_of(settings: Settings) -> str:
    """The settings that make a space, and its chunks, as a JSON object."""
    values = {name: getattr(settings, name) for name in _NAMES}
    return json.dumps({**values, "is_int8": settings.precision == "int8"}, sort_keys=True)


def settings_from(recipe: str, properties: Mapping[str, str], now: Settings) -> dict[str, Any]:
    """The settings, by name, with which a space is made: those `now`, but for what its recipe says.

    `properties` are those of its table, which tell most of it where an older version recorded no recipe.
    """
    known: dict[str, Any] = json.loads(recipe) if recipe else _from_properties(properties)
    known = {"context": ""} | known  # older versions had none
    is_int8 = known.pop("is_int8")
    here = {"precision": "int8", "device": "cpu"} if is_int8 else {}
    if not is_int8 and now.precision == "int8":
        here = {"precision": "auto"}
    return now.model_dump() | {name: value for name, value in known.items() if name in _NAMES} | here


def model_of(table: DeltaTable) -> str:
    """The setting that names the model of an embeddings table; empty if it records none."""
    return str(table.metadata().configuration.get(f"{_PREFIX}model", ""))


def _from_properties(properties: Mapping[str, str]) -> dict[str, Any]:
    found = {name: properties.get(f"{_PREFIX}{name}", "") for name in ("model", "prompt", "truncate_dim")}
    return {
        "model": found["model"],
        "revision": None,
        "prompt": found["prompt"],
        "query_prompt": None,
        "truncate_dim": None if found["truncate_dim"] in ("", "None") else int(found["truncate_dim"]),
        "is_int8": properties.get(f"{_PREFIX}number_format", "").startswith("int8"),
    }
