"""Large new partitions: their first chunks are embedded while the last ones are still prepared."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from embed_assets_tests.conftest import Project


def write_large(project: Project, files: int = 10) -> None:
    """Half a megabyte per file, in one partition."""
    words = [f"word{i}" for i in range(3000)]
    for n in range(files):
        rng = random.Random(n)
        lines = [json.dumps({"id": i, "text": " ".join(rng.choices(words, k=75))}) for i in range(950)]
        project.write(f"big/{n}.jsonl", "\n".join(lines))


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_large_new_partition_is_embedded_once(project: Project, processes: str) -> None:
    project.set(PREPARE_PROCESSES=processes)
    write_large(project)
    answer = project.sync()
    assert (answer["partitions"]["big"]["chunks"], answer["embedded"], answer["reused"]) == (9500, 9500, 0)
    assert answer["tokens"] > 9500 * 75
    assert not list(Path("lake/embeddings").rglob("*.arrow"))
    assert len({row["chunk_id"] for row in project.rows("chunk_id")}) == 9500
    assert project.run("verify").exit_code == 0
    assert project.sync()["embedded"] == 0


def test_a_killed_run_keeps_what_it_embedded_ahead(project: Project) -> None:
    project.set(MODEL="fake:8~1000")
    write_large(project)
    process = project.start_sync()
    while not (staged := list(Path("lake/embeddings").rglob("*.arrow"))) and process.poll() is None:
        time.sleep(0.01)
    assert staged
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    project.set(MODEL="fake:8")
    answer = project.sync()
    assert answer["partitions"]["big"]["chunks"] == 9500
    assert answer["reused"] > 0 and answer["embedded"] + answer["reused"] == 9500
    assert project.run("verify").exit_code == 0
