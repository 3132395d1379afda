"""What a person is told: what could not be read and why, what the model can't tell apart, and no control characters."""

from __future__ import annotations

import json

from embed_assets.console import visible
from embed_assets.defs.instance import open_instance
from embed_assets_tests.conftest import SAMPLE_MODEL, Project
from embed_assets_tests.defs.test_checks import failing

THAI = "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย\n\n" * 30


def test_a_sync_ends_with_rejections_by_reason(project: Project) -> None:
    for i in range(5):
        project.write(f"a/{i}.bin", b"\x00")
    project.write("b/empty.md", " ")
    project.write("b/good.md", "Good.")
    lines = project.run("sync").stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("not read: 6 files or rows"))
    assert lines[at + 1] == "  unsupported_format (5): a/0.bin, a/1.bin, a/2.bin, ..."
    assert "EMBED_IGNORE" in lines[at + 2]
    assert lines[at + 3].startswith("  empty (1): b/empty.md")
    again = project.sync()
    assert [(each["reason"], each["count"]) for each in again["rejections"]] == [
        ("unsupported_format", 5),
        ("empty", 1),
    ]


def test_all_rejections_can_be_listed(project: Project) -> None:
    project.write("a/x.bin", b"\x00")
    project.write("b/empty.md", " ")
    assert project.json("rejected") == {"rejected": []}
    project.sync()
    assert [row["document_id"] for row in project.json("rejected")["rejected"]] == ["x.bin", "empty.md"]
    [row] = project.json("rejected", "--reason", "empty")["rejected"]
    assert row == {"partition_key": "b", "document_id": "empty.md", "reason": "empty", "detail": row["detail"]}
    assert "b/empty.md: empty" in project.run("rejected").stdout


def test_control_characters_of_documents_are_shown_and_not_obeyed(project: Project) -> None:
    project.write("a/one.txt", "red \x1b[31mtext\x1b[0m \x9b31m \u202eevil\u202c")
    project.write("a/\x1b[2Jtwo.txt", "red too")
    project.write("a/\x1b[2J.bin", b"\x00")
    for arguments in (["sync"], ["search", "red"], ["search", "red", "--json"], ["rejected"], ["sync", "--json"]):
        result = project.run(*arguments)
        assert not set("\x1b\x9b\x07\u202e") & set(result.output), arguments
    assert "\\u001b[31mtext" in project.run("search", "red").stdout
    found = json.loads(project.run("search", "red", "--json").stdout)["results"]
    assert any("\x1b[31mtext" in row["text"] for row in found), "JSON still has the text itself"
    assert visible("a\tb\nc [bold]") == "a\tb\nc [bold]"


def test_texts_unknown_to_the_tokenizer_are_noticed(project: Project) -> None:
    project.set(MODEL=f"fake:16+{SAMPLE_MODEL}")
    project.write("th/a.txt", THAI)
    project.write("en/a.txt", "Bangkok is the capital of Thailand.")
    planned = project.run("plan", "--count")
    assert "of the tokens of 'th' are unknown" in planned.stderr and "'en'" not in planned.stderr
    rows = {row["partition_key"]: row for row in project.json("plan", "--count")["partitions"]}
    assert rows["en"]["unknown_tokens"] == 0 and rows["th"]["unknown_tokens"] > 0.9 * rows["th"]["tokens"] - 60
    done = project.run("sync")
    assert "of the tokens of 'th' are unknown" in done.stderr and "EMBED_MODEL" in done.stderr
    with open_instance() as instance:
        assert "unknown_token_share" in failing(instance, "th") and "unknown_token_share" not in failing(instance, "en")
    assert "unknown" not in project.run("sync").stderr, "only of what was done"


def test_a_byte_level_tokenizer_knows_every_text(project: Project) -> None:
    project.write("th/a.txt", THAI)
    assert project.sync()["unknown_tokens"] == 0
