"""Documents of other kinds through a whole sync: pages reach the chunks, and only what changed is embedded."""

from __future__ import annotations

import json

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from embed_assets_tests.conftest import Project
from embed_assets_tests.corpus.files import PICTURE, lines, pdf

WORDS = "many words of a page that fill its chunk and make it go on "


def test_chunks_know_their_pages(project: Project) -> None:
    project.set(CHUNK_TOKENS="64")
    pages = [lines(*(f"Page {name} line {i} has {WORDS}" for i in range(4))) for name in ("one", "two", "three")]
    project.write("a/manual.pdf", pdf(*pages))
    project.write("a/note.md", "No pages here.")
    project.sync()
    columns = ("document_id", "text", "page_start", "page_end", "chunk_index")
    for table in ("chunks", "embeddings"):
        rows = sorted(project.rows(*columns, table=table), key=lambda row: (row["document_id"], row["chunk_index"]))
        assert (rows[-1]["document_id"], rows[-1]["page_start"], rows[-1]["page_end"]) == ("note.md", None, None)
        spans = [(row["page_start"], row["page_end"]) for row in rows[:-1]]
        assert spans[0][0] == 1 and spans[-1][1] == 3 and all(a <= b for a, b in spans)
        for row in rows[:-1]:
            named = [n for n, word in enumerate(("one", "two", "three"), 1) if f"Page {word}" in row["text"]]
            assert row["page_start"] <= named[0] and named[-1] <= row["page_end"], row
    assert project.json("verify")["ok"]


def test_a_page_that_moves_is_a_change_but_embeds_nothing(project: Project) -> None:
    text = lines(f"A page with {WORDS}")
    project.write("a/manual.pdf", pdf(text))
    project.sync()
    project.write("a/manual.pdf", pdf("", text))
    again = project.sync()
    assert again["embedded"] == 0 and again["partitions"]["a"]["state"] == "materialized"
    assert [row["page_start"] for row in project.rows("page_start")] == [2]


def test_pages_without_text_are_in_the_metadata_and_among_the_rejections(project: Project) -> None:
    project.write("a/scan.pdf", pdf(lines(f"A cover with {WORDS}"), PICTURE, PICTURE))
    [reason] = project.sync()["rejections"]
    assert (reason["reason"], reason["examples"]) == ("pages_without_text", ["a/scan.pdf#pages"])
    [row] = project.rows("document_id", "metadata", table="raw_documents")
    assert json.loads(row["metadata"]) == {"pages": 3, "pages_without_text": "2-3"}


def test_of_a_delta_table_only_changed_rows_are_embedded(project: Project) -> None:
    place = str(project.landing / "faq")
    project.landing.mkdir(exist_ok=True)
    rows = pa.table({"id": [str(i) for i in range(40)], "text": [f"Answer {i}." for i in range(40)]})
    write_deltalake(place, rows)
    assert project.sync()["embedded"] == 40
    assert project.sync()["embedded"] == 0
    DeltaTable(place).update({"text": "'A new answer.'"}, predicate="id = '7'")
    DeltaTable(place).delete("id = '9'")
    again = project.sync()
    assert (again["embedded"], again["dropped"]) == (1, 2)
    assert len(project.rows("chunk_id")) == 39
    DeltaTable(place).optimize.compact()
    assert project.sync()["embedded"] == 0


def test_source_code_by_module_class_and_function(project: Project) -> None:
    body = "\n".join(f"        self.step({i}, 'with several words in it')" for i in range(12))
    project.write("a/motor.py", f"class Engine:\n    def start(self):\n{body}\n\n    def stop(self):\n{body}\n")
    project.set(CHUNK_TOKENS="128")
    project.sync()
    paths = {row["heading_path"] for row in project.rows("heading_path")}
    assert {"motor > Engine > start", "motor > Engine > stop"} <= paths
