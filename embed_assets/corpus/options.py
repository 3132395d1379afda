"""The settings that decide what comes out of a file."""

from __future__ import annotations

from dataclasses import dataclass

from embed_assets.records import hash_text
from embed_assets.settings import Settings

PARSER_VERSION = "1"
"""Raise it when the same bytes would give other documents: raw_documents of every partition is read again."""


@dataclass(frozen=True, slots=True)
class ParseOptions:
    """The settings that decide what comes out of a file."""

    text_column: str = "text"
    id_column: str = "id"
    title_column: str = "title"
    max_file_bytes: int = 64 << 20

    @classmethod
    def from_settings(cls, settings: Settings) -> ParseOptions:
        """The options that the settings name."""
        return cls(settings.text_column, settings.id_column, settings.title_column, settings.max_file_bytes)

    @property
    def version(self) -> str:
        """Code version of raw_documents: changes when the same bytes would give other documents."""
        return hash_text(
            f"{PARSER_VERSION}/{self.text_column}/{self.id_column}/{self.title_column}/{self.max_file_bytes}"
        )[:12]
