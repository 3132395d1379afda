"""Defines the results of reading a file: rows with a text, and rows that could not be read."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Row:
    """The text of one row of a file, or of a whole file (then `key` is empty)."""

    key: str
    """Identifies the row within its file: its id, else a hash of its text."""
    text: str
    title: str
    media_type: str
    byte_size: int
    metadata: str = "{}"
    """The row's other columns, as a JSON object."""
    position: str = ""
    """Where the row stands in its file, such as 'row7', when `key` comes from the id column; '' when it has no id."""
    page_starts: tuple[int, ...] = ()
    """The code points where the pages of a document with pages start."""

    def with_key(self, key: str) -> Row:
        """A copy with another key."""
        return replace(self, key=key)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or a whole file (then `key` is empty), that could not be read."""

    key: str
    """Identifies the row within its file: its id if it has one, else its position."""
    reason: str
    """Short code, one of `parsing.REASONS`."""
    detail: str
    position: str = ""
    """Where the row stands in its file when `key` is its id; else ''."""

    class Error(Exception):
        """Raised by parsers of whole files; `row` is the rejection."""

        def __init__(self, reason: str, detail: str) -> None:
            super().__init__(detail)
            self.row = BadRow("", reason, detail)
