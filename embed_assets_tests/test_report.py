"""`embed-assets report` on a real lake: the page says what the tables hold."""

from __future__ import annotations

import json
import re
from typing import Any

from embed_assets_tests.conftest import Project, topic


def shown(project: Project) -> Any:
    """The data inside of the page."""
    page = (project.root / "report.html").read_text("utf-8")
    [found] = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def test_the_page_tells_of_the_lake(project: Project) -> None:
    project.set(MODEL="fake:16")
    for name in ("try", "with", "while", "for", "if", "class"):
        project.write(f"a/{name}.rst", topic(name))
    project.write("b/copy.rst", topic("try"))
    project.write("b/again.rst", topic("try"))
    project.write("b/broken.pdf", b"no PDF")
    project.sync()
    project.json("derive", "binary")
    found = project.json("report", "report.html")
    page = (project.root / "report.html").read_text("utf-8")
    assert found["bytes"] == len(page.encode())
    text = json.dumps(shown(project))
    for wanted in ("copy.rst", "broken.pdf", "fake:16", "binary", project.json("spaces")["active"]):
        assert wanted in text, wanted
    [repeated] = shown(project)["duplicates"]["partitions"]
    assert repeated["partition_key"] == "b" and 2 * repeated["repeated"] == repeated["chunks"]
    assert {tuple(each["places"]) for each in repeated["examples"]} == {("again.rst", "copy.rst")}
    assert {each["count"] for each in repeated["examples"]} == {2}


def test_an_empty_lake_has_a_report(project: Project) -> None:
    project.json("report", "report.html")
    assert "embed-assets sync" in (project.root / "report.html").read_text("utf-8")


def test_a_file_that_cannot_be_written_is_said(project: Project) -> None:
    assert "can be written" in project.json("report", "no/such/folder/report.html", exit_code=1)["error"]
