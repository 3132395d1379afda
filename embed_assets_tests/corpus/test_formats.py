"""Notebooks, slides, sheets, OpenDocument, books, messages, JSON, compressed files and source code."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from email.message import EmailMessage
from pathlib import Path

import pyarrow as pa
import pytest

from embed_assets.corpus.chunking import ChunkOptions, split_documents
from embed_assets.corpus.code import definitions
from embed_assets.corpus.compression import COMPRESSIONS
from embed_assets.corpus.formats.registry import FORMATS
from embed_assets.corpus.items import BadRow
from embed_assets.corpus.sandbox import ParserProcess
from embed_assets.records import Document, Rejection
from embed_assets_tests.corpus.files import epub, msg, odt, pptx, shape, xlsx, zipped
from embed_assets_tests.corpus.test_chunking import tokenizer
from embed_assets_tests.corpus.test_parsing import one, read_file, reason, text


def parse(suffix: str, data: bytes) -> tuple[str, str]:
    parsed = FORMATS[suffix](data)
    return parsed.text, parsed.title


def notebook(*cells: tuple[str, object], **more: object) -> bytes:
    made = [{"cell_type": kind, "source": source, "outputs": [{"text": "NOISE"}]} for kind, source in cells]
    return json.dumps({"cells": made, "metadata": {"language_info": {"name": "python"}}, **more}).encode()


def test_notebooks_without_their_outputs() -> None:
    data = notebook(("markdown", ["# Title\n", "words"]), ("code", "x = 1\n"), ("code", ""), ("raw", "raw"))
    assert parse(".ipynb", data)[0] == "# Title\nwords\n\n```python\nx = 1\n```\n\nraw"
    assert parse(".ipynb", notebook(("code", "'''\n```\n'''")))[0].startswith("````python\n")


def test_notebooks_of_format_3() -> None:
    cells = [
        {"cell_type": "heading", "level": 2, "source": "Old"},
        {"cell_type": "code", "input": ["y"], "outputs": []},
    ]
    assert parse(".ipynb", json.dumps({"worksheets": [{"cells": cells}]}).encode())[0] == "## Old\n\n```\ny\n```"


def test_slides_in_the_presentations_order() -> None:
    cell = "<a:tc><a:txBody><a:p><a:r><a:t>1</a:t></a:r></a:p></a:txBody></a:tc>"
    table = f"<p:graphicFrame><a:tbl><a:tr>{cell}</a:tr></a:tbl></p:graphicFrame>"
    group = f"<p:grpSp>{shape('In a group')}</p:grpSp>"
    number = shape("7", placeholder="sldNum")
    data = pptx(
        shape("Body", "more") + shape("First", placeholder="title") + number + group,
        shape("Second", placeholder="ctrTitle") + table,
        notes=shape("Say this.", placeholder="body") + number,
    )
    assert parse(".pptx", data)[0] == "# First\n\nBody\nmore\n\nIn a group\n\nNotes: Say this.\n\n# Second\n\n| 1 |"


def test_one_branch_of_alternatives_on_a_slide() -> None:
    space = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    branches = f"<mc:Choice>{shape('New')}</mc:Choice><mc:Fallback>{shape('Old')}</mc:Fallback>"
    assert parse(".pptx", pptx(f"<mc:AlternateContent {space}>{branches}</mc:AlternateContent>"))[0] == "New"


def test_sheets_that_are_shown() -> None:
    data = xlsx({"Parts": [["Part", "Load"], ["A-100", 250.0], [None, 2.5, None]], "Notes": [["x"]]}, hidden=["Notes"])
    assert parse(".xlsx", data)[0] == "# Parts\n\n| Part | Load |\n| A-100 | 250 |\n|  | 2.5 |"
    assert parse(".xlsx", xlsx({"A": [["one"]], "Empty": [], "B": [["two"]]}))[0] == "# A\n\n| one |\n\n# B\n\n| two |"


def test_a_sheet_that_spans_millions_of_empty_cells_is_too_large() -> None:
    with zipfile.ZipFile(io.BytesIO(xlsx({"A": [["one"]]}))) as archive:
        files: dict[str, str | bytes] = {name: archive.read(name) for name in archive.namelist()}
    sheet = str(files["xl/worksheets/sheet1.xml"], "utf-8")
    last = '<row r="1000000"><c r="XFD1000000"><v>2</v></c></row>'
    files["xl/worksheets/sheet1.xml"] = sheet.replace("</sheetData>", f"{last}</sheetData>")
    with pytest.raises(BadRow.Error) as caught:
        ParserProcess().parse(".xlsx", zipped(files))
    assert caught.value.row.reason in ("too_large", "too_costly")


def test_opendocument_texts() -> None:
    def cell(content: str) -> str:
        return f"<table:table-cell>{content}</table:table-cell>"

    def row(*cells: str) -> str:
        return f"<table:table-row>{''.join(cells)}</table:table-row>"

    inner = f"<table:table>{row(cell('<text:p>1</text:p>'), cell('<text:p>2</text:p>'))}</table:table>"
    body = (
        "<text:tracked-changes><text:p>deleted</text:p></text:tracked-changes>"
        '<text:h text:outline-level="2">Head</text:h>'
        '<text:p>a<text:s text:c="2"/>b<text:tab/>c<text:note><text:note-citation>1</text:note-citation>'
        "<text:note-body><text:p>Note.</text:p></text:note-body></text:note></text:p>"
        "<text:list><text:list-item><text:p>x</text:p><text:list><text:list-item><text:p>y</text:p></text:list-item>"
        "</text:list></text:list-item></text:list>"
        f"<table:table>{row(cell('<text:p>p</text:p><text:p>q</text:p>'), cell(inner))}</table:table>"
    )
    expected = "## Head\n\na  b\tc[^1]\n\n[^1]: Note.\n\n- x\n  - y\n\n| p q | 1 | 2 |"
    assert parse(".odt", odt(body, "T")) == (expected, "T")
    numbered = "<text:list><text:list-item><text:h>Numbered</text:h></text:list-item></text:list>"
    assert parse(".odt", odt(numbered))[0] == "# Numbered"


def test_books_in_the_order_of_their_spine() -> None:
    pages = {"b.xhtml": "<h1>Two</h1>", "a.xhtml": "<h1>One</h1><p>x</p>", "unused.xhtml": "<p>never</p>"}
    assert parse(".epub", epub("The Book", pages, ["a.xhtml", "b.xhtml"])) == ("# One\n\nx\n\n# Two", "The Book")
    assert parse(".epub", epub("", {"a.xhtml": "<p>x</p>"}, ["a.xhtml", "missing.xhtml"])) == ("x", "")


def message(subject: str, plain: str = "", html: str = "") -> EmailMessage:
    made = EmailMessage()
    made["Subject"], made["From"], made["To"] = subject, "Ada <ada@example.org>", "Bob <bob@example.org>"
    if plain:
        made.set_content(plain)
    if html and plain:
        made.add_alternative(html, subtype="html")
    elif html:
        made.set_content(html, subtype="html")
    return made


def test_messages_with_what_they_forward() -> None:
    outer = message("Fwd: Größe", "See below.\n")
    outer.add_attachment(message("Inner", html="<p>The <b>text</b>.</p>"))
    outer.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="plan.pdf")
    parsed = FORMATS[".eml"](outer.as_bytes())
    assert parsed.title == "Fwd: Größe" and parsed.metadata == {"attachments": "plan.pdf"}
    lines = [line for line in parsed.text.split("\n") if line]
    assert lines == [
        "# Fwd: Größe", "From: Ada <ada@example.org>", "To: Bob <bob@example.org>", "See below.",
        "Inner", "From: Ada <ada@example.org>", "To: Bob <bob@example.org>", "The **text**.",
    ]  # fmt: skip


def test_the_plain_text_of_a_message_counts_once() -> None:
    found = parse(".eml", message("Hi", "plain", "<p>formatted</p>").as_bytes())[0]
    assert "plain" in found and "formatted" not in found
    wrong = b"Subject: x\nContent-Type: text/plain; charset=no-such\n\nna\xc3\xafve words and caf\xc3\xa9s\n"
    assert "naïve words and cafés" in parse(".eml", wrong)[0]


def test_outlook_messages() -> None:
    assert parse(".msg", msg("Größe", "First.\r\nSecond.")) == ("# Größe\n\nFirst.\nSecond.", "Größe")
    with pytest.raises(BadRow.Error) as caught:
        parse(".msg", msg("x", "y")[:600])
    assert caught.value.row.reason == "broken_file"


@pytest.mark.parametrize("suffix", sorted(FORMATS))
@pytest.mark.parametrize(
    "data", [b"no such file", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), zipped({"a": "b"})]
)
def test_other_files_under_a_formats_name_are_rejected(suffix: str, data: bytes, tmp_path: Path) -> None:
    item = one(tmp_path, f"a{suffix}", data)
    if isinstance(item, Rejection):
        assert item.reason in ("broken_file", "encrypted", "undecodable")
    else:
        assert suffix in (".html", ".htm", ".xhtml")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"id": 1, "text": "x"}, {"id": 2, "text": "y"}], {"a.json#1": "x", "a.json#2": "y"}),
        ({"data": [{"id": 1, "text": "x"}], "count": 1}, {"a.json#1": "x"}),
        ({"id": 1, "text": "x", "tags": [{"a": 1}]}, {"a.json#1": "x"}),
    ],
)
def test_json_files(value: object, expected: dict[str, str], tmp_path: Path) -> None:
    items = read_file(tmp_path, "a.json", json.dumps(value).encode("utf-16"))
    assert {name: text(item) for name, item in items.items()} == expected


def test_json_files_that_are_no_documents(tmp_path: Path) -> None:
    items = read_file(tmp_path, "a.json", b'[{"text": "x", "id": 1}, 5, {"other": 1}]')
    assert {name: reason(i) for name, i in items.items() if isinstance(i, Rejection)} == {
        "a.json#row2": "invalid_json", "a.json#row3": "missing_text",
    }  # fmt: skip
    assert reason(read_file(tmp_path, "a.json", b"{no json")["a.json"]) == "invalid_json"
    assert text(read_file(tmp_path, "a.json", b'{"id": 1, "text": "x"}\n{"id": 2, "text": "y"}\n')["a.json#2"]) == "y"


def compress(suffix: str, data: bytes) -> bytes:
    how = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return how[suffix](data) if suffix in how else pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    assert text(one(tmp_path, f"README{suffix}", compress(suffix, b"plain words"))) == "plain words"
    (tmp_path / f"README{suffix}").unlink()
    assert text(one(tmp_path, f"a.md{suffix}", compress(suffix, b"# Head"))) == "# Head"
    (tmp_path / f"a.md{suffix}").unlink()
    rows = read_file(tmp_path, f"a.csv{suffix}", compress(suffix, b"id,text\n1,x\n2,y\n"))
    assert {name: text(item) for name, item in rows.items()} == {f"a.csv{suffix}#1": "x", f"a.csv{suffix}#2": "y"}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_broken_and_hostile_compressed_files(suffix: str, tmp_path: Path) -> None:
    whole = compress(suffix, b"id,text\n" + b"1,x\n" * 1000)
    for data in (b"no such file", whole[: len(whole) // 2], whole[:-3]):
        items = read_file(tmp_path, f"a.csv{suffix}", data).values()
        assert "broken_file" in [i.reason for i in items if isinstance(i, Rejection)]
    (tmp_path / f"a.csv{suffix}").unlink()
    bomb = compress(suffix, bytes(80 << 20))
    assert reason(one(tmp_path, f"a.txt{suffix}", bomb)) == "too_large"


PYTHON = '''"""Doc."""
import os

# About the class.
@decorated
class Store:
    """A store."""

    def get(self, key):
        return self.data[key]

    # Says é.
    async def put(self, key, value):
        self.data[key] = value

LIMIT = 5

def main():
    pass
'''


def test_classes_and_functions_of_code_are_its_headings() -> None:
    found = [(PYTHON[d.start :].split("\n")[0], d.depth, d.name) for d in definitions(PYTHON, "text/x-python")]
    assert found == [
        ("# About the class.", 1, "Store"), ("    def get(self, key):", 2, "get"), ("    # Says é.", 2, "put"),
        ("LIMIT = 5", 1, ""), ("def main():", 1, "main"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("media_type", "code", "names"),
    [
        ("text/x-javascript", "export class A { m() {} }\nconst f = (x) => x;\nfunction g() {}", ["A", "m", "f", "g"]),
        ("text/x-c", "#ifndef X\nstatic int *f(int a) { return 0; }\nstruct s { int x; };\n#endif", ["f", "s"]),
        (
            "text/x-c++",
            "namespace n { template <class T> class C { void m() {} }; }\nint C::k() {}",
            ["n", "C", "m", "C::k"],
        ),
        ("text/x-rust", "/// Doc.\nimpl Trait for S { fn a(&self) {} }\nmod m { fn b() {} }", ["S", "a", "m", "b"]),
        ("text/x-go", "type T struct{}\nfunc (t T) M() {}\nfunc F() {}", ["T", "M", "F"]),
        ("text/x-java", "class A { void m() {} class B { int n() { return 1; } } }", ["A", "m", "B", "n"]),
        ("text/x-ruby", "module M\n  class C\n    def m; end\n  end\nend", ["M", "C", "m"]),
        ("text/x-code", "CREATE TABLE t (x int);", []),
    ],
)
def test_definitions_in_other_languages(media_type: str, code: str, names: list[str]) -> None:
    assert [found.name for found in definitions(code, media_type) if found.name] == names


def test_code_is_cut_at_definitions_and_lines_and_named_by_its_module() -> None:
    body = "\n".join(f"        self.step({i}, 'with words in it')" for i in range(12))
    code = f"class Engine:\n    def start(self):\n{body}\n\n    def stop(self):\n{body}\n"
    [chunks] = split_documents([(code, "text/x-python", "motor")], tokenizer("words"), ChunkOptions(60))
    paths = [c.heading_path for c in chunks]
    assert set(paths) == {"motor > Engine > start", "motor > Engine > stop"} and paths == sorted(paths)
    assert all(code[: c.char_start].rsplit("\n", 1)[-1].strip() == "" for c in chunks), "chunks begin lines"


def test_source_files_are_documents(tmp_path: Path) -> None:
    item = one(tmp_path, "motor.py", PYTHON.encode())
    assert isinstance(item, Document) and (item.media_type, item.title) == ("text/x-python", "motor.py")
    (tmp_path / "motor.py").unlink()
    assert text(one(tmp_path, "query.sql", b"SELECT 1;")) == "SELECT 1;"
