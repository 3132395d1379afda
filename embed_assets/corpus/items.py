"""What comes out of a file: rows, whole texts, and what could not be read."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Row:
    """The text of a row, or of a whole file (then `key` is empty)."""

    key: str
    """What tells it from the other rows of its file: its id, else a hash of its text."""
    text: str
    title: str
    media_type: str
    byte_size: int
    metadata: str = "{}"
    place: str = ""
    """Where the row stands in its file, when `key` comes from the id column; empty when it has no id."""

    def named(self, key: str) -> Row:
        """A copy under another key."""
        return replace(self, key=key)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or file (then `key` is empty), that could not be read."""

    key: str
    reason: str
    detail: str

    class Error(Exception):
        """Raised by a parser of whole files."""

        def __init__(self, reason: str, detail: str) -> None:
            super().__init__(detail)
            self.row = BadRow("", reason, detail)
