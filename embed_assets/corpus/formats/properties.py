"""What a file's format says about the document besides its title: author, subject, keywords, dates, meta elements."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from typing import Any

_MAX_HEAD_CHARACTERS = 1 << 18
"""How far into a page its meta elements are looked for: twice what the heads of large sites take."""
_FED_CHARACTERS = 1 << 12
"""Read at a time, so that little of the body is."""
_OPEN_XML = {"creator": "author", "lastModifiedBy": "last_modified_by"}
_OPEN_DOCUMENT = {"initial-creator": "author", "keyword": "keywords", "creation-date": "created", "date": "modified"}
_PDF = {"CreationDate": "created", "ModDate": "modified"}
_PDF_TIME = re.compile(r"D:(\d{4})(\d\d)?(\d\d)?(\d\d)?(\d\d)?(\d\d)?(?:(Z)|([+-]\d\d)'?(\d\d)?'?)?")


def html_properties(html: str) -> dict[str, str]:
    """The page's meta elements: their content by name, or by property, in lower case."""
    head = _Head()
    for start in range(0, min(len(html), _MAX_HEAD_CHARACTERS), _FED_CHARACTERS):
        if head.is_over:
            break
        head.feed(html[start : min(start + _FED_CHARACTERS, _MAX_HEAD_CHARACTERS)])
    return head.found


class _Head(HTMLParser):
    """Collects meta elements up to the body."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.is_over = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.is_over |= tag == "body"
        values = {name: value or "" for name, value in attrs}
        name = values.get("name") or values.get("property")
        if tag == "meta" and name and "content" in values and not self.is_over:
            self.found.setdefault(name.strip().lower(), values["content"].strip())


def pdf_properties(described: Mapping[str, str]) -> dict[str, str]:
    """The entries of a PDF's information, such as author, subject and keywords; times in ISO 8601."""
    found = {_PDF.get(name, name.lower()): value.strip() for name, value in described.items() if value.strip()}
    return {name: _iso(value) if name in _PDF.values() else value for name, value in found.items()}


def _iso(value: str) -> str:
    """A PDF's time, such as D:20260131120000+02'00', in ISO 8601; anything else as it is."""
    if not (parts := _PDF_TIME.fullmatch(value)):
        return value
    year, month, day, hour, minute, second, utc, hours, minutes = parts.groups()
    zone = "Z" if utc else f"{hours}:{minutes or '00'}" if hours else ""
    time = f"{hour or '00'}:{minute or '00'}:{second or '00'}"
    return f"{year}-{month or '01'}-{day or '01'}T{time}{zone}"


def open_xml_properties(core: Any) -> dict[str, str]:
    """The properties in an Open XML package's core.xml, such as author, subject, keywords, created and modified."""
    return _texts(core if core is not None else (), _OPEN_XML)


def open_document_properties(meta: Any) -> dict[str, str]:
    """The properties in an OpenDocument file's meta.xml, and those that its author added, by their names."""
    elements = list(meta.iter()) if meta is not None else []
    own = {
        str(value): str(element.text).strip()
        for element in elements
        if _name(element) == "user-defined" and element.text
        for name, value in element.attrib.items()
        if name.endswith("}name")
    }
    return own | _texts(elements, _OPEN_DOCUMENT)


def _texts(elements: Iterable[Any], names: Mapping[str, str]) -> dict[str, str]:
    """The texts of elements by their names; of several, such as keywords, all of them."""
    found: dict[str, list[str]] = {}
    for element in elements:
        name = _name(element)
        if name and element.text and element.text.strip() and not len(element):
            found.setdefault(names.get(name, name), []).append(element.text.strip())
    return {name: ", ".join(texts) for name, texts in found.items()}


def _name(element: Any) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
