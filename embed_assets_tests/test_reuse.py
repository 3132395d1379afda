"""Which texts reach the model in each case that the project promises, counted by `sync --json`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from embed_assets_tests.conftest import SAMPLE_MODEL, Project, Shelf, topic


def fill(project: Project) -> None:
    for name in ("with", "try", "while"):
        project.write(f"a/{name}.rst", topic(name))
    for name in ("lambda", "comparisons"):
        project.write(f"b/{name}.rst", topic(name))
    project.sync()


@pytest.fixture
def corpus(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Two partitions of real documents, embedded once."""
    return shelf.take("reuse", fill, monkeypatch)


def chunk_count(project: Project) -> int:
    return len(project.rows("chunk_id"))


def test_cold_run_embeds_every_text_once(project: Project) -> None:
    project.write("a/try.rst", topic("try"))
    answer = project.sync()
    texts = {row["input_hash"] for row in project.rows("input_hash")}
    assert answer["embedded"] == len(texts) > 5
    assert answer["embedded"] + answer["reused"] == chunk_count(project) == answer["partitions"]["a"]["chunks"]


def test_unchanged_rerun_embeds_nothing_and_commits_nothing(corpus: Project) -> None:
    from embed_assets.lake.snapshot import Snapshot

    pipeline = corpus.pipeline()
    before = Snapshot(pipeline.lake).version(pipeline.embeddings_table)
    answer = corpus.sync()
    assert answer["embedded"] == 0
    assert {p["state"] for p in answer["partitions"].values()} == {"fresh"}
    assert Snapshot(pipeline.lake).version(pipeline.embeddings_table) == before


def test_one_edited_chunk_is_one_text(corpus: Project) -> None:
    text = topic("lambda")
    corpus.write("b/lambda.rst", text.replace("anonymous", "nameless", 1))
    answer = corpus.sync()
    assert (answer["embedded"], answer["dropped"]) == (1, 1)
    assert answer["partitions"]["a"]["state"] == "fresh"


def test_touched_files_run_nothing_downstream(corpus: Project) -> None:
    for file in corpus.landing.rglob("*.rst"):
        os.utime(file, (1, 1))
    answer = corpus.sync()
    assert answer["embedded"] == 0
    assert {p["state"] for p in answer["partitions"].values()} == {"materialized"}
    assert corpus.sync()["partitions"]["a"]["state"] == "fresh"


def test_deleted_document_takes_its_rows_along(corpus: Project) -> None:
    (corpus.landing / "a/try.rst").unlink()
    gone = sum(row["document_id"] == "try.rst" for row in corpus.rows("document_id"))
    answer = corpus.sync()
    assert (answer["embedded"], answer["dropped"]) == (0, gone)
    assert "try.rst" not in {row["document_id"] for row in corpus.rows("document_id")}


def test_emptied_partition_loses_its_rows(corpus: Project) -> None:
    shutil.rmtree(corpus.landing / "a")
    answer = corpus.sync()
    assert (answer["embedded"], answer["partitions"]["a"]["chunks"]) == (0, 0)
    assert {row["partition_key"] for row in corpus.rows("partition_key")} == {"b"}
    assert corpus.sync()["partitions"]["a"]["state"] == "fresh"


def test_renamed_document_embeds_nothing(corpus: Project) -> None:
    (corpus.landing / "a/try.rst").rename(corpus.landing / "a/attempt.rst")
    answer = corpus.sync()
    assert answer["embedded"] == 0
    assert "attempt.rst" in {row["document_id"] for row in corpus.rows("document_id")}


def test_duplicated_document_embeds_nothing(corpus: Project) -> None:
    before = chunk_count(corpus)
    corpus.write("a/copy.rst", topic("try"))
    assert corpus.sync()["embedded"] == 0
    assert chunk_count(corpus) > before


def test_identical_chunks_in_one_run_are_embedded_once(project: Project) -> None:
    for i in range(5):
        project.write(f"a/{i}.md", "The same sentence.")
    answer = project.sync()
    assert (answer["embedded"], answer["reused"], chunk_count(project)) == (1, 4, 5)


def test_changed_model_embeds_everything_into_a_separate_table(corpus: Project) -> None:
    old = sorted(map(str, corpus.rows("chunk_id", "embedded_at")))
    texts = len({row["input_hash"] for row in corpus.rows("input_hash")})
    corpus.set(MODEL="fake:16@other")
    assert corpus.sync()["embedded"] >= texts
    corpus.set(MODEL="fake:16")
    assert corpus.sync()["embedded"] == 0
    assert sorted(map(str, corpus.rows("chunk_id", "embedded_at"))) == old


def test_a_fake_models_speed_is_not_part_of_its_space(corpus: Project) -> None:
    corpus.set(MODEL="fake:16~100000")
    assert {p["state"] for p in corpus.sync()["partitions"].values()} == {"fresh"}


