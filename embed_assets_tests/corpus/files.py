"""Makes small documents of office formats, part by part, so that a test shows what is in them."""

from __future__ import annotations

import io
import struct
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


_SHEET = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
_PACKAGE = 'xmlns="http://schemas.openxmlformats.org/package/2006/relationships"'


def xlsx(sheets: Mapping[str, Sequence[Sequence[object]]], hidden: Sequence[str] = ()) -> bytes:
    """A workbook with these rows, by sheet; a value of None leaves its cell out."""
    files: dict[str, str | bytes] = {}
    entries, relations = "", ""
    for number, (name, rows) in enumerate(sheets.items(), 1):
        data = ""
        for y, row in enumerate(rows, 1):
            cells = ((f"{chr(65 + x)}{y}", value) for x, value in enumerate(row) if value is not None)
            data += f'<row r="{y}">' + "".join(
                f'<c r="{place}"><v>{value}</v></c>'
                if isinstance(value, int | float)
                else f'<c r="{place}" t="inlineStr"><is><t>{value}</t></is></c>'
                for place, value in cells
            )
            data += "</row>"
        files[f"xl/worksheets/sheet{number}.xml"] = f"<worksheet {_SHEET}><sheetData>{data}</sheetData></worksheet>"
        state = ' state="hidden"' if name in hidden else ""
        entries += f'<sheet name="{name}" sheetId="{number}" r:id="r{number}"{state}/>'
        kind = f"{_OPENXML}/relationships/worksheet"
        relations += f'<Relationship Id="r{number}" Type="{kind}" Target="worksheets/sheet{number}.xml"/>'
    space = f'{_SHEET} xmlns:r="{_OPENXML}/relationships"'
    main = f'<Relationship Id="r" Type="{_OPENXML}/relationships/officeDocument" Target="xl/workbook.xml"/>'
    return zipped(
        files
        | {
            "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>',
            "_rels/.rels": f"<Relationships {_PACKAGE}>{main}</Relationships>",
            "xl/workbook.xml": f"<workbook {space}><sheets>{entries}</sheets></workbook>",
            "xl/_rels/workbook.xml.rels": f"<Relationships {_PACKAGE}>{relations}</Relationships>",
        }
    )


def pptx(*slides: str, notes: str = "") -> bytes:
    """A presentation whose slides have these shapes; `notes` are those of the first one."""
    space = (
        'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
        'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main" '
        f'xmlns:r="{_OPENXML}/relationships"'
    )

    def relations(*targets: str) -> str:
        inside = "".join(
            f'<Relationship Id="r{i}" Type="{_OPENXML}/relationships/{kind}" Target="{target}"/>'
            for i, (kind, target) in enumerate(each.split(" ") for each in targets)
        )
        return f"<Relationships {_PACKAGE}>{inside}</Relationships>"

    ids = "".join(f'<p:sldId id="{256 + i}" r:id="r{i}"/>' for i in range(len(slides)))
    files: dict[str, str | bytes] = {
        "_rels/.rels": relations("officeDocument ppt/presentation.xml"),
        "ppt/presentation.xml": f"<p:presentation {space}><p:sldIdLst>{ids}</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": relations(*(f"slide slides/s{i}.xml" for i in range(len(slides)))),
    }
    for i, shapes in enumerate(slides):
        files[f"ppt/slides/s{i}.xml"] = f"<p:sld {space}><p:cSld><p:spTree>{shapes}</p:spTree></p:cSld></p:sld>"
    if notes:
        files["ppt/slides/_rels/s0.xml.rels"] = relations("notesSlide ../notes.xml")
        files["ppt/notes.xml"] = f"<p:notes {space}><p:cSld><p:spTree>{notes}</p:spTree></p:cSld></p:notes>"
    return zipped(files)


def shape(*paragraphs: str, placeholder: str = "") -> str:
    """A shape of a slide with these paragraphs."""
    kind = f'<p:nvSpPr><p:nvPr><p:ph type="{placeholder}"/></p:nvPr></p:nvSpPr>' if placeholder else ""
    body = "".join(f"<a:p><a:r><a:t>{text}</a:t></a:r></a:p>" for text in paragraphs)
    return f"<p:sp>{kind}<p:txBody>{body}</p:txBody></p:sp>"


