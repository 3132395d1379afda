"""Defines what a parser of a whole file returns, and what it raises."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from embed_assets.corpus.items import BadRow

_NO_TITLE = re.compile(
    # What programs put there when nobody wrote one, and paths.
    r"(?:(?:untitled|unnamed|new|blank)(?:[ -](?:document|page|presentation|spreadsheet))?|unknown|no title|none|null"
    r"|title|document|dokument|documento|word document|powerpoint[ -](?:presentation|präsentation)|presentation"
    r"|slide|folie|diapositiv[ae]|workbook)[\s\d.()_-]*|(?:\w+ ){0,2}power ?point(?:[ -]\w+)?"
    r"|(?:[a-z]:\\|\\\\|/|file:)\S.*"
    r"|[^a-zA-Z\d]*",
    re.IGNORECASE,
)
_MADE_BY = re.compile(r"^(?:Microsoft (?:Word|PowerPoint|Excel)|Print|(?:Pages|Numbers)|PDF)\s+-\s+", re.IGNORECASE)
_FILE_NAME = re.compile(
    r"\S+\.(?:docx?|odt|rtf|dotx?|dvi|tex|pdf|pptx?|indd|qxd|pmd|fm|xlsx?|html?|md|txt|p65)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Parsed:
    """The document that a file holds."""

    text: str
    title: str = ""
    """'' if the file names none."""
    media_type: str = "text/markdown"
    metadata: Mapping[str, str | int] = field(default_factory=dict)
    page_starts: tuple[int, ...] = ()
    """The code points of `text` where its pages start, the first of them 0; empty for formats without pages."""
    lost: tuple[BadRow, ...] = ()
    """Parts of the file that hold no text that could be read."""
    properties: Mapping[str, str] = field(default_factory=dict)
    """What else the file says about the document, such as its author, by names in lower case."""


class MissingExtra(Exception):
    """The optional package that reads a format is not installed."""

    def __init__(self, what: str, extra: str = "documents") -> None:
        super().__init__(f"reading {what} needs the extra '{extra}': pip install 'embed-assets[{extra}]'")
        self.what, self.extra = what, extra


def real_title(title: object) -> str:
    """The title, unless it is what a program wrote in place of one, such as a file name or 'Untitled 1'; then ''."""
    line = _MADE_BY.sub("", " ".join(str(title or "").split()))
    return "" if _NO_TITLE.fullmatch(line) or _FILE_NAME.fullmatch(line) else line


def one_line(blocks: Iterable[str]) -> str:
    """The blocks of a table's cell on one line; of a table inside it, rows are separated by semicolons."""
    parts = []
    for block in blocks:
        is_table = block.startswith("| ")
        lines = [line.strip("| ") for line in block.split("\n")] if is_table else block.lstrip("# ").split()
        parts.append(("; " if is_table else " ").join(line for line in lines if line))
    return " ".join(part for part in parts if part)


def table(rows: Iterable[Sequence[str]]) -> str:
    """A line for each row that has a value; '' if none has."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows if any(row))


def without_soft_hyphens(text: str) -> str:
    """The text without the invisible places where a word may be broken, which no tokenizer expects inside words."""
    return text.replace("\u00ad", "")
