"""Opens office documents, which are zip archives of XML files, within limits."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from embed_assets.corpus.formats.parsed import MissingExtra
from embed_assets.corpus.formats.properties import open_xml_properties
from embed_assets.corpus.items import BadRow

_MAX_XML_BYTES = 32 << 20
"""XML in a document, unzipped: about five million elements, or three thousand pages."""
_MAX_PART_BYTES = 8 * _MAX_XML_BYTES
"""Any one file in a document, unzipped. Images may exceed the XML's limit, but some libraries load them too."""
OLE_MAGIC = bytes.fromhex("d0cf11e0a1b11ae1")
"""Start of a password-protected office document, which is an OLE file and not a zip, and of the old formats."""
_XML_SUFFIXES = (".xml", ".rels", ".html", ".htm", ".xhtml", ".opf", ".ncx")
_STRICT = (
    (b"http://purl.oclc.org/ooxml/officeDocument/", b"http://schemas.openxmlformats.org/officeDocument/2006/"),
    (
        b"http://purl.oclc.org/ooxml/wordprocessingml/main",
        b"http://schemas.openxmlformats.org/wordprocessingml/2006/main",
    ),
    (b"http://purl.oclc.org/ooxml/drawingml/", b"http://schemas.openxmlformats.org/drawingml/2006/"),
    (b"http://purl.oclc.org/ooxml/presentationml/main", b"http://schemas.openxmlformats.org/presentationml/2006/main"),
    (b"http://purl.oclc.org/ooxml/spreadsheetml/main", b"http://schemas.openxmlformats.org/spreadsheetml/2006/main"),
)
"""Namespaces of Strict Open XML and of the usual, Transitional one (ISO/IEC 29500-1, annex A and part 4)."""


class Archive:
    """A zipped document whose files are known to be within the limits."""

    def __init__(self, data: bytes, kind: str) -> None:
        """Raise ``BadRow.Error`` when it is no zip, is encrypted or unzips to too much; `kind` is what it should be."""
        self.kind = kind
        if data.startswith(OLE_MAGIC):
            detail = f"it has a password or is of an old format; save it as a {kind} without a password"
            raise BadRow.Error("encrypted", detail)
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise self.broken(error) from error
        self.names = self._zip.namelist()
        _check(self._zip.infolist(), kind)

    def read(self, name: str) -> bytes | None:
        """The content of a file, None if there is none of that name. Raises ``BadRow.Error``."""
        if name not in self.names:
            return None
        try:
            return self._zip.read(name)
        except Exception as error:  # zipfile raises whatever its decompressors do
            raise self.broken(error) from error

    def xml(self, name: str) -> Any:
        """The root element of an XML file, in the namespaces of Transitional Open XML; None if there is none.

        Entities are not resolved. Raises ``BadRow.Error``, or ``MissingExtra`` without lxml.
        """
        try:
            from lxml import etree
        except ImportError:
            raise MissingExtra(f"a {self.kind}") from None
        data = self.read(name)
        if data is None:
            return None
        for strict, usual in _STRICT:
            data = data.replace(strict, usual)
        try:
            return etree.fromstring(data, etree.XMLParser(resolve_entities=False, no_network=True))
        except (etree.LxmlError, ValueError) as error:
            raise self.broken(error) from error

    def related(self, name: str) -> dict[str, list[str]]:
        """The files that an Open XML file refers to, by the last word of the relation's type, such as 'styles'."""
        found: dict[str, list[str]] = {}
        for relation, path in self._relations(name):
            found.setdefault(str(relation.get("Type", "")).rpartition("/")[2], []).append(path)
        return found

    def targets(self, name: str) -> dict[str, str]:
        """The files that an Open XML file refers to, by the relation's id."""
        return {str(relation.get("Id")): path for relation, path in self._relations(name)}

    def _relations(self, name: str) -> Iterator[tuple[Any, str]]:
        """Each relation to a file of the package, and that file's name."""
        place = PurePosixPath(name)
        root = self.xml(str(place.parent / "_rels" / f"{place.name}.rels"))
        for relation in root if root is not None else ():
            target = str(relation.get("Target", ""))
            if relation.get("TargetMode") != "External" and target:
                yield relation, resolved(target.lstrip("/") if target.startswith("/") else str(place.parent / target))

    def main(self, default: str) -> str:
        """The name of an Open XML package's main file."""
        return next(iter(self.related("").get("officeDocument", ())), default)

    def title(self) -> str:
        """The title in the properties of an Open XML package."""
        core = self.xml("docProps/core.xml")
        title = core.find("{http://purl.org/dc/elements/1.1/}title") if core is not None else None
        return str(title.text or "") if title is not None else ""

    def properties(self) -> dict[str, str]:
        """The other properties of an Open XML package."""
        return open_xml_properties(self.xml("docProps/core.xml"))

    def broken(self, error: Exception) -> BadRow.Error:
        """The rejection of the document for an error of a library."""
        return BadRow.Error("broken_file", f"the {self.kind} could not be parsed: {type(error).__name__}: {error}")


def _check(entries: list[zipfile.ZipInfo], kind: str) -> None:
    if any(entry.flag_bits & 1 for entry in entries):
        raise BadRow.Error("encrypted", f"the {kind} is encrypted; save a copy without a password")
    size = sum(entry.file_size for entry in entries if entry.filename.lower().endswith(_XML_SUFFIXES))
    if size > _MAX_XML_BYTES:
        raise BadRow.Error("too_large", f"it unzips to {size} bytes of XML, over {_MAX_XML_BYTES}; split it")
    largest = max(entries, key=lambda entry: entry.file_size, default=None)
    if largest is not None and largest.file_size > _MAX_PART_BYTES:
        detail = f"its {largest.filename!r} unzips to {largest.file_size} bytes, over {_MAX_PART_BYTES}; remove it"
        raise BadRow.Error("too_large", detail)


def resolved(path: str) -> str:
    """A path without '.' and '..'."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
