"""A corpus of hostile files and names: everything is accounted for, and the harmless files are embedded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from embed_assets_tests.conftest import Project
from embed_assets_tests.hostile import write_hostile_corpus

pytestmark = pytest.mark.long


def test_two_hundred_hostile_files_are_all_accounted_for(project: Project) -> None:
    written = write_hostile_corpus(project.landing)
    assert written.files >= 200
    project.set(MAX_FILE_BYTES=str(8 << 20))
    answer = project.sync()
    states = {key: row["state"] for key, row in answer["partitions"].items() if row["state"] != "materialized"}
    assert not states, answer["partitions"]
    documents = sum(row["documents"] for row in answer["partitions"].values())
    rejected = sum(row["rejected"] for row in answer["partitions"].values())
    reasons = Counter(row["reason"] for row in project.rows("reason", table="rejected_documents"))
    assert documents + rejected == written.items, reasons
    embedded = {row["text"] for row in project.rows("text")}
    assert set(written.harmless_texts) <= embedded
    assert not any("must not be read" in text or "root:" in text for text in embedded)
    assert not Path("/tmp/evil").exists()
    assert project.json("verify")["ok"]
    again = project.sync()
    assert again["embedded"] == 0
    assert {row["state"] for row in again["partitions"].values()} == {"fresh"}
