"""Markdown's outline and front matter: what counts as a heading, and what a heading says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embed_assets.corpus.front_matter import split_front_matter
from embed_assets.corpus.markdown import plain
from embed_assets.corpus.sections import MAX_SECTION_CHARACTERS, iter_sections
from embed_assets.corpus.structure import find_headings
from embed_assets.records import Document
from embed_assets_tests.corpus.test_parsing import one


def headings(text: str) -> list[str]:
    return [heading.title for heading in find_headings(text, "text/markdown")]


@pytest.mark.parametrize(
    "text",
    [
        "# A\n\nInline `<!--` mark.\n\n# B\n\nAn arrow --> here.\n",
        "# A\n\n`<pre` in code.\n\n# B\n\n</pre>\n",
        "# A\n\n```html\n<!-- open\n```\n\n# B\n\n--> end\n",
        "# A\n\nA block:\n\n    ```\n    code\n\n# B\n",
        "# A\n\nA block:\n\n\t~~~\n\tcode\n\n# B\n",
        "# A\n\n- item\n\n  text\n\nparagraph\n\n      ```\n\n# B\n",
        "# A\n\n1. item\n\n   ```\n   # no\n   ```\n\n# B\n",
        "# A\n\n* item\n\n    ```sh\n    # no\n    ```\n\n# B\n",
        "# A\n\n1. item\n\n   text\n\n    ```\n    # no\n    ```\n\n# B\n",
        "# A\n\n- item\n\n  text\n\n      ```\n\n# B\n",
        "# A\n\n- a\n  - b\n\n    ```\n    # no\n    ```\n\n# B\n",
        "# A\n\n10. item\n\n    ```\n    # no\n    ```\n\n# B\n",
        "# A\n\nA paragraph goes on\n    ```\n\n# B\n",
        "# A\n\n<!-- a comment\n# no\n-->\n\n# B\n",
        "# A\n\n<script>\n# no\n</script>\n<style>\n# no\n</style>\n\n# B\n",
        "# A\n\n````\n```\n# no\n````\n\n# B\n",
        "# A\n\nSee <!-- an unclosed mark.\n\n# B\n",
    ],
)
def test_what_is_a_heading(text: str) -> None:
    assert headings(text) == ["A", "B"]


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("[Data Types](#d)", "Data Types"),
        ('Setup[¶](#s "Permanent link")', "Setup"),
        ("[Config](https://host/a_(b)) and [more][ref]", "Config and more"),
        ("![Logo](logo.png) The **bold** and *slanted* `a*b*c` title", "Logo The bold and slanted a*b*c title"),
        ("Install {#install .note}", "Install"),
        ('<a id="x"></a>Anchors', "Anchors"),
        ("snake_case_name and __init__", "snake_case_name and init"),
        ("`__init__` of 2 * 3 * 4", "__init__ of 2 * 3 * 4"),
        (r"1\. Not a list \#", "1. Not a list #"),
        ("C# and ~~old~~ new", "C# and old new"),
        ("Set {a, b}", "Set {a, b}"),
    ],
)
def test_a_heading_without_its_marks(title: str, text: str) -> None:
    assert plain(title) == text


@pytest.mark.parametrize("part", ["[a](", "`" * 3 + "a``", "~~a", "*a _b", "[" * 9, "<a ", "\0", "\\"])
def test_hostile_headings_are_short_work(part: str) -> None:
    assert len(plain(part * 200_000)) <= 1000


@pytest.mark.parametrize(
    ("text", "title", "metadata", "rest"),
    [
        ('---\ntitle: "On: Windows"\ntags: [a, b]\n---\n\n# Step\n', "On: Windows", {"tags": ["a", "b"]}, "# Step\n"),
        ('+++\ntitle = "Page"\ndraft = true\n# note\n+++\nText.\n', "Page", {"draft": True}, "Text.\n"),
        ("---\ndate: 2024-02-01\n...\n\n# Step\n", "Step", {"date": "2024-02-01"}, "# Step\n"),
        ("---\ntitle: [a]\nx: !!set {b, a}\n---\nText.", "a.md", {"title": ["a"], "x": ["a", "b"]}, "Text."),
        ("---\nx: {2024-01-01: .nan, 1: y}\n---\nText.", "a.md", {"x": {"2024-01-01": None, "1": "y"}}, "Text."),
        ("---\r\ntitle: 7\r\n---\r\nText.", "7", {}, "Text."),
    ],
)
def test_front_matter_is_metadata(
    tmp_path: Path, text: str, title: str, metadata: dict[str, object], rest: str
) -> None:
    found = one(tmp_path, "a.md", text.encode())
    assert isinstance(found, Document)
    assert (found.title, json.loads(found.metadata), found.text) == (title, metadata, rest)


@pytest.mark.parametrize(
    "text",
    [
        "---\n\n# A rule above\n\n---\n",
        "---\njust text\n---\n# A\n",
        "---\ntitle: [unclosed\n---\n# A\n",
        "+++\nno toml\n+++\n",
        "---\na: &x [1]\nb: *x\n---\n# A\n",
        "---\n" + "[" * 16_000 + "\n---\n",
        "---\n" + "- " * 8_000 + "\n---\n",
        "---\n" + "? " * 8_000 + "\n---\n",
        "text\n---\na: 1\n---\n",
        "---\na: 0x" + "f" * 9000 + "\n---\n",
        "+++\na = 0x" + "f" * 9000 + "\n+++\n",
    ],
)
def test_what_is_no_front_matter_stays_text(text: str) -> None:
    assert split_front_matter(text) == ({}, text)


def test_a_fence_goes_on_in_the_next_section() -> None:
    code = "\n".join(f'{{"row": {i}}}\n# in code\n' for i in range(60_000))
    text = f"# Top\n\n```\n{code}\n```\n\n# After\n\nText.\n"
    sections = list(iter_sections(text, "text/markdown"))
    assert len(text) > MAX_SECTION_CHARACTERS and len(sections) > 1 and "".join(s.text for s in sections) == text
    assert [section.open_fence for section in sections] == [""] + ["```"] * (len(sections) - 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Long title\nof two lines\n====\n\nx", [(0, 1, "Long title of two lines")]),
        ("Words.\n\nTitle\nmore\n---\nx", [(8, 2, "Title more")]),
        ("- item\nTitle\n---\n", [(7, 2, "Title")]),
        ("# One\nTwo\n===\n", [(0, 1, "One"), (6, 1, "Two")]),
        ("a\nb\nc\nd\n---\nmore", []),
    ],
)
def test_setext_headings_of_several_lines(text: str, expected: list[tuple[int, int, str]]) -> None:
    found = find_headings(text, "text/markdown")
    assert [(heading.start, heading.depth, heading.title) for heading in found] == expected
