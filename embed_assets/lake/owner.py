"""Which corpus a lake belongs to, as recorded in its tables' properties."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from deltalake import DeltaTable

from embed_assets.locations import canonical_location, local_path
from embed_assets.settings import Settings

_PREFIX_PROPERTY = "embed_assets.name_prefix"
_SOURCE_PROPERTY = "embed_assets.source"


@dataclass(frozen=True, slots=True)
class Owner:
    """The corpus that a lake belongs to. Syncing another one into the same lake would overwrite its partitions."""

    prefix: str = ""
    """EMBED_NAME_PREFIX of the corpus."""
    source: str = ""
    """Source of the corpus: a URL or a path. The path is relative to the lake if that is local too, so
    that both can be moved together. Empty in lakes created before version 0.2, and where the source does not matter."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The corpus that the settings describe."""
        source, lake = canonical_location(settings.source), canonical_location(settings.lake)
        is_local = local_path(settings.source) is not None and local_path(settings.lake) is not None
        return cls(settings.name_prefix, os.path.relpath(source, lake) if is_local else source)

    @classmethod
    def of(cls, table: DeltaTable) -> Self:
        """The corpus recorded in a table's properties."""
        stored = table.metadata().configuration
        return cls(stored.get(_PREFIX_PROPERTY, ""), stored.get(_SOURCE_PROPERTY, ""))

    @property
    def properties(self) -> dict[str, str]:
        """The table properties that record this owner."""
        return {_PREFIX_PROPERTY: self.prefix, _SOURCE_PROPERTY: self.source}

    def conflicts_with(self, other: Owner) -> bool:
        """Whether the two are different corpora. An unknown (empty) source matches any source."""
        return self.prefix != other.prefix or bool(self.source and other.source and self.source != other.source)

    def __str__(self) -> str:
        prefix = f"EMBED_NAME_PREFIX={self.prefix!r}"
        return f"EMBED_SOURCE={self.source!r} and {prefix}" if self.source else prefix
