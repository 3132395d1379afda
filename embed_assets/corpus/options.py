"""Defines the settings that determine which documents a file becomes, and their code version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embed_assets.records import hash_text

if TYPE_CHECKING:
    from embed_assets.settings import Settings

PARSER_VERSION = "2"
"""Bump it when the same bytes would give different documents: every partition of raw_documents is then read again."""


@dataclass(frozen=True, slots=True)
class ParseOptions:
    """The settings that determine which documents a file becomes."""

    text_column: str = "text"
    id_column: str = "id"
    title_column: str = "title"
    max_file_bytes: int = 64 << 20
    """Largest file that is parsed as a whole, and largest row of a JSONL, CSV or Parquet file, in bytes."""

    @classmethod
    def from_settings(cls, settings: Settings) -> ParseOptions:
        """The options that the settings specify."""
        return cls(settings.text_column, settings.id_column, settings.title_column, settings.max_file_bytes)

    @property
    def version(self) -> str:
        """Code version of raw_documents: changes when the same bytes would give different documents."""
        return hash_text(
            f"{PARSER_VERSION}/{self.text_column}/{self.id_column}/{self.title_column}/{self.max_file_bytes}"
        )[:12]
