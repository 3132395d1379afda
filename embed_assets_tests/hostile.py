"""Writes a corpus of two hundred files designed to break parsers, with a harmless file in every folder."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import socket
import unicodedata
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embed_assets_tests.corpus.files import epub, msg, odt, pptx, shape, xlsx, zipped

_CONTENT_TYPES = (
    '<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/><Override PartName="/word/document.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
)
_RELS = (
    '<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    'Target="word/document.xml"/></Relationships>'
)
_WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
_LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))

ODD_NAMES = (
    "it's", 'a "quoted" one', "semi;colon", "DROP TABLE x;--", "per%cent", "%2F..%2Fetc", "%00", "new\nline", "tab\tname",
    "bell\x07", "del\x7f", "..dots", "...", "....", "a..b", "back\\slash", "a=b", "partition_key=x", "__HIVE_DEFAULT_PARTITION__",
    "_delta_log", "_staging", "_root", "CON", "nul", "space ", " lead", "dot.", "comma,name", "[brackets]", "{braces}",
    "$HOME", "`id`", "$(id)", "*", "?", "<tag>", "a|b", "&amp;", "#hash", "a#b", "data.jsonl#1", "@at", "!", "~", "~tilde",
    "^", "+plus+", "é", "ÅNGSTRÖM", "ångström", "ＦＵＬＬ", "ß", "ẞ", "日本語", "🎉 party 👩‍👩‍👧‍👦", "rtl \u202e name", "zero\u200bwidth",
    "nb\u00a0sp", "\ufeffbom", "combining e\u0301", "a" * 200, "ä" * 100, "emoji" + "😀" * 40, "UPPER", "upper", "Upper",
    "NaN", "null", "None", "true", "0", "-1", "1e999", "2024-01-01",
)  # fmt: skip


@dataclass(slots=True)
class Written:
    """What the corpus contains."""

    files: int = 0
    items: int = 0
    """Files, counting each row of JSONL, CSV and Parquet: each must become a document or a rejection."""
    harmless_texts: list[str] = field(default_factory=list)
    """Texts that must be embedded whatever the files next to them do."""


def write_hostile_corpus(landing: Path) -> Written:
    """Write the corpus to an existing folder."""
    written = Written()
    for writer in (_names, _texts, _pages, _word, _pdfs, _others, _rows, _tables, _links):
        writer(landing, written)
    for folder in sorted(p for p in landing.iterdir() if p.is_dir()):
        text = f"A harmless file in {folder.name!a}."
        written.harmless_texts.append(text)
        _file(folder / "zz harmless.txt", text, written)
    return written


def _file(path: Path, content: str | bytes, written: Written, items: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
    written.files += 1
    written.items += items


def _names(landing: Path, written: Written) -> None:
    for name in ODD_NAMES:
        _file(landing / "names" / f"{name}.txt", f"The text of {name!r}.", written)
    for name in (
        "it's 100%",
        "new\nline",
        "🎉",
        "..dots",
        "...",
        "a=b",
        "b" * 200,
        "Case",
        "case",
        "_delta_log",
        "nul\x01",
    ):
        _file(landing / name / "x.txt", f"A text in {name!r}.", written)
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "Ünï")  # type: ignore[arg-type]
        _file(landing / name / f"{name}.txt", f"A text whose name is in {form}.", written)
    _file(Path(os.fsdecode(bytes(landing / "names") + b"/caf\xe9 \xff.txt")), "Not UTF-8 in its name.", written)
    deep = landing / "deep"
    for i in range(17):
        deep = deep / f"{i}{'d' * 200}"
    _file(deep / "far.txt", "A path of almost 4 KB.", written)


def _texts(landing: Path, written: Written) -> None:
    cases: dict[str, str | bytes] = {
        "empty.txt": b"", "spaces.md": "   \n\t\n", "nul.txt": b"a\0b\0c", "controls.txt": bytes(range(1, 32)) * 20,
        "surrogate.txt": b"\xed\xa0\x80 lone", "cesu.md": b"\xed\xa0\xbd\xed\xb8\x80", "utf16.txt": "Wide.".encode("utf-16"),
        "utf32.txt": "Wider.".encode("utf-32"), "bad bom.txt": b"\xff\xfe\x00", "latin.txt": "Größe und Maß ".encode("latin-1") * 9,
        "overlong.txt": b"\xc0\xaf\xc0\xaf", "random.txt": os.urandom(5000), "line.txt": "x" * 5_000_000,
        "words.txt": "word " * 200_000, "hashes.md": "#" * 400_000, "ticks.md": "`" * 400_000, "dashes.md": "-" * 400_000,
        "pipes.md": "|" * 300_000, "newlines.md": "\n" * 1_000_000 + "end", "fences.md": "```\n" * 100_000,
        "headings.md": "# a\n" * 100_000, "setext.md": "a\n=\n" * 80_000, "rst.rst": "a\n=\n" * 80_000,
        "quotes.md": "> " * 100_000 + "deep", "lists.md": "".join(f"{' ' * (i % 500)}- x\n" for i in range(5000)),
        "brackets.md": "[" * 100_000, "stars.md": "*" * 200_000, "combining.txt": "e" + "\u0301" * 100_000,
        "zero width.txt": "\u200b" * 100_000 + "x", "rtl.txt": "\u202e" + "abc " * 1000, "emoji.txt": "👩‍👩‍👧‍👦" * 5000,
        "front.md": "---\n" + "k: v\n" * 50_000, "html in.md": "<div>" * 50_000, "link.md": "[a](" * 50_000,
        "no ending": "text", "script.sh": "echo", "image.png": b"\x89PNG\r\n", "archive.zip": b"PK\x03\x04", "UPPER.TXT": "Fine.",
        "cr.txt": "a\rb\rc", "line separators.txt": "a\u2028b\u2029c\x85d", "tags.txt": "\U000e0041" * 100,
        "special.txt": "[CLS] [SEP] [MASK] <s> </s> <|endoftext|> [PAD]" * 50, "long word.txt": "ab" * 100_000,
    }  # fmt: skip
    for name, content in cases.items():
        _file(landing / "texts" / name, content, written)
    with (landing / "texts/too large.txt").open("wb") as file:
        file.truncate(100 << 20)
    with (landing / "texts/one line of a gigabyte.md").open("wb") as file:
        file.truncate(1 << 30)
    written.files += 2
    written.items += 2


def _pages(landing: Path, written: Written) -> None:
    cases: dict[str, str | bytes] = {
        "deep.html": "<div>" * 100_000 + "deep", "deep close.htm": "<b>" * 100_000 + "x" + "</b>" * 100_000,
        "open.html": "<" * 300_000, "comment.html": "<!--" + "x" * 100_000, "attributes.html": "<p " + "a=1 " * 100_000 + ">x",
        "entities.html": "&amp;" * 100_000, "table.html": "<table><tr><td colspan=1000000000 rowspan=1000000000>x</table>",
        "script.html": "<script>" + "x" * 100_000 + "</script>", "charset.html": b"<meta charset=x-user-defined>\xff caf\xe9",
        "replacement.html": b"<meta charset=replacement>\xff\xe9", "iso2022.html": b"<meta charset=iso-2022-kr>\xff\xe9",
        "nul.html": b"<p>a\0b", "titles.html": "<title" * 10_000, "lists.html": "<ul><li>" * 20_000,
        "doctype.html": '<!DOCTYPE html [<!ENTITY a "b">]><p>&a; text</p>', "svg.html": "<svg>" * 20_000, "ok.html": "<p>Good.</p>",
    }  # fmt: skip
    for name, content in cases.items():
        _file(landing / "pages" / name, content, written)


def _docx(body: str, prologue: str = "", extra: dict[str, bytes] | None = None) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", _CONTENT_TYPES)
        archive.writestr("_rels/.rels", _RELS)
        document = f'<?xml version="1.0"?>{prologue}<w:document {_WORD}><w:body>{body}</w:body></w:document>'
        archive.writestr("word/document.xml", document)
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return data.getvalue()


def _paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def _word(landing: Path, written: Written) -> None:
    lie = bytearray(_docx(_paragraph("x") + " " * 30_000_000))
    at = lie.find(b"PK\x01\x02", lie.find(b"word/document.xml") + 50)
    at = lie.rfind(b"PK\x01\x02") if at < 0 else at
    lie[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    cases = {
        "good.docx": _docx(_paragraph("A good document.")),
        "laughs.docx": _docx(_paragraph("&l9;"), f'<!DOCTYPE w:document [<!ENTITY l0 "ha">{_LAUGHS}]>'),
        "external.docx": _docx(_paragraph("&x;"), '<!DOCTYPE w [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
        "bomb.docx": _docx(_paragraph(" " * 60_000_000)),
        "lying bomb.docx": bytes(lie),
        "media.docx": _docx(_paragraph("x"), extra={f"word/media/{i}.png": bytes(300 << 20) for i in range(2)}),
        "nested.docx": _docx("<w:tbl><w:tr><w:tc>" * 5_000 + "x" + "</w:tc></w:tr></w:tbl>" * 5_000),
        "traversal.docx": _docx(_paragraph("x"), extra={"../../../../tmp/evil": b"x"}),
        "entries.docx": _docx(_paragraph("x"), extra={f"word/{i}.bin": b"" for i in range(3_000)}),
        "no zip.docx": b"plain text", "cut.docx": _docx(_paragraph("x"))[:-100], "empty.docx": _docx(""),
        "old.docx": bytes.fromhex("d0cf11e0a1b11ae1") + bytes(500), "not word.docx": b"PK\x05\x06" + bytes(18),
    }  # fmt: skip
    for name, content in cases.items():
        _file(landing / "word" / name, content, written)


def _pdfs(landing: Path, written: Written) -> None:
    loop = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[2 0 R]/Count 1>>endobj\n"
    arrays = b"%PDF-1.4\n1 0 obj " + b"[" * 50_000 + b" endobj\n"
    trailer = b"trailer<</Root 1 0 R>>\n%%EOF"
    cases = {
        "no.pdf": b"not a pdf", "head.pdf": b"%PDF-1.7", "loop.pdf": loop + trailer, "arrays.pdf": arrays + trailer,
        "xref.pdf": b"%PDF-1.4\nstartxref\n99999999999\n%%EOF", "random.pdf": b"%PDF-1.4\n" + os.urandom(20_000),
        "nul.pdf": bytes(10_000),
    }  # fmt: skip
    for name, content in cases.items():
        _file(landing / "pdfs" / name, content, written)


def _others(landing: Path, written: Written) -> None:
    """Books, slides, sheets, OpenDocument, messages, notebooks, JSON, compressed files and code."""
    entities = f'<!DOCTYPE x [<!ENTITY l0 "ha">{_LAUGHS}]>'
    nested = "<text:list><text:list-item>" * 3_000 + "x"
    parts = "".join(f'Content-Type: multipart/mixed; boundary="b{i}"\n\n--b{i}\n' for i in range(500))
    deep = b"[" * 200_000
    cases: dict[str, str | bytes] = {
        "good.odt": odt("<text:p>Good.</text:p>"), "nested.odt": odt(nested), "spaces.odt": odt('<text:p>a<text:s text:c="999999999"/>b</text:p>'),
        "laughs.odt": zipped({"content.xml": f"{entities}<x>&l9;</x>"}), "bomb.odt": zipped({"content.xml": b" " * (60 << 20)}),
        "good.pptx": pptx(shape("Good.")), "groups.pptx": pptx("<p:grpSp>" * 5_000 + shape("x")), "no slides.pptx": pptx(),
        "loop.pptx": pptx(shape("x"), notes="<p:grpSp/>"), "laughs.pptx": pptx(shape("&l9;")),
        "good.xlsx": xlsx({"A": [["Good."]]}), "bomb.xlsx": zipped({"xl/workbook.xml": b" " * (60 << 20)}),
        "far.xlsx": xlsx({"A": [["x"]]}).replace(b"A1", b"XFD1048576"), "no.xls": bytes.fromhex("d0cf11e0a1b11ae1") + os.urandom(5000),
        "good.epub": epub("B", {"a.xhtml": "<p>Good.</p>"}, ["a.xhtml"]), "twice.epub": epub("B", {"a": "<p>x</p>" * 100}, ["a"] * 3000),
        "up.epub": epub("B", {"../../../../../etc/passwd": "x"}, ["../../../../../etc/passwd"]), "deep.epub": epub("B", {"a": "<b>" * 9_999}, ["a"]),
        "good.eml": "Subject: Good\n\nGood.", "parts.eml": "Subject: x\nMIME-Version: 1.0\n" + parts, "header.eml": "Subject: " + "x" * 1_000_000,
        "headers.eml": "X: y\n" * 100_000 + "\nbody", "charset.eml": "Subject: =?no-such?B?////?=\n\nx", "cte.eml": "Content-Transfer-Encoding: base64\n\n%%%",
        "good.msg": msg("Good", "Good."), "random.msg": bytes.fromhex("d0cf11e0a1b11ae1") + os.urandom(5000), "cut.msg": msg("a", "b")[:700],
        "good.ipynb": '{"cells": [{"cell_type": "code", "source": "x"}]}', "deep.ipynb": deep, "odd.ipynb": '{"cells": [[], 5, null]}', "list.ipynb": "[]",
        "levels.ipynb": '{"cells": [{"cell_type": "heading", "level": 99999999, "source": "x"}]}', "none.ipynb": '{"cells": null}',
        "deep.json": deep, "braces.json": b'{"a":' * 200_000, "number.json": b"7" * 100_000, "text.json": '"just a text"', "null.json": "null",
        "no.gz": b"no gzip", "bomb.txt.gz": gzip.compress(bytes(90 << 20)),
        "inner.gz.gz": gzip.compress(gzip.compress(b"x")), "no.txt.zst": b"\x28\xb5\x2f\xfd" + os.urandom(300), "cut.md.xz": lzma.compress(b"x" * 9999)[:40],
        "deep.py": "class A:\n" + "".join(f"{' ' * i}class B{i}:\n" for i in range(1, 3000)), "parentheses.c": "(" * 200_000, "nul.js": b"a\0b",
        "braces.java": "class A {" * 50_000, "bytes.rs": b"fn \xff() {}", "line.js": "function f(){return 1}" * 50_000,
    }  # fmt: skip
    for name, content in cases.items():
        _file(landing / "others" / name, content, written)


def _rows(landing: Path, written: Written) -> None:
    lines = [
        '{"text": "Good."}', "[" * 100_000, '{"a":' * 100_000, '{"text": ' + "9" * 100_000 + "}", '{"text": "x", "n": 1e999}',
        '{"text": "x y", "n": ' + "7" * 50_000 + "}", '{"text": "x z", "n": -Infinity, "m": NaN}', '{"text": "a", "text": "b"}',
        '{"text": "\\ud800"}', '{"text": "t", "id": "\\ud800"}', '{"text": "u", "title": "\\udfff"}', '{"text": "v", "id": 1.5}',
        '{"text": "w", "id": [1]}', '{"text": "x1", "id": {"a": 1}}', '{"text": "x2", "id": "a\\nb"}', '{"text": null}',
        '{"text": "x3", "id": "' + "i" * 4000 + '"}', '{"text": true}', '{"text": ["a"]}', "null", "17", '"text"', "{", "}{",
        "\x00", '{"text": "x4", "id": "../../etc"}', '{"text": "x5", "id": "#"}', '{"text": "  "}', '{"txt": "no"}',
        '{"text": "same", "id": 1}', '{"text": "same too", "id": 1}', '{"text": "twice"}', '{"text": "twice"}',
    ]  # fmt: skip
    _file(landing / "rows/nasty.jsonl", "\n".join(lines), written, len(lines))
    # The id of the last row is the key that the second of the two equal texts would get.
    names = '{"text": "a"}\n{"text": "a"}\n{"text": "a", "id": "cb93ddf5ce33cbc0.2"}'
    _file(landing / "rows/names.jsonl", names, written, 3)
    _file(landing / "rows/bytes.jsonl", b'{"text": "\xff"}\n\xef\xbb\xbf{"text": "bom"}', written, 2)
    _file(landing / "rows/empty.jsonl", b"", written)
    _file(landing / "rows/ragged.csv", "id,text\n1,Good row.\n2\n3,a,b,c\n4,Good again.\n", written, 4)
    _file(landing / "rows/header.csv", "id,text\n", written)
    _file(landing / "rows/no column.csv", "a,b\n1,2\n", written)
    _file(landing / "rows/nul.csv", b"id,text\n1,a\0b\n", written)
    _file(landing / "rows/columns.csv", ",".join(["text", *(f"c{i}" for i in range(20_000))]) + "\n", written)
    _file(landing / "rows/twice.csv", "text,text\na,b\n", written)


def _tables(landing: Path, written: Written) -> None:
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["y y " * 250_000]))
    columns: dict[str, pa.Array] = {
        "int": pa.array([1, 2]), "binary": pa.array([b"\xff", b"a"]), "list": pa.array([["a"], ["b"]]), "null": pa.nulls(2),
        "struct": pa.array([{"a": 1}, {"a": 2}]), "large": pa.array(["a", "b"], pa.large_string()), "bool": pa.array([True, False]),
        "bomb": dictionary.cast(pa.string()), "empty": pa.array(["", " "]), "utf8": pa.array([b"\xff\xfe", b"ok"], pa.binary()),
    }  # fmt: skip
    for name, column in columns.items():
        table = pa.table({"text": column, "id": pa.array(range(len(column)))})
        _parquet(landing / f"tables/{name}.parquet", table, written)
    extra = {
        "wide list": pa.array([[0] * 1_000_000] * 30), "nan": pa.array([float("nan")] * 30), "time": pa.array([2**62] * 30, pa.timestamp("us")),
        "map": pa.array([[(1.0, float("inf"))]] * 30, pa.map_(pa.float64(), pa.float64())),
    }  # fmt: skip
    for name, column in extra.items():
        table = pa.table({"text": [f"{name} {i}" for i in range(30)], "more": column})
        _parquet(landing / f"tables/{name}.parquet", table, written)
    good = (landing / "tables/large.parquet").read_bytes()
    _file(landing / "tables/cut.parquet", good[:-20], written)
    _file(landing / "tables/no.parquet", b"PAR1" + bytes(100) + b"PAR1", written)
    _file(landing / "tables/nothing.parquet", b"", written)


def _parquet(path: Path, table: pa.Table, written: Written) -> None:
    data = io.BytesIO()
    pq.write_table(table, data, compression="zstd")
    _file(path, data.getvalue(), written, table.num_rows)


def _links(landing: Path, written: Written) -> None:
    folder = landing / "links"
    folder.mkdir()
    outside = landing.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("must not be read")
    links = {
        "out.txt": outside / "secret.txt", "up.txt": Path("../../outside/secret.txt"), "passwd.txt": Path("/etc/passwd"),
        "nothing.txt": Path("nowhere"), "self.txt": Path("self.txt"), "folder": outside, "zero.txt": Path("/dev/zero"),
        "parent": Path(".."),
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as unix_socket:
        here = Path.cwd()
        os.chdir(folder)  # the path of a Unix socket is limited to about 100 bytes
        unix_socket.bind("socket.txt")
        os.chdir(here)
    written.files += len(links) + 2
    written.items += len(links) + 2
