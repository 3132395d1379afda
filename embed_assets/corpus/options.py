"""Defines the settings that determine which documents a file becomes, and their code version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embed_assets.metadata import MetadataField, parse_fields
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
    text_format: str = "text"
    """What the text of rows is: 'text', 'markdown' or 'html'."""
    max_file_bytes: int = 64 << 20
    """Largest file that is parsed as a whole, and largest row of a JSONL, CSV or Parquet file, in bytes."""
    metadata: tuple[MetadataField, ...] = ()
    """The fields of metadata that become columns."""

    @classmethod
    def from_settings(cls, settings: Settings) -> ParseOptions:
        """The options that the settings specify."""
        return cls(
            settings.text_column,
            settings.id_column,
            settings.title_column,
            settings.text_format,
            settings.max_file_bytes,
            parse_fields(settings.metadata),
        )

    @property
    def version(self) -> str:
        """Code version of raw_documents: changes when the same bytes would give different documents."""
        columns = f"{self.text_column}/{self.id_column}/{self.title_column}/{self.text_format}"
        fields = "".join(f"/{field}" for field in self.metadata)
        return hash_text(f"{PARSER_VERSION}/{columns}/{self.max_file_bytes}{fields}")[:12]

    @property
    def fields(self) -> str:
        """The fields of metadata, as in ``year:int,acl:list<string>``."""
        return ",".join(map(str, self.metadata))

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """Columns that every file of rows must have: the text's, and those of id and title if they were configured."""
        ours = type(self)()
        named = [(self.id_column, ours.id_column), (self.title_column, ours.title_column)]
        return (self.text_column, *(name for name, default in named if name != default))
