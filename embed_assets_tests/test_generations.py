"""Changing the model: the new space is built beside the active one, which readers keep until it is promoted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import polars as pl
import pytest

from embed_assets.lake.generations import read_generations
from embed_assets_tests.conftest import Project, topic

OLD, NEW = "fake:16", "fake:24@new"


@pytest.fixture
def corpus(project: Project) -> Project:
    """Two partitions, embedded by the old model."""
    project.set(MODEL=OLD)
    project.write("a/try.rst", topic("try"))
    project.write("b/with.rst", topic("with"))
    project.sync()
    return project


def spaces(project: Project) -> dict[str, str]:
    """States of the spaces, by their models."""
    return {each["model"]: each["state"] for each in project.json("spaces")["spaces"]}


def name_of(project: Project, model: str) -> str:
    """The space of a model."""
    found = [each["space"] for each in project.json("spaces")["spaces"] if each["model"] == model]
    return str(found[0])


def dimensions(project: Project) -> set[int]:
    """Lengths of the vectors that the lake resource reads."""
    from embed_assets.definitions import build_definitions
    from embed_assets.settings import load_settings

    lake = build_definitions(load_settings()).resources["lake"]  # type: ignore[index]
    return set(lake.scan().select(pl.col("embedding").list.len()).collect().to_series().to_list())


def rows_of(project: Project, space: str) -> dict[str, set[str]]:
    """Texts in a space's table, by partition."""
    table = pl.read_delta(str(project.root / "lake" / "embeddings" / space))
    return {key: set(part["text"]) for (key,), part in table.group_by("partition_key")}


def test_the_first_space_is_active(corpus: Project) -> None:
    found = corpus.json("spaces")
    [space] = found["spaces"]
    assert found["active"] == space["space"]
    assert (space["state"], space["model"], space["coverage"]) == ("active", OLD, 1.0)
    assert space["rows"] == len(corpus.rows("chunk_id"))
    assert space["bytes"] > 0


def test_readers_keep_the_active_space_until_another_is_promoted(corpus: Project) -> None:
    before = corpus.json("search", "an except clause")
    corpus.set(MODEL=NEW)
    assert corpus.json("search", "an except clause") == before  # nothing is built yet
    assert "is built beside" in corpus.run("plan", "--count").stdout
    corpus.sync()
    assert spaces(corpus) == {OLD: "active", NEW: "ready"}
    assert corpus.json("search", "an except clause") == before
    assert dimensions(corpus) == {16}
    done = corpus.json("promote")
    assert (done["active"], done["previous"]) == (name_of(corpus, NEW), name_of(corpus, OLD))
    assert all(gate["passed"] for gate in done["gates"]) and done["gates"]
    assert spaces(corpus) == {NEW: "active", OLD: "previous"}
    assert corpus.json("search", "an except clause") != before
    assert dimensions(corpus) == {24}


def test_a_space_that_is_not_complete_is_not_promoted(corpus: Project) -> None:
    corpus.set(MODEL=NEW)
    corpus.sync("--partition", "a")
    building = next(each for each in corpus.json("spaces")["spaces"] if each["model"] == NEW)
    assert building["state"] == "building" and 0 < building["coverage"] < 1
    refused = corpus.json("promote", exit_code=1)
    [failed] = [gate for gate in refused["gates"] if not gate["passed"]]
    assert failed["name"] == "coverage" and failed["value"] < failed["limit"] and "'b'" in failed["detail"]
    assert spaces(corpus) == {OLD: "active", NEW: "building"}
    assert len(read_generations(corpus.pipeline().lake).changes) == 1


def test_a_rollback_embeds_nothing_and_goes_forth_again(corpus: Project) -> None:
    corpus.set(MODEL=NEW)
    corpus.sync()
    corpus.json("promote")
    files = sorted((corpus.root / "lake" / "embeddings").rglob("*.parquet"))
    assert corpus.json("rollback")["active"] == name_of(corpus, OLD)
    assert spaces(corpus) == {OLD: "active", NEW: "previous"}
    assert dimensions(corpus) == {16}
    assert corpus.json("rollback")["active"] == name_of(corpus, NEW)
    assert sorted((corpus.root / "lake" / "embeddings").rglob("*.parquet")) == files


