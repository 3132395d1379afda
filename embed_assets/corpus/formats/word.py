"""Reads Word documents (WordprocessingML, ECMA-376 part 1, chapter 17) as Markdown.

What a reader of the final document sees in its body: no deleted or hidden text, no comments, headers and footers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from embed_assets.corpus.formats.archive import Archive
from embed_assets.corpus.formats.equations import linear
from embed_assets.corpus.formats.numbering import WORD, Numbering
from embed_assets.corpus.formats.parsed import Parsed, one_line, real_title, table, without_soft_hyphens
from embed_assets.corpus.formats.symbols import from_private_use, symbol

_MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_COMPATIBILITY = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_CHARACTERS = {"tab": "\t", "ptab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_NO_TEXT = frozenset(
    {"pPr", "rPr", "sdtPr", "sdtEndPr", "tblPr", "tblGrid", "trPr", "tcPr", "sectPr", "del", "moveFrom", "instrText"}
)
"""Elements whose text is not the document's: properties, what was deleted or moved away, code of fields."""
_OFF = frozenset({"0", "false", "off", "none"})
_BODY_LEVEL = 9
"""The outline level of text that is no heading."""


def read_word(data: bytes) -> Parsed:
    """The document as Markdown: headings, lists with their numbers, tables row by row, notes below their paragraph.

    Raises ``BadRow.Error`` or ``MissingExtra``.
    """
    archive = Archive(data, "Word document")
    main = archive.main("word/document.xml")
    root = archive.xml(main)
    if root is None or root.find(f"{WORD}body") is None:
        raise archive.broken(ValueError(f"it has no {main}"))
    parts = archive.related(main)

    def part(kind: str) -> Any:
        return archive.xml(parts[kind][0]) if kind in parts else None

    notes = {kind: _by_id(part(f"{kind}s")) for kind in ("footnote", "endnote")}
    try:
        reader = _Reader(_Styles(part("styles")), Numbering(part("numbering")), notes)
        text = reader.document(root.find(f"{WORD}body"))
    except (RecursionError, ValueError) as error:
        raise archive.broken(error) from error
    title = real_title(archive.title()) or real_title(reader.title)
    return Parsed(without_soft_hyphens(text), title, properties=archive.properties())


def _by_id(root: Any) -> dict[str, Any]:
    return {} if root is None else {str(note.get(f"{WORD}id")): note for note in root}


def _child(element: Any, *names: str) -> Any:
    """The element below, by names of children; None if there is none."""
    for name in names:
        element = element.find(WORD + name) if element is not None else None
    return element


def _value(element: Any) -> str | None:
    return None if element is None else element.get(f"{WORD}val")


def _is_on(element: Any) -> bool:
    return element is not None and (_value(element) or "1") not in _OFF


@dataclass(frozen=True, slots=True)
class _Style:
    """What a paragraph style says, by itself or through the style that it is based on."""

    outline_level: int | None = None
    is_title: bool = False
    list_id: str | None = None
    list_level: str | None = None
    is_bullet: bool = False


class _Styles:
    """The paragraph styles of a document."""

    def __init__(self, root: Any) -> None:
        self._elements = {} if root is None else {str(e.get(f"{WORD}styleId")): e for e in root.iter(f"{WORD}style")}
        self._found: dict[str, _Style] = {"": _Style()}

    def __getitem__(self, style_id: str) -> _Style:
        if style_id not in self._found:
            self._found[style_id] = _Style()  # ends a circle of styles based on one another
            self._found[style_id] = self._resolve(style_id)
        return self._found[style_id]

    def _resolve(self, style_id: str) -> _Style:
        element = self._elements.get(style_id)
        # Word's own styles have English names in documents of any language; some programs use them undefined.
        name = (_value(_child(element, "name")) or "" if element is not None else style_id).lower()
        base = self[_value(_child(element, "basedOn")) or ""]
        word, _, digit = name.partition(" ") if element is not None else (name.rstrip("123456789"), "", name[-1:])
        named = int(digit) - 1 if word == "heading" and digit.isdecimal() and 0 < int(digit) <= _BODY_LEVEL else None
        level = _outline_level(_child(element, "pPr"))
        numbers = _child(element, "pPr", "numPr")
        return _Style(
            next((found for found in (level, named, base.outline_level) if found is not None), None),
            name == "title" or base.is_title,
            _value(_child(numbers, "numId")) or base.list_id,
            _value(_child(numbers, "ilvl")) or base.list_level,
            name.replace(" ", "").startswith(("listbullet", "listnumber")) or base.is_bullet,
        )


def _outline_level(properties: Any) -> int | None:
    level = _value(_child(properties, "outlineLvl"))
    return int(level) if level is not None and level.isdecimal() else None


