"""Random histories of a corpus and its settings: syncs follow the plan, and the table equals that of a fresh start."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from embed_assets_tests.conftest import Project

COUNTS = {"chunks_to_embed": "embedded", "chunks_to_reuse": "reused", "chunks_to_drop": "dropped", "tokens": "tokens"}
CONTENT = "partition_key document_id chunk_index text heading_path char_start char_end title uri input_hash embedding"


def change_corpus(project: Project, rng: random.Random) -> None:
    """Write, edit, delete, rename, copy or touch a document."""
    paragraphs = [f"Paragraph {i} of words. " + "alpha beta gamma. " * rng.randint(1, 20) for i in range(12)]
    files = [f for f in project.landing.rglob("*") if f.is_file()]
    place = f"{rng.choice(['a', 'b', 'c/d', '.'])}/{rng.choice('pqr')}{rng.choice(['.md', '.jsonl', '.xyz'])}"
    what = rng.random()
    if what < 0.45 or not files:
        if place.endswith(".jsonl"):
            rows = [json.dumps({"text": rng.choice(paragraphs)}) for _ in range(rng.randint(0, 4))]
            text = "\n".join([*rows, *["no JSON"] * rng.randint(0, 1)])
        else:
            text = "\n\n".join(rng.choice([*paragraphs, "# Heading"]) for _ in range(rng.randint(0, 6)))
        project.write(place, text)
        return
    file = rng.choice(files)
    if what < 0.6:
        file.unlink()
    elif what < 0.7:
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    elif what < 0.8:
        file.rename(file.with_name(rng.choice("xyz") + file.suffix))
    elif what < 0.9:
        file.with_name(rng.choice("uvw") + file.suffix).write_bytes(file.read_bytes())
    else:
        file.write_text(file.read_text().replace("alpha", "delta", 1))


def change_settings(project: Project, rng: random.Random) -> None:
    name, values = rng.choice(
        [
            ("MODEL", ["fake:16", "fake:8", "fake:16@other"]),
            ("PARTITION_BY", ["folder", "file", "hash:3"]),
            ("CHUNK_TOKENS", ["16", "64", "auto"]),
            ("PROMPT", ["", "passage: "]),
        ]
    )
    project.set(**{name: rng.choice(values)})


def content(project: Project) -> list[str]:
    return sorted(str(row) for row in project.rows(*CONTENT.split()))


@pytest.mark.parametrize(
    ("seed", "reuse", "rounds"),
    [
        (3, "table", 3),
        pytest.param(1, "partition", 10, marks=pytest.mark.long),
        pytest.param(2, "table", 10, marks=pytest.mark.long),
    ],
)
def test_any_history_ends_with_the_same_table_as_a_fresh_start(
    project: Project, seed: int, reuse: str, rounds: int
) -> None:
    rng = random.Random(seed)
    project.set(REUSE=reuse)
    for round_number in range(rounds):
        for _ in range(rng.randint(0, 5)):
            change_corpus(project, rng)
        if rng.random() < 0.5:
            change_settings(project, rng)
        plan, answer = project.json("plan", "--count"), project.sync()
        planned = {name: plan[name] for name in COUNTS}
        assert planned == {name: answer[counted] for name, counted in COUNTS.items()}, round_number
        assert {p["state"] for p in project.sync()["partitions"].values()} <= {"fresh"}
        counted = sum(p["documents"] for p in answer["partitions"].values())
        assert counted == len(project.rows("document_id", table="raw_documents"))
        assert project.json("verify")["ok"]
        assert not list(Path("lake").rglob("_staging/*"))
        if round_number % 3 == 2:
            grown = content(project)
            project.set(LAKE=f"fresh{round_number}")
            shutil.move(".dagster", "kept")
            project.sync()
            assert content(project) == grown
            shutil.rmtree(".dagster")
            shutil.move("kept", ".dagster")
            project.set(LAKE="lake")
