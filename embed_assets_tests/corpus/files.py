"""Makes small documents of office formats, part by part, so that a test shows what is in them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence

_OPENXML = "http://schemas.openxmlformats.org/officeDocument/2006"
NAMESPACES = " ".join(
    [
        'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"',
        'xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"',
        'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"',
    ]
)


def zipped(files: Mapping[str, str | bytes]) -> bytes:
    """A zip archive of these files."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return sink.getvalue()


def docx(body: str, title: str = "", **parts: str) -> bytes:
    """A Word document with this body; `parts` are the contents of its styles, numbering, footnotes or endnotes."""

    def xml(name: str, content: str) -> str:
        return f'<?xml version="1.0"?><w:{name} {NAMESPACES}>{content}</w:{name}>'

    relations = "".join(
        f'<Relationship Id="r{i}" Type="{_OPENXML}/relationships/{name}" Target="{name}.xml"/>'
        for i, name in enumerate(parts)
    )
    space = 'xmlns="http://schemas.openxmlformats.org/package/2006/relationships"'
    core = f'<c xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></c>'
    main = f'<Relationship Id="r" Type="{_OPENXML}/relationships/officeDocument" Target="word/document.xml"/>'
    return zipped(
        {
            "_rels/.rels": f"<Relationships {space}>{main}</Relationships>",
            "docProps/core.xml": core,
            "word/document.xml": xml("document", f"<w:body>{body}</w:body>"),
            "word/_rels/document.xml.rels": f"<Relationships {space}>{relations}</Relationships>",
            **{f"word/{name}.xml": xml(name, content) for name, content in parts.items()},
        }
    )


def paragraph(text: str, properties: str = "") -> str:
    """A paragraph of one run."""
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"


def table(*rows: Sequence[str]) -> str:
    """A table whose cells hold these blocks."""
    cells = ("".join(f"<w:tc>{cell}</w:tc>" for cell in row) for row in rows)
    return f"<w:tbl>{''.join(f'<w:tr>{row}</w:tr>' for row in cells)}</w:tbl>"


PICTURE = "q 612 0 0 792 0 0 cm /I1 Do Q"
"""Content of a page that a picture fills."""


def pdf(*pages: str, title: str = "", extra: Sequence[bytes] = (), page_entries: str = "") -> bytes:
    """A PDF whose pages have these content streams; `extra` are objects from number 6 on."""
    first = 6 + len(extra)
    kids = " ".join(f"{first + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [6 0 R] >> >>"
        if extra
        else b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8 /Length 1 >>"
        b"\nstream\n\xff\nendstream",
        f"<< /Title ({title}) >>".encode(),
        *extra,
    ]
    for i, content in enumerate(pages):
        resources = "/Resources << /Font << /F1 3 0 R >> /XObject << /I1 4 0 R >> >>"
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {first + 2 * i + 1} 0 R {resources}"
        objects.append(f"{page} {page_entries} >>".encode())
        stream = content.encode("cp1252")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    index = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    trailer = b"trailer\n<< /Size %d /Root 1 0 R /Info 5 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % size + index + trailer


def lines(*texts: str, top: int = 720, size: int = 12, leading: int = 14) -> str:
    """Content of a page: lines of text from a height downwards."""
    return "\n".join(
        f"BT /F1 {size} Tf 72 {top - leading * i} Td ({text}) Tj ET" for i, text in enumerate(texts) if text
    )