def test_arriving_documents_go_into_both(corpus: Project) -> None:
    corpus.set(MODEL=NEW)
    corpus.sync()
    corpus.write("a/new.txt", "A text that arrives while two spaces are live.")
    corpus.write("c/other.txt", "A whole partition that arrives.")
    (corpus.landing / "b" / "with.rst").unlink()
    plan = {row["partition_key"]: row["assets"] for row in corpus.json("plan")["partitions"]}
    assert plan["c"][f"embeddings/{name_of(corpus, OLD)}"]["state"] == "missing"
    corpus.sync()
    old, new = rows_of(corpus, name_of(corpus, OLD)), rows_of(corpus, name_of(corpus, NEW))
    assert old == new
    assert set(old) == {"a", "c"} and "A text that arrives while two spaces are live." in old["a"]
    corpus.json("promote")
    corpus.write("c/other.txt", "Changed after the promotion.")
    done = corpus.sync()
    assert done["embedded"] == 1
    assert rows_of(corpus, name_of(corpus, OLD))["c"] == {"Changed after the promotion."}
    assert {row["state"] for row in corpus.sync()["partitions"].values()} == {"fresh"}


def test_what_is_kept_up_to_date_is_embedded_once(corpus: Project) -> None:
    corpus.set(MODEL=NEW)
    corpus.sync()
    corpus.write("a/new.txt", "A new text.")
    done = corpus.sync()
    assert done["embedded"] == 1
    assert done["spaces"] == {
        name_of(corpus, OLD): {
            "embedded": 1,
            "reused": done["partitions"]["a"]["chunks"] - 1,
            "dropped": 0,
            "tokens": done["tokens"],
        }
    }
    assert corpus.sync()["spaces"] == {}


def test_a_partition_that_fails_in_the_active_space_fails(corpus: Project) -> None:
    space = name_of(corpus, OLD)
    corpus.set(MODEL=NEW)
    corpus.sync()
    log = corpus.root / "lake" / "embeddings" / space / "_delta_log"
    for file in log.glob("*.json"):
        file.write_text("{broken")
    corpus.write("a/new.txt", "A new text.")
    assert corpus.run("sync", "--json").exit_code == 1


def test_a_retired_space_takes_nothing_in(corpus: Project) -> None:
    old = name_of(corpus, OLD)
    assert "can't be retired" in corpus.json("retire", old, exit_code=1)["error"]
    corpus.set(MODEL=NEW)
    corpus.sync()
    new = name_of(corpus, NEW)
    assert "can't be retired" in corpus.json("retire", old, exit_code=1)["error"]  # it is active
    assert "can't be retired" in corpus.json("retire", new, exit_code=1)["error"]  # it is the settings'
    corpus.json("promote")
    corpus.json("retire", old, "--why", "half the quality")
    assert not (corpus.root / "lake" / "embeddings" / old).exists()
    assert {each["space"]: each["state"] for each in corpus.json("spaces")["spaces"]} == {new: "active", old: "retired"}
    assert "a rollback needs" in corpus.json("rollback", exit_code=1)["error"]
    corpus.write("a/new.txt", "A new text.")
    assert corpus.sync()["spaces"] == {}
    assert "no space" in corpus.json("retire", "no-such-space", exit_code=1)["error"]


def test_a_retired_space_can_be_built_again(corpus: Project) -> None:
    old = name_of(corpus, OLD)
    corpus.set(MODEL=NEW)
    corpus.sync()
    corpus.json("promote")
    corpus.json("retire", old)
    corpus.set(MODEL=OLD)
    assert corpus.sync()["embedded"] > 0
    assert spaces(corpus) == {NEW: "active", OLD: "ready"}


