"""EMBED_CONTEXT: title and headings are part of what the model gets, and of the embedding space."""

from __future__ import annotations

from typing import Any

import pytest

from embed_assets.records import hash_text
from embed_assets.settings import load_settings
from embed_assets_tests.conftest import SAMPLE_MODEL, Project

MODEL = f"fake:16+{SAMPLE_MODEL}"
GUIDE = "# Guide\n\n## Setup\n\nInstall it.\n\n## Use\n\nRun it.\n"


@pytest.fixture
def corpus(project: Project) -> Project:
    """Two documents in two partitions, with title and headings."""
    project.set(MODEL=MODEL, CONTEXT="title,headings")
    project.write("a/guide.md", GUIDE)
    project.write("b/note.txt", "A note without headings.")
    project.sync()
    return project


def inputs(project: Project) -> dict[str, str]:
    """Hash of the model's input by text."""
    return {row["text"]: row["input_hash"] for row in project.rows("text", "input_hash")}


def texts(project: Project) -> set[Any]:
    columns = ("document_id", "text", "chunk_id", "char_start", "char_end", "heading_path", "title")
    return {tuple(row[name] for name in columns) for row in project.rows(*columns)}


def to_embed(project: Project) -> int:
    plan = project.json("plan", "--count")["partitions"]
    return sum(row["chunks_to_embed"] for row in plan)


def test_the_input_has_title_and_headings_and_the_rows_are_those_of_the_document(corpus: Project) -> None:
    assert inputs(corpus) == {
        "# Guide\n\n## Setup\n\nInstall it.": hash_text("Guide > Setup\n\n# Guide\n\n## Setup\n\nInstall it."),
        "## Use\n\nRun it.": hash_text("Guide > Use\n\n## Use\n\nRun it."),
        "A note without headings.": hash_text("note.txt\n\nA note without headings."),
    }
    with_context = texts(corpus)
    corpus.set(CONTEXT="")
    corpus.sync()
    assert texts(corpus) == with_context
    assert inputs(corpus)["## Use\n\nRun it."] == hash_text("## Use\n\nRun it.")


def test_each_context_is_a_space_of_its_own_and_going_back_embeds_nothing(corpus: Project) -> None:
    corpus.set(CONTEXT="headings")
    assert to_embed(corpus) == corpus.sync()["embedded"] == 3
    corpus.set(CONTEXT="headings,title")
    assert to_embed(corpus) == corpus.sync()["embedded"] == 0
    assert len(corpus.json("spaces")["spaces"]) == 2


def test_a_renamed_heading_embeds_the_chunks_below_it(corpus: Project) -> None:
    corpus.write("a/guide.md", GUIDE.replace("# Guide", "# Handbook", 1))
    assert to_embed(corpus) == corpus.sync()["embedded"] == 2
    corpus.write("a/guide.md", GUIDE.replace("# Guide", "# Handbook", 1).replace("## Use", "## Usage"))
    assert to_embed(corpus) == corpus.sync()["embedded"] == 1


def test_a_title_from_elsewhere_embeds_all_chunks_of_its_document(corpus: Project) -> None:
    corpus.write("a/guide.md", f"---\ntitle: Manual\n---\n{GUIDE}")
    assert to_embed(corpus) == corpus.sync()["embedded"] == 2
    assert inputs(corpus)["## Use\n\nRun it."] == hash_text("Manual > Guide > Use\n\n## Use\n\nRun it.")
    assert corpus.run("verify").exit_code == 0


def test_a_renamed_file_embeds_what_has_its_name_as_title(corpus: Project) -> None:
    (corpus.landing / "a" / "guide.md").rename(corpus.landing / "a" / "renamed.md")
    assert to_embed(corpus) == corpus.sync()["embedded"] == 0
    (corpus.landing / "b" / "note.txt").rename(corpus.landing / "b" / "renamed.txt")
    assert to_embed(corpus) == corpus.sync()["embedded"] == 1


@pytest.mark.parametrize("context", ["title", "headings", "title,headings"])
def test_verify_knows_the_inputs(corpus: Project, context: str) -> None:
    corpus.set(CONTEXT=context)
    corpus.sync()
    assert corpus.run("verify").exit_code == 0
    space = corpus.json("spaces")["spaces"][0]
    gates = corpus.json("evaluate", "--space", space["space"])["gates"][space["space"]]
    assert {gate["name"]: gate["passed"] for gate in gates}["reproduction"]


def test_the_tables_alone_give_the_same_inputs_as_the_source(corpus: Project) -> None:
    before = inputs(corpus)
    corpus.set(MODEL=f"fake:16@other+{SAMPLE_MODEL}")
    done = corpus.sync()  # documents and chunks are fresh
    assert done["embedded"] == 3
    assert inputs(corpus) == before


def test_no_input_is_longer_than_a_chunk_may_be(project: Project) -> None:
    project.set(MODEL=MODEL, CONTEXT="title,headings", CHUNK_TOKENS="100")
    project.write("a/long.md", "# A title of some words\n\n## And a heading\n\n" + "Words and more words. " * 400)
    project.sync()
    model_input = project.pipeline().model.space.model_input
    rows = project.rows("text", "title", "heading_path", "is_truncated")
    counts = model_input.tokenizer.count([model_input.of(r["text"], r["title"], r["heading_path"]) for r in rows])
    assert 70 < max(counts) <= 100 and len(counts) > 5
    assert not any(row["is_truncated"] for row in rows)


def test_lakes_and_recipes_without_a_context_have_none(corpus: Project) -> None:
    corpus.set(CONTEXT="")
    corpus.sync()
    old = corpus.pipeline().model.space
    assert old.model_input.of("t", "title", "a > b") == "t"
    assert len({old.fingerprint, corpus.pipeline().model.float_space.fingerprint}) == 1


@pytest.mark.parametrize("value", ["titles", "title;headings", "title,title", "document"])
def test_another_value_is_refused(project: Project, value: str) -> None:
    project.set(CONTEXT=value)
    assert "EMBED_CONTEXT" in project.json("plan", exit_code=1)["error"]


def test_no_room_for_a_text_is_said(project: Project) -> None:
    project.set(MODEL=MODEL, CONTEXT="title", CHUNK_TOKENS="40")
    error = project.json("plan", exit_code=1)["error"]
    assert "the context 32" in error and "EMBED_CONTEXT" in error


def test_values_are_put_in_order() -> None:
    assert load_settings(context=" headings , title ").context == "title,headings"
