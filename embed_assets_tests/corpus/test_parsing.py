"""Every file becomes documents or rejections with a reason, never an exception and never mojibake."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_assets.corpus.encoding import Undecodable, decode
from embed_assets.corpus.options import ParseOptions
from embed_assets.corpus.parsing import REASONS, SUPPORTED_SUFFIXES, read_documents
from embed_assets.corpus.source import Source
from embed_assets.records import Document, Rejection

OPTIONS = ParseOptions(max_file_bytes=200_000)


def read(root: Path, options: ParseOptions = OPTIONS, partition_by: str = "folder") -> dict[str, Document | Rejection]:
    """All documents and rejections of all partitions, by id."""
    source = Source(str(root), partition_by)
    items = [item for p in source.partitions().values() for item in read_documents(source, p, options)]
    assert len({item.document_id for item in items}) == len(items)
    assert all(item.reason in REASONS and "\n" not in item.detail for item in items if isinstance(item, Rejection))
    return {item.document_id: item for item in items}


def one(root: Path, name: str, data: bytes, options: ParseOptions = OPTIONS) -> Document | Rejection:
    """The only item of a corpus that is this one file."""
    (root / name).write_bytes(data)
    items = read(root, options)
    assert len(items) == 1
    return next(iter(items.values()))


def reason(item: Document | Rejection) -> str:
    assert isinstance(item, Rejection), item
    return item.reason


def text(item: Document | Rejection) -> str:
    assert isinstance(item, Document), item
    return item.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_with_and_without_mark(tmp_path: Path, encoding: str) -> None:
    assert (
        text(one(tmp_path, "a.txt", "Zażółć gęślą jaźń 東京\r\nnext".encode(encoding)))
        == "Zażółć gęślą jaźń 東京\nnext"
    )


@pytest.mark.parametrize(
    ("encoding", "sample"),
    [
        (
            "cp1252",
            "Le café est fermé à Noël, « désolé » pour la gêne. L’été, ça ira mieux. " * 8,
        ),
        (
            "cp1251",
            "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 8,
        ),
        ("iso2022_jp", "日本語の文章をここに書きます。"),
        ("cp1252", "We met at the café yesterday, and it was a long evening of talk about the weather.\n" * 30),
        ("koi8-r", "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 8),
        (
            "cp1250",
            "Zażółć gęślą jaźń. Pójdź, kińże tę chmurność w głąb flaszy! Litwo, ojczyzno moja, jesteś jak zdrowie. ",
        ),
        ("shift_jis", "日本語の文章をここに書きます。東京は日本の首都であり、人口が最も多い都市です。" * 8),
        (
            "cp1250",
            "Včera večer jsme šli do divadla, abychom viděli novou hru. Byla velmi zajímavá, děti tleskaly. " * 3,
        ),
        ("iso8859-2", "Tegnap este megnéztük az új színdarabot, és nagyon élveztük. Az előadás után sétáltunk. " * 3),
        ("cp852", "Wczoraj wieczorem poszliśmy do teatru, żeby zobaczyć nową sztukę. Było bardzo ciekawie. " * 3),
        ("cp1254", "Dün akşam arkadaşlarımla güzel bir yemeğe gittik. Şehrin ışıkları çok parlaktı. " * 3),
        ("cp1257", "Vakar vakarā mēs gājām uz teātri, lai noskatītos jauno izrādi. Tā bija ļoti interesanta. " * 3),
        ("cp1253", "Χθες το βράδυ πήγαμε στο θέατρο για να δούμε τη νέα παράσταση. Ήταν πολύ ωραία. " * 3),
        ("cp1255", "אתמול בערב הלכנו לתיאטרון לראות את ההצגה החדשה. היה מעניין מאוד ויפה. " * 3),
        ("cp1256", "ذهبنا مساء أمس إلى المسرح لمشاهدة المسرحية الجديدة، وكانت جميلة جدا وممتعة. " * 3),
        ("cp874", "เมื่อวานนี้เราไปดูละครเรื่องใหม่ที่โรงละคร สนุกมากและน่าสนใจ " * 3),
        ("cp949", "어제 저녁에 우리는 새로운 연극을 보러 극장에 갔습니다. 정말 재미있었습니다. " * 3),
        ("euc_jp", "昨日の夜、私たちは新しい芝居を見に劇場へ行きました。とても面白かったです。" * 3),
        ("big5", "昨天晚上我們去劇院看了一齣新戲，非常有趣，大家都很喜歡。" * 3),
        ("gb18030", "昨天晚上我们去剧院看了一出新戏，非常有趣，大家都很喜欢。" * 3),
        ("cp866", "Вчера вечером мы ходили в театр смотреть новую пьесу. Было очень интересно. " * 3),
        (
            "mac_roman",
            "Gestern Abend gingen wir ins Theater, um das neue Stück zu sehen. Es war sehr schön für alle. " * 3,
        ),
        ("cp1252", "Größe und Maße prüfen: der Fuß ist nicht größer als die Länge der Tür."),
    ],
)
def test_other_encodings_are_detected_and_named(tmp_path: Path, encoding: str, sample: str) -> None:
    item = one(tmp_path, "a.txt", sample.encode(encoding))
    assert text(item) == sample
    assert isinstance(item, Document)
    assert json.loads(item.metadata)["encoding"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (bytes(range(256)) * 4, "undecodable"),
        (bytes(range(128)), "undecodable"),
        ("Привет, мир".encode("utf-16-le"), "undecodable"),
        ("Die Straße führt über die Brücke. ".encode() * 20 + b"\xff", "undecodable"),
        (b"\xff\xfeabc", "undecodable"),
        (b"good \xc3\x28 bad \x00\x81 worse", "undecodable"),
        (b"x" * 200_001, "too_large"),
    ],
)
def test_files_that_are_not_text(tmp_path: Path, data: bytes, expected: str) -> None:
    assert reason(one(tmp_path, "a.md", data)) == expected


def test_unknown_suffixes_are_rejected_by_name(tmp_path: Path) -> None:
    item = one(tmp_path, "photo.png", b"\x89PNG")
    assert reason(item) == "unsupported_format"
    assert isinstance(item, Rejection)
    assert ".png" in item.detail


def test_titles(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\n# The Title #\n\ntext")
    (tmp_path / "b.rst").write_text("The Title\n=========\n\ntext")
    (tmp_path / "c.txt").write_text("text")
    (tmp_path / "d.html").write_text("<title>The Title</title><p>text")
    titles = {k: v.title for k, v in read(tmp_path).items() if isinstance(v, Document)}
    assert titles == {"a.md": "The Title", "b.rst": "The Title", "c.txt": "c.txt", "d.html": "The Title"}


def test_html_becomes_markdown_with_its_headings_and_code(tmp_path: Path) -> None:
    page = "<html><head><style>p{}</style><script>alert(1)</script></head><h1>Top</h1><p>A&nbsp;&lt;b&gt;"
    page += "<h2>Sub</h2><pre><code>x = 1\n\ny = 2</code></pre>"
    found = text(one(tmp_path, "a.html", page.encode()))
    assert "# Top" in found and "## Sub" in found and "x = 1\n\ny = 2" in found and "<b>" in found
    assert "alert" not in found and "p{}" not in found


def test_html_may_declare_its_charset(tmp_path: Path) -> None:
    page = "<html><meta charset='iso-8859-2'><p>Zażółć gęślą jaźń"
    assert "Zażółć gęślą jaźń" in text(one(tmp_path, "a.html", page.encode("iso-8859-2")))


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (b"<meta charset=iso-8859-1><p>He said \x93hi\x94 \x96 \xe9", "He said “hi” – é"),
        (b"<meta charset=gb2312><p>" + "北京是中国的首都".encode("gbk"), "北京是中国的首都"),
        (b"<meta charset=utf-8><p>caf\xe9", None),
        (b"<meta charset=undefined><p>caf\xe9", None),
        (b"<meta charset=utf-16le><p>caf\xe9!", None),
        (b"<hr><p>first section</p><hr><p>rest</p>", "---\n\nfirst section\n\n---\n\nrest"),
        (b"<p>intro</p>" + b"<div>" * 2000 + b"THE WHOLE ARTICLE " * 50, None),
    ],
)
def test_html_in_the_wild(tmp_path: Path, page: bytes, expected: str | None) -> None:
    item = one(tmp_path, "a.html", page)
    if expected is None:
        assert reason(item) in ("undecodable", "broken_file")
        assert isinstance(item, Rejection) and "0x" not in item.detail
    else:
        assert text(item).strip() == expected


def test_html_titles_are_unescaped(tmp_path: Path) -> None:
    item = one(tmp_path, "a.html", b"<title>It's \n &quot;a&quot; &amp; b</title><p>x")
    assert isinstance(item, Document)
    assert item.title == 'It\'s "a" & b'


def test_deeply_nested_html_is_rejected_quickly(tmp_path: Path) -> None:
    options = ParseOptions(max_file_bytes=10 << 20)
    assert reason(one(tmp_path, "a.html", b"<div>" * 100_000 + b"x" + b"</div>" * 100_000, options)) in REASONS


def jsonl(*lines: str) -> bytes:
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    data = jsonl('{"id": 7, "text": "One", "title": "T", "lang": "en"}', "", '{"text": "Two"}', '{"text": "Two"}')
    items = read_file(tmp_path, "a.jsonl", data)
    assert [text(i) for i in items.values()] == ["One", "Two", "Two"]
    first = items["a.jsonl#7"]
    assert isinstance(first, Document)
    assert (first.title, first.metadata) == ("T", '{"lang": "en"}')


def read_file(root: Path, name: str, data: bytes, options: ParseOptions = OPTIONS) -> dict[str, Document | Rejection]:
    (root / name).write_bytes(data)
    return read(root, options)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark(tmp_path: Path, encoding: str) -> None:
    assert text(one(tmp_path, "a.txt", "Größe und Maß\r\nnext".encode(encoding))) == "Größe und Maß\nnext"
    (tmp_path / "a.txt").unlink()
    items = read_file(tmp_path, "a.jsonl", '{"id": 1, "text": "Größe"}\n{"id": 2, "text": "Maß"}\n'.encode(encoding))
    assert [text(item) for item in items.values()] == ["Größe", "Maß"]
    (tmp_path / "a.jsonl").unlink()
    assert text(read_file(tmp_path, "a.csv", "id,text\n1,Größe\n".encode(encoding))["a.csv#1"]) == "Größe"


def test_bad_jsonl_lines_are_rejected_one_by_one(tmp_path: Path) -> None:
    data = jsonl(
        "no json",
        '["a list"]',
        '{"other": 1}',
        '{"text": 5}',
        '{"text": null}',
        '{"text": "  "}',
        '{"text": "\\ud800"}',
        '{"id": 1, "text": "good"}',
        '{"id": 1, "text": "again"}',
        '{"id": 2, "text": "huge", "n": ' + "9" * 5000 + "}",
        "[" * 100_000,
    )
    items = read_file(tmp_path, "a.jsonl", data + b"\n\xff\xfe{}")
    reasons = sorted(i.reason for i in items.values() if isinstance(i, Rejection))
    assert reasons == sorted(
        ["invalid_json"] * 3 + ["missing_text"] * 2 + ["empty"] * 2 + ["invalid_unicode", "duplicate_id", "undecodable"]
    )
    assert sorted(i.text for i in items.values() if isinstance(i, Document)) == ["good", "huge"]


def test_overlong_jsonl_lines_are_skipped(tmp_path: Path) -> None:
    data = jsonl('{"text": "before"}', '{"text": "' + "x" * 300_000 + '"}', '{"text": "after"}')
    items = read_file(tmp_path, "a.jsonl", data)
    assert sorted(i.text for i in items.values() if isinstance(i, Document)) == ["after", "before"]
    assert [i.reason for i in items.values() if isinstance(i, Rejection)] == ["too_large"]


def test_csv_rows_are_documents(tmp_path: Path) -> None:
    data = 'id,text,lang\n1,"Hello, ""world""\nsecond line",en\n2,Grüße,de\n'.encode("utf-8-sig")
    items = read_file(tmp_path, "a.csv", data)
    assert text(items["a.csv#1"]) == 'Hello, "world"\nsecond line'
    assert text(items["a.csv#2"]) == "Grüße"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"id,body\n1,x\n", ["missing_text"]),
        (b"id,text\n", ["empty"]),
        (b"id,text\n1,a,extra\n2,ok\n3\n", ["invalid_row", "invalid_row"]),
        (b'id,text\n1,"' + b"x\n" * 125_000 + b'99,no row\n"\n', ["too_large"]),
        (b'id,text\n1,"never closed\n2,second\n', ["invalid_row"]),
        (b'"' + b"x" * 250_000 + b'",text\n1,a\n', ["broken_file"]),
    ],
)
def test_bad_csv(tmp_path: Path, data: bytes, expected: list[str]) -> None:
    items = read_file(tmp_path, "a.csv", data)
    assert [i.reason for i in items.values() if isinstance(i, Rejection)] == expected


def documents(items: dict[str, Document | Rejection]) -> dict[str, str]:
    return {key: item.text for key, item in items.items() if isinstance(item, Document)}


@pytest.mark.parametrize(
    "content",
    [
        "id;text;title\n1;Bitte öffnen, danke;A\n2;Schließen;B\n",
        "id\ttext\ttitle\n1\tBitte öffnen, danke\tA\n2\tSchließen\tB\n",
        "id|text|title\n1|Bitte öffnen, danke|A\n2|Schließen|B\n",
        "sep=;\nid;text;title\n1;Bitte öffnen, danke;A\n2;Schließen;B\n",
        'id,text,title\n1,"Bitte öffnen, danke",A\n2,Schließen,B\n',
        '"a, b";"id";"text";"title"\n;1;"Bitte öffnen, danke";A\n;2;Schließen;B\n',
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_values_separated_by_other_characters(tmp_path: Path, content: str, name: str) -> None:
    found = read_file(tmp_path, name, content.encode())
    assert documents(found) == {f"{name}#1": "Bitte öffnen, danke", f"{name}#2": "Schließen"}


def test_one_bad_byte_costs_its_row(tmp_path: Path) -> None:
    rows = [f"{i},Zeile {i} für Übung\n".encode() for i in range(200)]
    rows[100] = rows[100].replace("Ü".encode(), b"\xdc")
    found = read_file(tmp_path, "a.csv", b"id,text\n" + b"".join(rows))
    assert len(documents(found)) == 199 and found["a.csv#7"]
    assert reason(found["a.csv#row102"]) == "undecodable"


def test_a_bad_byte_far_from_the_start_costs_its_row_too(tmp_path: Path) -> None:
    rows = b"".join(b"%d,%s\n" % (i, ("Füller " * 40).encode()) for i in range(2000))
    found = read_file(tmp_path, "a.csv", b"id,text\n" + rows + b"x,\xff\nlast,fin\n")
    assert len(documents(found)) == 2001 and found["a.csv#last"]


def test_columns_of_one_name_are_not_half_read(tmp_path: Path) -> None:
    found = read_file(tmp_path, "a.csv", b"id,text,text\n1,one,two\n")
    assert [reason(item) for item in found.values()] == ["broken_file"]
    assert "'text'" in str(found)


def test_the_lines_of_a_badly_quoted_field_are_no_documents(tmp_path: Path) -> None:
    content = 'id,text\n1,"He wrote "no" first.\nBerlin, where he lived\nthen left."\n2,fine\n'
    found = read_file(tmp_path, "a.csv", content.encode())
    assert documents(found) == {"a.csv#2": "fine"}
    assert [reason(item) for item in found.values() if isinstance(item, Rejection)] == ["invalid_row"]


def test_a_stray_quotation_mark_costs_its_row_alone(tmp_path: Path) -> None:
    rows = "".join(f"{i},row {i}\n" for i in range(50))
    found = read_file(tmp_path, "a.csv", f'id,text\nx,"5" pipe"\n{rows}'.encode())
    assert len(documents(found)) == 50


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1251", "cp932"])
def test_jsonl_encodings(tmp_path: Path, encoding: str) -> None:
    samples = {"cp1251": "Вчера вечером мы ходили в театр смотреть новую пьесу", "cp932": "昨日の夜、劇場へ行きました"}
    sample = samples.get(encoding, "Die Straße führt über die Brücke nach Süden")
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    lines = "".join(json.dumps({"id": i, "text": f"{sample} {i}"}, ensure_ascii=False) + "\r\n" for i in range(30))
    found = read_file(tmp_path, "a.jsonl", (mark + lines).encode(encoding))
    assert documents(found) == {f"a.jsonl#{i}": f"{sample} {i}" for i in range(30)}


@pytest.mark.parametrize("name", ["a.markdown", "a.MDX", "a.qmd"])
def test_names_of_markdown(tmp_path: Path, name: str) -> None:
    item = one(tmp_path, name, b"# Top\n\ntext")
    assert isinstance(item, Document) and (item.media_type, item.title) == ("text/markdown", "Top")


@pytest.mark.parametrize("name", ["README", "License", "a.log", "a.text", "a.srt", "a.vtt"])
def test_names_of_plain_text(tmp_path: Path, name: str) -> None:
    item = one(tmp_path, name, b"some text")
    assert isinstance(item, Document) and (item.media_type, item.title) == ("text/plain", name)


def test_ndjson_and_xhtml_by_their_names(tmp_path: Path) -> None:
    assert documents(read_file(tmp_path, "a.ndjson", b'{"id": 1, "text": "one"}')) == {"a.ndjson#1": "one"}
    page = tmp_path / "page"
    page.mkdir()
    assert "# Top" in text(one(page, "a.xhtml", b"<html><body><h1>Top</h1><p>x</p></body></html>"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig", "cp1252"])
def test_csv_encodings(tmp_path: Path, encoding: str) -> None:
    words = "Le café est fermé à Noël, et il neige sur la ville depuis hier. "
    data = "".join(f'{i},"{words}"\r\n' for i in range(20))
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    items = read_file(tmp_path, "a.csv", (mark + "id,text\r\n" + data).encode(encoding))
    assert {text(i) for i in items.values()} == {words}


def test_line_ends_in_rows_are_normalized(tmp_path: Path) -> None:
    items = read_file(tmp_path, "a.jsonl", jsonl('{"text": "one\\r\\n\\r\\ntwo"}'))
    assert [text(i) for i in items.values()] == ["one\n\ntwo"]


def test_many_equal_rows_are_numbered_in_linear_time(tmp_path: Path) -> None:
    """Comparing each row with all earlier ones took minutes for these twenty thousand."""
    items = read_file(tmp_path, "a.jsonl", b'{"text": "N/A"}\n' * 20_000)
    assert len(items) == 20_000


def test_metadata_is_json(tmp_path: Path) -> None:
    items = read_file(
        tmp_path, "a.jsonl", jsonl('{"id": 1, "text": "a", "x": NaN, "y": [1e999], "z": {"w": -Infinity}}')
    )
    item = items["a.jsonl#1"]
    assert isinstance(item, Document)
    assert json.loads(item.metadata, parse_constant=pytest.fail) == {"x": None, "y": [None], "z": {"w": None}}


def test_jsonl_nested_to_any_depth(tmp_path: Path) -> None:
    lines = [f'{{"text": "t", "x": {"[" * n}{"]" * n}}}' for n in range(900, 1000, 5)]
    assert len(read_file(tmp_path, "a.jsonl", jsonl(*lines))) == len(lines)


def parquet(**columns: list[object]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    items = read_file(tmp_path, "a.parquet", parquet(id=[1, 2], text=["One", None], tags=[["a"], []]))
    assert text(items["a.parquet#1"]) == "One"
    assert reason(items["a.parquet#2"]) == "empty"


def test_odd_values_in_other_columns_do_not_lose_the_text(tmp_path: Path) -> None:
    columns = {
        "text": ["one", "two"],
        "ns": pa.array([1, 2**62], pa.timestamp("ns")),
        "zone": pa.array([1, 2], pa.timestamp("us", "Mars/Base")),
        "date": pa.array([2**30, 1], pa.date32()),
    }
    items = read_file(tmp_path, "a.parquet", parquet(**columns))  # type: ignore[arg-type]
    assert sorted(text(i) for i in items.values()) == ["one", "two"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"PAR1 no parquet", "broken_file"),
        (parquet(body=["x"]), "missing_text"),
        (parquet(text=[5]), "missing_text"),
        (parquet(text=[b"\xff"]), "missing_text"),
        (parquet(text=[]), "empty"),
    ],
)
def test_bad_parquet(tmp_path: Path, data: bytes, expected: str) -> None:
    items = read_file(tmp_path, "a.parquet", data)
    assert [reason(i) for i in items.values()] == [expected]


def docx_bytes() -> bytes:
    import docx

    document = docx.Document()
    document.core_properties.title = "The Title"
    document.add_heading("Chapter", 1)
    document.add_paragraph("Some words.")
    document.add_paragraph("An item", style="List Bullet")
    table = document.add_table(rows=1, cols=2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    sink = io.BytesIO()
    document.save(sink)
    return sink.getvalue()


def pdf_bytes(words: str = "Hello PDF world") -> bytes:
    """A minimal PDF of one page with these words."""
    content = f"BT /F1 12 Tf 72 720 Td ({words}) Tj ET".encode() if words else b""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
    ]
    out, offsets = b"%PDF-1.4\n", []
    for i, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (i, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = b"trailer\n<< /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(out)
    return out + b"xref\n0 5\n0000000000 65535 f \n" + table + trailer


def test_word_documents_become_markdown(tmp_path: Path) -> None:
    item = one(tmp_path, "a.docx", docx_bytes())
    assert text(item) == "# Chapter\n\nSome words.\n\n- An item\n\n| left | right |"
    assert isinstance(item, Document)
    assert (item.title, item.media_type) == ("The Title", "text/markdown")


def test_word_documents_with_content_controls_and_tracked_changes(tmp_path: Path) -> None:
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    body = f"""<w:document {space}><w:body>
        <w:sdt><w:sdtContent><w:p><w:r><w:t>control</w:t></w:r></w:p></w:sdtContent></w:sdt>
        <w:p><w:ins><w:r><w:t>inserted</w:t></w:r></w:ins><w:del><w:r><w:delText>deleted</w:delText></w:r></w:del></w:p>
        <w:tbl><w:tr><w:tc><w:tbl><w:tr><w:tc><w:p><w:r><w:t>nested</w:t></w:r></w:p></w:tc></w:tr></w:tbl></w:tc></w:tr></w:tbl>
        {"<w:p/>" * 20_000}</w:body></w:document>"""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(docx_bytes())) as old, zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, body if name == "word/document.xml" else old.read(name))
    found = text(one(tmp_path, "a.docx", sink.getvalue()))
    assert "control" in found and "inserted" in found and "nested" in found and "deleted" not in found


@given(places=st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_office_files_with_flipped_bits_never_raise(
    tmp_path_factory: pytest.TempPathFactory, places: list[int]
) -> None:
    root = tmp_path_factory.mktemp("bits")
    for name, whole in (("a.docx", docx_bytes()), ("a.pdf", pdf_bytes())):
        data = bytearray(whole)
        for place in places:
            data[place % len(data)] ^= 1 << place % 8
        (root / name).write_bytes(data)
    assert len(read(root)) == 2


def test_pdf_text(tmp_path: Path) -> None:
    assert text(one(tmp_path, "a.pdf", pdf_bytes())) == "Hello PDF world"


def zipped(name: str, data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.pdf", b"%PDF-1.4 broken", "broken_file"),
        ("a.pdf", b"no pdf at all", "broken_file"),
        ("a.pdf", pdf_bytes()[:-120], "broken_file"),
        ("a.pdf", pdf_bytes(""), "empty"),
        ("a.docx", b"PK no zip", "broken_file"),
        ("a.docx", zipped("x", b"y"), "broken_file"),
        ("a.docx", docx_bytes()[:-200], "broken_file"),
        ("a.docx", zipped("word/document.xml", b"\0" * (40 << 20)), "too_large"),
        ("a.docx", bytes.fromhex("d0cf11e0a1b11ae1") + b"old or encrypted", "encrypted"),
        ("a.docx", docx_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"), "broken_file"),
    ],
)
def test_broken_office_files(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    options = ParseOptions(max_file_bytes=10 << 20)
    if data == pdf_bytes()[:-120]:  # the parser may also repair what was cut off
        item = one(tmp_path, name, data, options)
        assert isinstance(item, Document) or item.reason == expected
    else:
        assert reason(one(tmp_path, name, data, options)) == expected


def test_links_and_special_files(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    root = tmp_path / "landing"
    (root / "folder").mkdir(parents=True)
    (root / "folder/real.txt").write_text("real")
    os.symlink(outside, root / "out.txt")
    os.symlink(tmp_path, root / "out")
    os.symlink("loop.txt", root / "loop.txt")
    os.symlink("nothing", root / "dangling.txt")
    os.symlink("folder", root / "alias")
    os.symlink("folder/real.txt", root / "inside.txt")
    os.mkfifo(root / "pipe.txt")
    os.symlink("pipe.txt", root / "to_pipe.txt")
    items = read(root)
    reasons = {k: v.reason for k, v in items.items() if isinstance(v, Rejection)}
    assert reasons == {
        "out.txt": "symlink_outside",
        "out": "symlink_outside",
        "loop.txt": "broken_link",
        "dangling.txt": "broken_link",
        "alias": "symlink_to_folder",
        "pipe.txt": "not_a_file",
        "to_pipe.txt": "not_a_file",
    }
    assert text(items["inside.txt"]) == text(items["real.txt"]) == "real"


@given(data=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_data_is_decoded_correctly_or_rejected(data: bytes) -> None:
    try:
        decoded, encoding = decode(data)
    except Undecodable:
        return
    assert isinstance(decoded, str)
    if encoding == "utf-8":
        assert decoded == data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


@given(
    data=st.binary(max_size=200),
    suffix=st.sampled_from(SUPPORTED_SUFFIXES),
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_become_documents_or_rejections(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / f"a{suffix}").write_bytes(data)
    assert read(root)