def test_going_back_to_the_old_model_makes_nothing_anew(corpus: Project) -> None:
    corpus.set(MODEL=NEW)
    corpus.sync()
    corpus.write("a/new.txt", "A new text.")
    corpus.sync()
    corpus.set(MODEL=OLD)
    assert corpus.sync()["embedded"] == 0
    assert spaces(corpus) == {OLD: "active", NEW: "ready"}


def test_a_space_keeps_its_own_chunk_size(corpus: Project) -> None:
    long = " ".join(f"word{i}" for i in range(300))
    corpus.set(CHUNK_TOKENS="64")
    corpus.write("a/long.txt", long)
    corpus.sync()
    small = max(row["token_count"] for row in corpus.rows("token_count"))
    corpus.set(MODEL=NEW, CHUNK_TOKENS="200")
    corpus.write("b/long.txt", long)
    corpus.sync()
    table = pl.read_delta(str(corpus.root / "lake" / "embeddings" / name_of(corpus, OLD)))
    assert small <= 64 and table["token_count"].max() == small
    assert max(row["token_count"] for row in corpus.rows("token_count")) > 64


def test_promotion_may_be_automatic(corpus: Project) -> None:
    corpus.set(MODEL=NEW, PROMOTE="auto")
    corpus.sync("--partition", "a")
    assert spaces(corpus) == {OLD: "active", NEW: "building"}
    done = corpus.sync()
    assert done["active"] == name_of(corpus, NEW)
    assert spaces(corpus) == {NEW: "active", OLD: "previous"}


def test_a_lake_of_an_older_version_keeps_its_space(corpus: Project) -> None:
    old = name_of(corpus, OLD)
    shutil.rmtree(corpus.root / "lake" / "generations")
    corpus.set(MODEL=NEW)
    assert corpus.json("spaces")["active"] == old
    corpus.sync()
    assert spaces(corpus) == {OLD: "active", NEW: "ready"}


def test_a_first_build_that_did_not_end_holds_nobody_up(project: Project) -> None:
    project.set(MODEL=OLD)
    project.write("a/ok.txt", "A text.")
    project.write("b/bad.txt", "Another text.")
    project.sync("--partition", "a")
    shutil.rmtree(project.root / "lake" / "generations")
    shutil.rmtree(project.root / "lake" / "embeddings")
    project.set(MODEL=NEW)
    project.sync()
    assert project.json("spaces")["active"] == name_of(project, NEW)


def test_readers_never_see_a_mixture(corpus: Project) -> None:
    """A reader in a loop, while the model changes, is promoted and rolled back."""
    problems, answers, is_over = list[str](), set[int](), threading.Event()

    def read() -> None:
        lake = corpus.pipeline().lake
        while not is_over.is_set():
            space = read_generations(lake).active
            found = pl.read_delta(f"{lake.root}/embeddings/{space}")["embedding"].list.len().unique().to_list()
            if len(found) != 1:
                problems.append(f"{space}: {found}")
            answers.update(found)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        corpus.set(MODEL=NEW)
        corpus.write("c/other.txt", "A whole partition that arrives.")
        corpus.sync()
        corpus.json("promote")
        corpus.json("rollback")
        corpus.json("rollback")
    finally:
        is_over.set()
        reader.join()
    assert not problems
    assert answers <= {16, 24} and 16 in answers


@pytest.mark.long
def test_a_kill_at_any_moment_of_a_promotion_leaves_one_active_space(corpus: Project) -> None:
    corpus.set(MODEL=NEW)
    corpus.sync()
    old, new = name_of(corpus, OLD), name_of(corpus, NEW)
    lake = corpus.pipeline().lake

    def promote() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "embed_assets.cli", "promote"]
        return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    started = time.monotonic()
    assert promote().wait() == 0
    seconds = time.monotonic() - started
    for share in (0.2, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0):
        if read_generations(lake).active == new:
            corpus.json("rollback")
        process = promote()
        try:
            process.wait(share * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        active = read_generations(lake).active
        assert active in (old, new)
        rows = pl.read_delta(f"{lake.root}/generations").filter(pl.col("is_current"))
        assert rows["active"].to_list() == [active]
    assert promote().wait() == 0
    assert read_generations(lake).active == new
