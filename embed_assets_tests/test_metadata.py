"""Metadata that becomes columns, and permissions: from the source to search results."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st

from embed_assets import read_embeddings, search
from embed_assets.corpus.formats.properties import open_document_properties, pdf_properties
from embed_assets.errors import SettingsError
from embed_assets.metadata import MetadataField, parse_fields, values_of
from embed_assets.settings import load_settings
from embed_assets_tests.conftest import Project

FIELDS = "author:string, year:int, tags:list<string>, acl:list<string>"


def row(name: str, text: str, **values: Any) -> str:
    return json.dumps({"id": name, "text": text, **values}) + "\n"


@pytest.fixture
def corpus(project: Project) -> Project:
    """Rows and a document with front matter, read without metadata."""
    project.write("a/rows.jsonl", row("r1", "One text.", author="Ann", year=2020, acl=["hr"]) + row("r2", "Two texts."))
    project.write("b/note.md", "---\nauthor: Bob\ntags: [x, y]\nacl: all\n---\nA note.\n")
    project.sync()
    return project


def values(project: Project, table: str = "embeddings") -> dict[str, dict[str, Any]]:
    """Metadata of each document in a table."""
    names = [f"meta_{field.name}" for field in parse_fields(load_settings().metadata)]
    return {each.pop("document_id"): each for each in project.rows("document_id", *names, table=table)}


def commits(project: Project) -> dict[str, int]:
    """Versions of the tables."""
    pipeline = project.pipeline()
    found = {name: DeltaTable(f"{pipeline.lake.root}/{name}") for name in ("raw_documents", "chunks")}
    found["embeddings"] = DeltaTable(pipeline.lake.uri(pipeline.embeddings_table))
    return {name: table.version() for name, table in found.items()}


def test_fields_become_typed_columns_of_existing_tables_without_embedding(corpus: Project) -> None:
    corpus.set(METADATA=FIELDS)
    reasons = [row["assets"]["raw_documents"]["reasons"] for row in corpus.json("plan")["partitions"]]
    expected = "the parser or its settings: EMBED_METADATA adds author:string"
    assert all(expected in reason for each in reasons for reason in each)
    assert corpus.sync()["embedded"] == 0
    for table in ("raw_documents", "chunks", "embeddings"):
        assert values(corpus, table) == {
            "rows.jsonl#r1": {"meta_author": "Ann", "meta_year": 2020, "meta_tags": None, "meta_acl": ["hr"]},
            "rows.jsonl#r2": dict.fromkeys(["meta_author", "meta_year", "meta_tags", "meta_acl"]),
            "note.md": {"meta_author": "Bob", "meta_year": None, "meta_tags": ["x", "y"], "meta_acl": ["all"]},
        }
    assert {row["state"] for row in corpus.sync()["partitions"].values()} == {"fresh"}
    assert corpus.run("verify").exit_code == 0


def test_changing_only_metadata_embeds_nothing_and_commits_once_per_partition(corpus: Project) -> None:
    corpus.set(METADATA=FIELDS)
    corpus.sync()
    before = commits(corpus)
    corpus.write("a/rows.jsonl", row("r1", "One text.", author="Ann", year=2021, acl=["it"]) + row("r2", "Two texts."))
    done = corpus.sync()
    assert done["embedded"] == 0 and done["partitions"]["b"]["state"] == "fresh"
    assert values(corpus)["rows.jsonl#r1"]["meta_year"] == 2021
    assert commits(corpus) == {name: version + 1 for name, version in before.items()}
    assert {row["state"] for row in corpus.sync()["partitions"].values()} == {"fresh"}


def test_a_dropped_field_is_null_from_then_on_and_a_new_one_is_added(corpus: Project) -> None:
    corpus.set(METADATA="year:int")
    corpus.sync()
    corpus.set(METADATA="author:string")
    assert "the parser or its settings: EMBED_METADATA drops year:int, adds author:string" in corpus.run("plan").stdout
    assert corpus.sync()["embedded"] == 0
    assert values(corpus)["rows.jsonl#r1"] == {"meta_author": "Ann"}
    pipeline = corpus.pipeline()
    table = DeltaTable(pipeline.lake.uri(pipeline.embeddings_table))
    assert set(pa.table(table.to_pyarrow_table())["meta_year"].to_pylist()) == {None}
    corpus.set(METADATA="")
    assert corpus.sync()["embedded"] == 0
    assert {row["state"] for row in corpus.sync()["partitions"].values()} == {"fresh"}


def test_the_plan_says_what_else_changed_of_fields_and_parser(corpus: Project) -> None:
    corpus.set(METADATA="year:int,author:string")
    corpus.sync()
    corpus.set(METADATA="author:string,year:int")
    assert "EMBED_METADATA has another order" in corpus.run("plan").stdout
    corpus.set(METADATA="year:int,author:string", TEXT_COLUMN="author")
    assert "the parser or its settings" in corpus.run("plan").stdout


def test_a_value_of_another_type_is_a_rejection_with_the_rows_name(corpus: Project) -> None:
    corpus.set(METADATA=FIELDS)
    corpus.write("c/rows.jsonl", row("good", "Fine.", year=1) + row("bad", "Not fine.", year="soon"))
    assert corpus.sync()["partitions"]["c"]["rejected"] == 1
    [rejected] = [each for each in corpus.json("rejected")["rejected"] if each["reason"] == "wrong_metadata"]
    assert rejected["document_id"] == "rows.jsonl#bad"
    assert "'year' must be int, got 'soon'" in rejected["detail"]


def test_a_columns_type_cannot_change(corpus: Project) -> None:
    corpus.set(METADATA="year:int")
    corpus.sync()
    corpus.set(METADATA="year:string")
    assert "meta_year" in corpus.json("sync", exit_code=1)["error"]


def test_spaces_that_are_kept_up_to_date_have_the_columns_too(corpus: Project) -> None:
    corpus.set(MODEL="fake:24@new", METADATA="year:int")
    corpus.sync()
    active = read_embeddings()
    assert active.arrow().schema.field("meta_year").type == pa.int64()
    assert sorted(active.arrow(["meta_year"]).read_all()["meta_year"].to_pylist(), key=str) == [2020, None, None]


def test_search_filters_by_metadata_and_shows_it(corpus: Project) -> None:
    corpus.set(METADATA=FIELDS)
    corpus.sync()
    [found] = corpus.json("search", "x", "--where", "year >= 2020 and author = 'Ann'")["results"]
    assert found["metadata"] == {"author": "Ann", "year": 2020, "tags": None, "acl": ["hr"]}
    [found] = corpus.json("search", "x", "--where", "tags contains 'y'")["results"]
    assert found["document_id"] == "note.md"
    assert [hit.metadata["author"] for hit in search("x", where="author like 'A%'")] == ["Ann"]
    frame = read_embeddings(where="year is null").polars().select("meta_author").collect()
    assert sorted(frame["meta_author"].to_list(), key=str) == ["Bob", None]


def test_a_group_sees_only_what_it_may(corpus: Project) -> None:
    corpus.set(METADATA=FIELDS)
    corpus.sync()

    def seen(*groups: str, using: tuple[str, ...] = ()) -> set[str]:
        options = [part for group in groups for part in ("--as", group)]
        return {row["document_id"] for row in corpus.json("search", "x", *options, *using)["results"]}

    assert seen() == {"rows.jsonl#r1", "rows.jsonl#r2", "note.md"}
    assert seen("hr") == {"rows.jsonl#r1"}
    assert seen("hr", "all") == {"rows.jsonl#r1", "note.md"}
    assert seen("h") == seen("nobody") == set()
    corpus.json("derive", "binary")
    assert seen("hr", using=("--using", "binary", "-k", "1", "--distinct")) == {"rows.jsonl#r1"}
    assert [hit.document_id for hit in search("x", groups=["all"], context="section")] == ["note.md"]
    assert search("x", groups=[]) == [] and read_embeddings(groups=[]).numpy().matrix.size == 0
    corpus.write("b/note.md", "---\nacl: [it]\n---\nA note.\n")
    assert corpus.sync()["embedded"] == 0
    assert seen("all") == set() and seen("it") == {"note.md"}


def test_a_group_needs_a_field(corpus: Project) -> None:
    assert "acl:list<string>" in corpus.json("search", "x", "--as", "hr", exit_code=1)["error"]
    corpus.set(METADATA="acl:string")
    assert "acl:list<string>" in corpus.json("search", "x", "--as", "hr", exit_code=1)["error"]


def test_metadata_can_be_in_files_beside_and_above(project: Project) -> None:
    project.set(METADATA="author:string,year:int,acl:list<string>")
    project.write("_meta.json", '{"author": "Root", "year": 1, "acl": ["root"]}')
    project.write("a/_meta.json", '{"acl": ["staff"], "author": "Folder"}')
    project.write("a/note.md", "---\nauthor: Own\n---\nA note.\n")
    project.write("a/plain.txt", "A plain text.")
    project.write("a/plain.txt.meta.json", '{"author": "Beside", "acl": []}')
    project.write("a/b/rows.jsonl", row("r", "A row.", year=7))
    project.write("a/b/rows.meta.json", '{"year": 8}')
    project.write("c/lone.meta.json", '{"text": "A document of its own."}')
    project.sync()
    assert values(project) == {
        "note.md": {"meta_author": "Own", "meta_year": 1, "meta_acl": ["staff"]},
        "plain.txt": {"meta_author": "Beside", "meta_year": 1, "meta_acl": []},
        "b/rows.jsonl#r": {"meta_author": "Folder", "meta_year": 8, "meta_acl": ["staff"]},
        **{name: each for name, each in values(project).items() if name.startswith("lone.meta.json")},
    }
    assert len(values(project)) == 4
    before = commits(project)
    project.write("a/_meta.json", '{"acl": ["board"], "author": "Folder"}')
    plan = {
        each["partition_key"]: each["assets"]["raw_documents"]["state"] for each in project.json("plan")["partitions"]
    }
    assert plan == {"a": "stale", "c": "fresh"}
    assert project.sync()["embedded"] == 0
    assert values(project)["note.md"]["meta_acl"] == ["board"] and values(project)["plain.txt"]["meta_acl"] == []
    assert commits(project) == {name: version + 1 for name, version in before.items()}
    (project.landing / "a/plain.txt.meta.json").unlink()
    project.sync()
    assert values(project)["plain.txt"] == {"meta_author": "Folder", "meta_year": 1, "meta_acl": ["board"]}


@pytest.mark.parametrize("content", ["[1]", "{", "x" * (1 << 21)])
def test_a_broken_sidecar_rejects_its_documents(project: Project, content: str) -> None:
    project.set(METADATA="acl:list<string>")
    project.write("a/secret.txt", "A secret.")
    project.write("a/secret.txt.meta.json", content)
    project.write("a/open.txt", "An open text.")
    assert project.sync()["partitions"]["a"]["rejected"] == 1
    [rejected] = project.json("rejected")["rejected"]
    assert rejected["document_id"] == "secret.txt" and "'a/secret.txt.meta.json'" in rejected["detail"]


def test_without_metadata_such_files_are_documents(project: Project) -> None:
    project.write("a/_meta.json", '{"text": "One text."}')
    project.write("a/x.txt", "Another.")
    assert project.sync()["partitions"]["a"]["documents"] == 2


def test_pages_and_office_files_say_things_about_themselves(project: Project) -> None:
    import docx

    project.set(METADATA="author:string,keywords:string,created:timestamp,description:string")
    head = '<meta name="Author" content="Ann &amp; Bob"><meta name=description content=short><meta charset=utf-8>'
    page = (
        f'<html><head>{head}<title>T</title></head><body><meta name="keywords" content="no"><p>Text.</p></body></html>'
    )
    project.write("a/page.html", page)
    document = docx.Document()
    document.add_paragraph("A paragraph.")
    document.core_properties.author, document.core_properties.keywords = "Cy", "x, y"
    document.core_properties.created = datetime(2026, 1, 31, 12, tzinfo=UTC)
    document.save(str(project.landing / "a" / "word.docx"))
    project.sync()
    found = values(project)
    assert (found["page.html"]["meta_author"], found["page.html"]["meta_description"]) == ("Ann & Bob", "short")
    assert found["page.html"]["meta_keywords"] is None
    assert (found["word.docx"]["meta_author"], found["word.docx"]["meta_keywords"]) == ("Cy", "x, y")
    assert found["word.docx"]["meta_created"] == datetime(2026, 1, 31, 12, tzinfo=UTC)
    project.write("a/other.txt", "Another file.")  # only this one is read
    before = commits(project)
    project.sync()
    (project.landing / "a" / "word.docx").touch()
    assert project.sync()["embedded"] == 0
    assert commits(project) == {name: version + 1 for name, version in before.items()}  # none for the touched file


@pytest.mark.parametrize(
    "time, expected",
    [
        ("D:20260131120000+02'00'", "2026-01-31T12:00:00+02:00"),
        ("D:20260131120000Z", "2026-01-31T12:00:00Z"),
        ("D:2026", "2026-01-01T00:00:00"),
        ("yesterday", "yesterday"),
    ],
)
def test_the_properties_of_a_pdf(time: str, expected: str) -> None:
    found = pdf_properties({"Author": " Ann ", "CreationDate": time, "Subject": ""})
    assert found == {"author": "Ann", "created": expected}


def test_the_properties_of_an_opendocument_file() -> None:
    names = 'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:meta="urn:oasis:names:tc:opendocument:xmlns:meta:1.0"'
    inside = (
        "<meta:initial-creator>Ann</meta:initial-creator><meta:keyword>a</meta:keyword><meta:keyword>b</meta:keyword>"
        '<dc:date>2026-01-31</dc:date><meta:user-defined meta:name="acl">hr</meta:user-defined>'
    )
    found = open_document_properties(ElementTree.fromstring(f"<meta:m {names}>{inside}</meta:m>"))
    assert {name: found[name] for name in ("author", "keywords", "modified", "acl")} == {
        "author": "Ann",
        "keywords": "a, b",
        "modified": "2026-01-31",
        "acl": "hr",
    }


@pytest.mark.parametrize(
    "kind, raw, expected",
    [
        ("string", "a", "a"),
        ("string", "", ""),
        ("int", "12", 12),
        ("int", 12.0, 12),
        ("int", " ", None),
        ("float", 1, 1.0),
        ("float", "1.5", 1.5),
        ("bool", "true", True),
        ("bool", False, False),
        ("timestamp", "2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("timestamp", "2026-01-31T02:00:00+02:00", datetime(2026, 1, 31, tzinfo=UTC)),
        ("list<string>", ["a", "b"], ["a", "b"]),
        ("list<string>", "a, b", ["a, b"]),
        ("list<string>", '["a", "b"]', ["a", "b"]),
        ("list<string>", "[draft", ["[draft"]),
        ("list<string>", "", None),
        ("list<int>", ["1", 2], [1, 2]),
        ("list<int>", [], []),
        *((kind, None, None) for kind in ("string", "int", "list<string>")),
    ],
)
def test_values_fit_their_type(kind: str, raw: Any, expected: Any) -> None:
    field = MetadataField("x", kind)
    assert field.value(raw) == expected
    assert pa.array([expected], field.column.type).to_pylist() == [expected]


@pytest.mark.parametrize(
    "kind, raw",
    [
        ("string", 5),
        ("string", ["a"]),
        ("string", {"a": 1}),
        ("int", "abc"),
        ("int", 1.5),
        ("int", 1 << 70),
        ("float", "much"),
        ("bool", "maybe"),
        ("timestamp", "yesterday"),
        ("list<string>", [1]),
        ("list<string>", {"a": "b"}),
        ("list<int>", ["a"]),
        ("list<int>", 3),
    ],
)
def test_other_values_are_refused(kind: str, raw: Any) -> None:
    with pytest.raises(ValueError, match=f"metadata field 'x' must be (an )?{kind.split('<')[0]}"):
        MetadataField("x", kind).value(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["string", "int", "float", "bool", "timestamp", "list<string>", "list<int>"]), json_values)
def test_any_value_fits_or_is_refused(kind: str, raw: Any) -> None:
    field = MetadataField("x", kind)
    try:
        found = values_of([field], json.dumps({"x": raw}), {}, {})
    except ValueError:
        return
    pa.array(list(found), field.column.type)


@pytest.mark.parametrize(
    "text", ["author", "author:text", "a b:int", "a:int,a:string", "A:int, a:int", "year:int:float", "list:list<bool>"]
)
def test_wrong_fields_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="EMBED_METADATA"):
        load_settings(metadata=text)


def test_fields_are_kept_in_one_form() -> None:
    assert load_settings(metadata=" year : int ,tags:list<string>, ").metadata == "year:int,tags:list<string>"