def odt(body: str, title: str = "") -> bytes:
    """An OpenDocument text with this body."""
    names = ("office", "text", "table", "drawing", "meta")
    short = {"drawing": "draw"}
    space = " ".join(f'xmlns:{short.get(n, n)}="urn:oasis:names:tc:opendocument:xmlns:{n}:1.0"' for n in names)
    content = f"<office:document-content {space}><office:body><office:text>{body}</office:text></office:body>"
    meta = f'<office:document-meta {space} xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title>'
    return zipped(
        {
            "mimetype": "application/vnd.oasis.opendocument.text",
            "META-INF/manifest.xml": "<manifest/>",
            "content.xml": f"{content}</office:document-content>",
            "meta.xml": f"{meta}</office:document-meta>",
        }
    )


def epub(title: str, pages: Mapping[str, str], spine: Sequence[str]) -> bytes:
    """A book with these pages, of which the spine names those to read in their order."""
    items = "".join(f'<item id="{name}" href="{name}" media-type="application/xhtml+xml"/>' for name in pages)
    order = "".join(f'<itemref idref="{name}"/>' for name in spine)
    package = (
        f'<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><dc:title>'
        f"{title}</dc:title></metadata><manifest>{items}</manifest><spine>{order}</spine></package>"
    )
    place = '<rootfile full-path="OEBPS/book.opf"/>'
    container = f'<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container">{place}</container>'
    texts = {f"OEBPS/{name}": f"<html><body>{text}</body></html>" for name, text in pages.items()}
    return zipped({"META-INF/container.xml": container, "OEBPS/book.opf": package, **texts})


def msg(subject: str, body: str) -> bytes:
    """An Outlook message ([MS-OXMSG]), in a compound file ([MS-CFB]) of version 3."""
    texts = {"0037": subject, "1000": body}
    streams = {f"__substg1.0_{tag}001F": text.encode("utf-16-le") for tag, text in texts.items()}
    properties = bytes(32)
    for tag, text in texts.items():
        properties += struct.pack("<IIII", int(f"{tag}001F", 16), 6, len(text.encode("utf-16-le")) + 2, 0)
    streams["__properties_version1.0"] = properties
    mini, mini_fat, entries = b"", [], []
    for name, data in sorted(streams.items(), key=lambda s: (len(s[0]), s[0])):
        blocks = -(-len(data) // 64)
        entries.append((name, len(mini_fat), len(data)))
        mini_fat += [*range(len(mini_fat) + 1, len(mini_fat) + blocks), 0xFFFFFFFE]
        mini += data.ljust(blocks * 64, b"\0")
    mini_sectors = -(-len(mini) // 512)
    fat = [0xFFFFFFFD, 2, 0xFFFFFFFE, 0xFFFFFFFE, *range(5, 4 + mini_sectors), 0xFFFFFFFE]

    def entry(name: str, kind: int, right: int, child: int, start: int, size: int) -> bytes:
        encoded = (name + "\0").encode("utf-16-le")
        links = struct.pack("<HBBIII", len(encoded), kind, 1, 0xFFFFFFFF, right, child)
        return encoded.ljust(64, b"\0") + links + bytes(36) + struct.pack("<IQ", start, size)

    rows = [entry("Root Entry", 5, 0xFFFFFFFF, 1, 4, len(mini))]
    for i, (name, start, size) in enumerate(entries, 1):
        rows.append(entry(name, 2, i + 1 if i < len(entries) else 0xFFFFFFFF, 0xFFFFFFFF, start, size))
    header = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(16) + struct.pack("<HHHHH", 0x3E, 3, 0xFFFE, 9, 6) + bytes(6)
    header += struct.pack("<IIIIIIIII", 0, 1, 1, 0, 4096, 3, 1, 0xFFFFFFFE, 0)
    sectors = [
        struct.pack(f"<{len(fat)}I", *fat).ljust(512, b"\xff"),
        b"".join(rows).ljust(1024, b"\0"),
        struct.pack(f"<{len(mini_fat)}I", *mini_fat).ljust(512, b"\xff"),
        mini.ljust(mini_sectors * 512, b"\0"),
    ]
    return (header + struct.pack("<I", 0)).ljust(512, b"\xff") + b"".join(sectors)