def test_changed_prompt_embeds_all(corpus: Project) -> None:
    corpus.set(PROMPT="passage: ")
    assert corpus.sync()["embedded"] > 20


def test_changed_chunk_setting_with_the_same_chunks_embeds_nothing(project: Project) -> None:
    project.write("a/short.md", "# One\n\nA short document.\n")
    project.sync()
    project.set(CHUNK_TOKENS="200")
    plan = project.json("plan")["partitions"][0]["assets"]
    assert plan["chunks"]["state"] == "stale"
    assert "code changed" in plan["chunks"]["reasons"][0]
    assert project.sync()["embedded"] == 0


def test_whitespace_between_chunks_moves_spans_but_embeds_nothing(project: Project) -> None:
    text = topic("try")
    project.write("a/doc.rst", text)
    project.sync()
    cut = min(row["char_end"] for row in project.rows("char_end"))
    text = "\n\n" + text[:cut] + "\n\n\n" + text[cut:]
    project.write("a/doc.rst", text)
    assert project.sync()["embedded"] == 0
    for row in project.rows("char_start", "char_end", "text"):
        assert text[row["char_start"] : row["char_end"]] == row["text"]


def test_changed_metadata_updates_rows_and_embeds_nothing(project: Project) -> None:
    def write(title: str, extra: int) -> None:
        project.write("a/rows.jsonl", json.dumps({"id": "1", "text": "A text.", "title": title, "extra": extra}))

    write("Old", 1)
    project.sync()
    write("New", 2)
    assert project.sync()["embedded"] == 0
    assert project.rows("title")[0]["title"] == "New"
    assert project.rows("metadata", table="raw_documents")[0]["metadata"] == '{"extra": 2}'


def test_text_that_moves_between_partitions_is_found_with_reuse_table(corpus: Project) -> None:
    corpus.set(REUSE="table")
    (corpus.landing / "a/try.rst").rename(corpus.landing / "b/try.rst")
    assert corpus.json("plan", "--count")["chunks_to_embed"] == 0
    answer = corpus.sync()
    assert answer["embedded"] == 0
    (corpus.landing / "b").rename(corpus.landing / "c")
    assert corpus.sync()["embedded"] == 0


def test_text_that_moves_between_partitions_is_embedded_again_by_default(corpus: Project) -> None:
    (corpus.landing / "a/try.rst").rename(corpus.landing / "b/try.rst")
    assert corpus.sync()["embedded"] > 1


def test_rebuilding_one_partition_leaves_the_others_rows_alone(corpus: Project) -> None:
    before = sorted(
        str(r) for r in corpus.rows("partition_key", "chunk_id", "embedded_at") if r["partition_key"] == "a"
    )
    corpus.write("b/lambda.rst", "Something else.")
    corpus.sync("--partition", "b")
    after = sorted(str(r) for r in corpus.rows("partition_key", "chunk_id", "embedded_at") if r["partition_key"] == "a")
    assert before == after


def test_odd_folder_names_are_valid_partitions(project: Project) -> None:
    odd = ["o'x; DROP=1 é %2F", "a b", 'quo"te', "percent%20", "_root", "__HIVE_DEFAULT_PARTITION__", "dots...", "🙂"]
    for i, name in enumerate(odd):
        project.write(f"{name}/doc.md", f"Document number {i} of {name}.")
    project.write("loose.md", "A loose file.")
    answer = project.sync()
    assert len(answer["partitions"]) == len(odd) + 1
    assert {"o'x; DROP=1 é %2F", "_root", "a b"} <= answer["partitions"].keys()
    project.write("o'x; DROP=1 é %2F/doc.md", "Changed.")
    again = project.sync()
    assert (again["embedded"], again["dropped"]) == (1, 1)
    assert chunk_count(project) == len(odd) + 1


def test_lost_table_is_missing_again(corpus: Project) -> None:
    shutil.rmtree(corpus.root / "lake/embeddings")
    plan = corpus.json("plan")["partitions"][0]["assets"]["embeddings"]
    assert plan["state"] == "missing"
    assert "not in the table" in plan["reasons"][0]
    assert corpus.sync()["embedded"] > 20


def test_switching_to_another_lake_and_back_is_brought_up_to_date(project: Project) -> None:
    file = project.write("a/x.md", "Version one.")
    project.write("b/no.xyz", "Rejected.")
    project.sync()
    file.write_text("Version two.")
    project.set(LAKE="lake2")
    assert project.sync()["embedded"] == 1
    assert [r["reason"] for r in project.rows("reason", table="rejected_documents")] == ["unsupported_format"]
    project.set(LAKE="lake")
    assert project.json("plan")["partitions"][0]["assets"]["raw_documents"]["state"] == "missing"
    project.sync()
    assert [r["text"] for r in project.rows("text")] == ["Version two."]
    assert {p["state"] for p in project.sync()["partitions"].values()} == {"fresh"}


