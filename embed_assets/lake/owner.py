"""Whose a lake is: a table's properties say which corpus it was made for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from deltalake import DeltaTable

from embed_assets.settings import Settings, local_path, same_place

_PREFIX_PROPERTY = "embed_assets.name_prefix"
_SOURCE_PROPERTY = "embed_assets.source"


@dataclass(frozen=True, slots=True)
class Owner:
    """The corpus whose tables a lake has. Another one would replace its partitions."""

    prefix: str = ""
    """Its EMBED_NAME_PREFIX."""
    source: str = ""
    """Its source: a URL, or a path (from the lake, where that is local too, so that both can be moved together). None
    in lakes of before 0.2, and where it does not matter."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The corpus of the settings."""
        source, lake = same_place(settings.source), same_place(settings.lake)
        is_local = local_path(settings.source) is not None and local_path(settings.lake) is not None
        return cls(settings.name_prefix, os.path.relpath(source, lake) if is_local else source)

    @classmethod
    def of(cls, table: DeltaTable) -> Self:
        """The corpus that a table was made for, or adopted by."""
        stored = table.metadata().configuration
        return cls(stored.get(_PREFIX_PROPERTY, ""), stored.get(_SOURCE_PROPERTY, ""))

    @property
    def properties(self) -> dict[str, str]:
        """As a table keeps it."""
        return {_PREFIX_PROPERTY: self.prefix, _SOURCE_PROPERTY: self.source}

    def is_at_odds_with(self, other: Owner) -> bool:
        """They are different corpora, as far as their sources are known."""
        return self.prefix != other.prefix or bool(self.source and other.source and self.source != other.source)

    def __str__(self) -> str:
        prefix = f"EMBED_NAME_PREFIX={self.prefix!r}"
        return f"EMBED_SOURCE={self.source!r} and {prefix}" if self.source else prefix