@dataclass
class _Reader:
    """Turns elements into Markdown, in order: it counts the numbered paragraphs."""

    styles: _Styles
    numbering: Numbering
    notes: dict[str, dict[str, Any]]
    title: str = ""
    """The text of the first paragraph with the style Title."""
    _carried: str = ""
    """Text of a paragraph whose end was deleted: the next one continues it."""
    _below: list[tuple[str, Any]] = field(default_factory=list)
    """What text boxes and notes that were met in a paragraph begin with, and their elements; written below it."""

    def document(self, body: Any) -> str:
        """Markdown of the whole document."""
        blocks = [*self.blocks(body), self._carried.strip()]
        return "\n\n".join(block for block in blocks if block)

    def blocks(self, parent: Any) -> Iterator[str]:
        """Markdown of the paragraphs and tables in order, also of those in content controls and insertions."""
        for element in parent:
            name = _name(element)
            if name == "p":
                if block := self._paragraph(element):
                    yield block
                yield from self._text_below()
            elif name == "tbl":
                yield from self._table(element)
                yield from self._text_below()
            elif name == "oMathPara":
                yield linear(element)
            elif name == "AlternateContent":
                yield from self.blocks(_branch(element))
            elif name not in _NO_TEXT and not _is_placeholder(element):
                yield from self.blocks(element)

    def _text_below(self) -> Iterator[str]:
        while self._below:
            mark, element = self._below.pop(0)
            for block in self.blocks(element):
                yield mark + block
                mark = ""

    def _paragraph(self, paragraph: Any) -> str:
        """Markdown of a paragraph: of a heading or list item if its style or properties say so."""
        properties = _child(paragraph, "pPr")
        text = self._carried + self._inline(paragraph)
        self._carried = ""
        if _child(properties, "rPr", "del") is not None:
            self._carried = text
            return ""
        text = text.strip()
        if not text:
            return ""
        style = self.styles[_value(_child(properties, "pStyle")) or ""]
        level = _outline_level(properties)
        level = style.outline_level if level is None else level
        label, indent = self._label(style, properties)
        if style.is_title or (level is not None and level < _BODY_LEVEL):
            heading = " ".join(f"{label if label != '-' else ''} {text}".split())
            self.title = self.title or (heading if style.is_title else "")
            return f"{'#' if style.is_title else '#' * min(6, (level or 0) + 1)} {heading}"
        return f"{'  ' * indent}{label} {text}" if label else text

    def _label(self, style: _Style, properties: Any) -> tuple[str, int]:
        """(what a list item begins with, its level from 0); ('', 0) if the paragraph is none."""
        numbers = _child(properties, "numPr")
        list_id = _value(_child(numbers, "numId")) or style.list_id
        level = _value(_child(numbers, "ilvl")) or style.list_level or "0"
        label = self.numbering.label(list_id, int(level)) if list_id not in (None, "0") and level.isdecimal() else None
        if label is None:
            return ("-", 0) if style.is_bullet and list_id != "0" else ("", 0)
        return label, int(level)

    def _table(self, element: Any) -> Iterator[str]:
        """A line for each row; of a table with one column, which only frames its content, that content."""
        rows = [list(_cells(row)) for row in _rows(element)]
        if all(len(row) <= 1 for row in rows):
            for cell in (cell for row in rows for cell in row):
                yield from self.blocks(cell)
            return
        if text := table([one_line(self.blocks(cell)) for cell in row] for row in rows):
            yield text

    def _inline(self, element: Any, font: str = "") -> str:
        """The text below an element. Its text boxes and notes go to `_below`."""
        found = []
        for child in element:
            name = _name(child)
            if name == "t":
                found.append(from_private_use(font, child.text or ""))
            elif name in _CHARACTERS:
                found.append(_CHARACTERS[name])
            elif name == "sym":
                code = child.get(f"{WORD}char", "")
                found.append(symbol(child.get(f"{WORD}font", ""), int(code, 16) if code else 0x20))
            elif name == "r":
                run = _child(child, "rPr")
                if not _is_on(_child(run, "vanish")):
                    fonts = _child(run, "rFonts")
                    found.append(self._inline(child, fonts.get(f"{WORD}ascii", "") if fonts is not None else ""))
            elif name in ("oMath", "oMathPara"):
                found.append(linear(child))
            elif name in ("footnoteReference", "endnoteReference"):
                found.append(self._note(name.removesuffix("Reference"), str(child.get(f"{WORD}id"))))
            elif name == "txbxContent":
                self._below.append(("", child))
            elif name == "AlternateContent":
                found.append(self._inline(_branch(child), font))
            elif name == "ruby":  # a word with its reading above it, which comes first in the file
                word, reading = (self._inline(part, font) for part in (child[-1], child.find(f"{WORD}rt")))
                found.append(f"{word}({reading})")
            elif name not in _NO_TEXT and not _is_placeholder(child):
                found.append(self._inline(child, font))
        return "".join(found)

    def _note(self, kind: str, note_id: str) -> str:
        """The mark of a note, whose text follows below the paragraph."""
        note = self.notes[kind].get(note_id)
        if note is None:
            return ""
        mark = f"[^{'' if kind == 'footnote' else 'e'}{note_id}]"
        self._below.append((f"{mark}: ", note))
        return mark


def _name(element: Any) -> str:
    """The element's name without its namespace; '' of comments and processing instructions."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _rows(parent: Any) -> Iterator[Any]:
    """The rows of a table that were not deleted, also those in content controls and insertions."""
    for element in parent:
        if _name(element) == "tr":
            if _child(element, "trPr", "del") is None:
                yield element
        elif _name(element) not in _NO_TEXT:
            yield from _rows(element)


def _cells(parent: Any) -> Iterator[Any]:
    """The cells of a row that were not deleted, also those in content controls."""
    for element in parent:
        if _name(element) == "tc":
            if _child(element, "tcPr", "cellDel") is None:
                yield element
        elif _name(element) not in _NO_TEXT:
            yield from _cells(element)


def _branch(alternatives: Any) -> Any:
    """The one branch of mc:AlternateContent that counts (ECMA-376 part 3): the first that has text, if any."""
    branches = [*alternatives.iterchildren(f"{_COMPATIBILITY}Choice", f"{_COMPATIBILITY}Fallback")]
    return next((b for b in branches if next(b.iter(f"{WORD}t", f"{_MATH}t"), None) is not None), ())


def _is_placeholder(element: Any) -> bool:
    """Whether an element is a form field that nobody filled in: it shows a hint such as 'Click to enter text'."""
    return _name(element) == "sdt" and _is_on(_child(element, "sdtPr", "showingPlcHdr"))