def test_a_restored_backup_is_brought_up_to_date(project: Project) -> None:
    file = project.write("a/x.md", "Version one.")
    project.sync()
    shutil.copytree(project.root / "lake", project.root / "backup")
    file.write_text("Version two.")
    project.sync()
    shutil.rmtree(project.root / "lake")
    (project.root / "backup").rename(project.root / "lake")
    project.sync()
    assert [r["text"] for r in project.rows("text")] == ["Version two."]


def test_lost_rejections_are_rebuilt(project: Project) -> None:
    project.write("a/x.md", "Fine.")
    project.write("a/no.xyz", "Rejected.")
    project.sync()
    shutil.rmtree(project.root / "lake/rejected_documents")
    assert project.sync()["embedded"] == 0
    assert len(project.rows("reason", table="rejected_documents")) == 1


def test_a_lake_inside_its_source_is_left_out(project: Project) -> None:
    project.write("a/x.md", "Fine.")
    project.set(SOURCE=".")
    for _ in range(3):
        assert project.sync()["partitions"].keys() == {"_root", "landing"}


def test_a_file_named_like_a_row_is_another_document(project: Project) -> None:
    project.write("a/data.csv", "id,text\nx.txt,Same text here\n")
    project.write("a/data.csv#x.txt", "Same text here")
    project.sync()
    assert project.json("verify")["ok"]
    assert len({row["document_id"] for row in project.rows("document_id")}) == 2


def test_windows_of_an_undone_edit_are_removed(project: Project) -> None:
    from embed_assets.lake.staging import Staging
    from embed_assets.lake.vectors import vector_batch
    from embed_assets.records import hash_text, utc_now

    project.write("a/x.md", "Fine.")
    project.sync()
    pipeline = project.pipeline()
    staging = Staging(pipeline.lake, pipeline.embeddings_table, "a")
    staging.write(vector_batch([hash_text("x")], np.zeros((1, 16), np.float32), np.zeros(1, bool), utc_now()))
    project.sync()
    assert len(list(staging.read())) == 1, "another run may be at work on it"
    for file in (project.root / "lake/embeddings").rglob("_staging/*"):
        os.utime(file, (1, 1))
    project.sync()
    assert list(staging.read()) == []


def test_plan_counts_a_text_of_several_partitions_once_with_reuse_table(project: Project) -> None:
    for key in "abc":
        project.write(f"{key}/x.md", "The same everywhere.")
    project.set(REUSE="table")
    assert project.json("plan", "--count")["chunks_to_embed"] == 1
    assert project.sync()["embedded"] == 1


def test_lake_without_its_instance_is_recorded_again_and_embeds_nothing(corpus: Project) -> None:
    shutil.rmtree(corpus.root / ".dagster")
    assert corpus.sync()["embedded"] == 0


def test_killed_run_costs_at_most_its_last_window(project: Project) -> None:
    lines = [f"Sentence number {i} of a long text that goes on." for i in range(1500)]
    project.write("a/rows.jsonl", "\n".join(json.dumps({"id": i, "text": line}) for i, line in enumerate(lines)))
    project.set(MODEL="fake:16~300")
    process = subprocess.Popen(
        [sys.executable, "-m", "embed_assets.cli", "sync"], start_new_session=True, stderr=subprocess.DEVNULL
    )
    staged = project.root / "lake/embeddings"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(staged.rglob("_staging/*.arrow")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list(staged.rglob("_staging/*.arrow"))) * 256
    assert kept, "no window was staged in time"
    project.set(MODEL="fake:16")
    answer = project.sync()
    assert 0 < answer["embedded"] <= len(lines) - kept
    assert len({row["chunk_id"] for row in project.rows("chunk_id")}) == chunk_count(project) == len(lines)
    assert not list(staged.rglob("_staging/*"))


def test_real_model_edit_of_one_chunk(project: Project) -> None:
    project.set(MODEL=SAMPLE_MODEL)
    for name in ("pass", "while", "lambda"):
        project.write(f"a/{name}.rst", topic(name))
    cold = project.sync()
    assert cold["embedded"] == len({row["input_hash"] for row in project.rows("input_hash")})
    project.write("a/pass.rst", topic("pass").replace("null operation", "empty operation"))
    assert project.sync()["embedded"] == 1
    (project.landing / "a/pass.rst").rename(project.landing / "a/nothing.rst")
    assert project.sync()["embedded"] == 0
    best = project.json("search", "a statement that does nothing", "-k", "2")["results"][0]
    assert best["document_id"] == "nothing.rst"
    assert Path(best["uri"].removeprefix("file://")).is_file()
