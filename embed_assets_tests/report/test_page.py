"""The report's page: what it escapes, cuts and says, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from embed_assets.report import data as d
from embed_assets.report.attention import attention
from embed_assets.report.page import MAX_BYTES, render
from embed_assets_tests.report.browser import Browser, Page, chromium
from embed_assets_tests.report.example import (
    FACTS_ONLY,
    NOTHING_FOUND,
    REPORT,
    SECTIONS,
    with_points,
    with_texts,
)

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]><svg onload=alert(1)>",
    "\"'`&amp;&#60;\\u003c\\",
    "${title} $title $$",
    "\x00\x01\x1b\x7f\x85\r\n\t",
    "\u202e\u2066\u200f\u2028\u2029\ufeff\uffff",
    "👩‍👩‍👧 e\u0301 \U0010ffff",
    "\ud83d lone \udc00",
)


@dataclass
class Parsed(HTMLParser):
    """A page's elements with their attributes, and the texts of those that have only text."""

    page: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    open: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")

        self.open = tag

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in ("script", "style", "title"):
            self.texts[self.open][-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.texts["script"][0])

    @property
    def policy(self) -> str:
        found = [attributes for _, attributes in self.elements if "http-equiv" in attributes]
        return str(found[0]["content"])


def strings(value: Any) -> Iterator[str]:
    """All texts in parsed JSON, keys excluded."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings(item if name not in ("state", "attention", "created_at", "started_at") else None)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


TEXTS = st.one_of(st.text(max_size=100), st.sampled_from(HOSTILE))


@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
@example(text="".join(HOSTILE[:-1]))
@example(text=HOSTILE[-1])
def test_no_text_becomes_markup_and_all_are_kept(text: str) -> None:
    page = render(with_texts(REPORT, lambda _: text))
    parsed, harmless = Parsed(page.encode().decode()), Parsed(render(REPORT))
    assert parsed.elements == harmless.elements
    assert set(strings(parsed.data)) == {text[:159] + "…" if len(text) > 160 else text}


@settings(deadline=None, max_examples=30)
@given(text=st.text(max_size=160))
def test_the_title_is_on_one_line_without_what_hides(text: str) -> None:
    [title] = Parsed(render(replace(REPORT, title=text))).texts["title"]
    assert title == "".join(c if c.isprintable() else " " for c in text)


def test_the_block_of_data_is_plain_to_see() -> None:
    source = render(with_texts(REPORT, lambda text: text + "".join(HOSTILE)))
    block = source.partition('id="data">')[2].partition("</script>")[0]
    assert not re.search("[<>&\x00-\x1f\x7f-\x9f\u200f\u2028-\u202e\u2066\ufeff\uffff]", block)


def test_the_policy_allows_this_style_and_this_script_only() -> None:
    parsed = Parsed(render(REPORT))

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = dict(rule.strip().split(" ", 1) for rule in parsed.policy.split(";"))
    assert allowed.pop("default-src") == "'none'"
    assert allowed.pop("style-src") == source(parsed.texts["style"][0])
    assert allowed.pop("script-src") == source(parsed.texts["script"][1])
    assert allowed == {
        "img-src": "data:", "base-uri": "'none'", "form-action": "'none'", "require-trusted-types-for": "'script'"
    }  # fmt: skip


def test_nothing_in_the_page_names_another_host() -> None:
    page = render(REPORT).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|url\(|@import|\bimport\b|fetch\(|XMLHttp|innerHTML|document\.write", page)


WORST = ("word " * 400, "<" * 2000, "漢字" * 1000, "😀" * 2000, "\u202e" * 2000, "\x00" * 2000, '"' * 2000)


@pytest.mark.parametrize("text", WORST, ids=lambda text: ascii(text[:2]))
def test_a_page_is_never_too_large(text: str) -> None:
    report = with_points(text)
    partitions = tuple(d.Partition(f"{text[:200]}{i}", 1, 2, 2, 0) for i in range(12_000))
    page = render(replace(report, partitions=partitions))
    assert len(page.encode()) <= MAX_BYTES
    shown = Parsed(page).data
    assert len(shown["map"]["points"]) == d.MAX_POINTS
    assert {len(point["text"]) for point in shown["map"]["points"]} <= {300, 150, 75}
    assert (len(shown["partitions"]), shown["partitions_left_out"]) == (2000, 10_000)
    assert shown["totals"]["partitions"] == 12_000


def test_texts_of_usual_length_are_cut_to_snippets() -> None:
    [point] = Parsed(render(with_points("word " * 400, 1))).data["map"]["points"]
    assert point["text"] == ("word " * 400)[:299] + "…"


def test_more_points_than_a_map_has_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 5000 points, got 5001"):
        render(with_points("a", 5001))


def test_numbers_that_are_not_finite_are_missing() -> None:
    run = d.Run(REPORT.created_at, 0, 9, 0, float("nan"), float("inf"), "cpu", "float32")
    [shown] = Parsed(render(replace(REPORT, runs=(run,)))).data["runs"]
    assert (shown["tokens_per_second"], shown["seconds"], shown["reused"]) == (None, None, 9)


def test_lists_begin_with_what_matters() -> None:
    data = Parsed(render(REPORT)).data
    assert [p["partition_key"] for p in data["partitions"]] == ["letters", "manuals"]
    assert [run["embedded"] for run in data["runs"]] == [20, 60, 100]
    assert [g["state"] for g in data["generations"]] == ["active", "building", "retired"]


@given(same=st.integers(0, 400), first=st.text("ab c", max_size=400), second=st.text("de f", max_size=400))
@settings(deadline=None, max_examples=30)
def test_the_snippets_of_a_pair_have_their_first_difference(same: int, first: str, second: str) -> None:
    passages = [d.Passage("p", "d", "", "", "x y " * (same // 4) + text) for text in ("1" + first, "2" + second)]
    found = Parsed(render(replace(REPORT, duplicates=d.Duplicates((), (d.NearPair(0.99, *passages),))))).data
    [pair] = found["duplicates"]["pairs"]
    assert "1" in pair["first"]["text"] and "2" in pair["second"]["text"]


def test_what_needs_attention() -> None:
    notices = [(notice.level, notice.section, notice.text) for notice in attention(REPORT)]
    assert notices == [
        ("error", "partitions", "3 chunks in 1 of 2 partitions have no vector: letters (3). Run 'embed-assets sync'."),
        ("error", "duplicates", "More than 25 % of the chunks repeat another one in 1 partition: letters (40 %)."),
        ("warning", "generations", "e5-bbbb (building) fails 1 of 2 gates: coverage."),
        ("warning", "rejections", "2 of 15 documents were rejected, 13 %: empty (2)."),
        ("warning", "evaluation", "e5-bbbb is worse than minilm-aaaa: its nDCG@10 is lower by 0.100 on 50 queries."),
    ]  # fmt: skip


@pytest.mark.parametrize("report", [FACTS_ONLY, NOTHING_FOUND])
def test_nothing_needs_attention_where_nothing_was_found(report: d.Report) -> None:
    assert attention(report) == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: replace(r, generations=(replace(r.generations[1], state="ready"),)), "error generations"),
        (lambda r: replace(r, generations=(replace(r.generations[1], state="retired"),)), None),
        (lambda r: replace(r, rejections=replace(r.rejections, limit_percent=10.0)), "error rejections"),
        (lambda r: replace(r, norms=replace(r.norms, largest=1.1)), "error norms"),
        (lambda r: replace(r, tokens=replace(r.tokens, largest=300)), "warning tokens"),
        (lambda r: replace(r, duplicates=replace(r.duplicates, limit_percent=None)), None),
    ],
)  # fmt: skip
def test_limits_decide_what_needs_attention(change: Callable[[Any], d.Report], expected: str | None) -> None:
    changed = {f"{n.level} {n.section}" for n in attention(change(REPORT))}
    added = changed - {f"{n.level} {n.section}" for n in attention(REPORT)}
    assert added == ({expected} if expected else set())


# In a browser.

OTHER_TEXT = "Dear colleagues, the pumps are oiled."


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens the page of a report; afterwards no page has complained or asked for anything."""
    opened: list[Page] = []

    def open_page(report: d.Report, **options: Any) -> Page:
        file = tmp_path / f"{len(opened)}.html"
        file.write_text(render(report), "utf-8")
        opened.append(browser.open(file, **options))
        return opened[-1]

    yield open_page
    for number, page in enumerate(opened):
        page.settle()
        page.close()
        assert page.complaints() == []
        assert [url for url in page.requests() if not url.startswith("data:")] == [
            (tmp_path / f"{number}.html").as_uri()
        ]


def place_of(page: Page, number: int) -> tuple[float, float]:
    """Where a point of the example is in the window: its places are 0 to 10, and the map has a margin of 18."""
    page.run("document.querySelector('.map').scrollIntoView({block: 'center'})")
    x, y, width, height = page.run(
        "(b => [b.x, b.y, b.width, b.height])(document.querySelector('.map').getBoundingClientRect())"
    )
    point = REPORT.map.points[number]  # type: ignore[union-attr]
    return x + 18 + (width - 36) * point.x / 10, y + 18 + (height - 36) * (1 - point.y / 10)


def text_of(page: Page, selector: str) -> str:
    return str(page.run(f"document.querySelector({json.dumps(selector)}).textContent"))


@pytest.mark.long
def test_the_card_shows_the_chunk_under_the_pointer(show: Callable[..., Page]) -> None:
    page = show(REPORT)
    assert page.run("document.querySelector('.card').hidden")
    page.point(*place_of(page, 1))
    assert text_of(page, ".card .snippet") == "Close the valve first."
    assert text_of(page, ".card .place") == "manuals / pumps/p1.md"
    page.point(*place_of(page, 2))
    assert text_of(page, ".card .snippet") == OTHER_TEXT
    x, y = place_of(page, 2)
    page.point(x - 60, y + 60)
    assert page.run("document.querySelector('.card').hidden")


@pytest.mark.long
def test_a_pinned_card_stays_until_escape(show: Callable[..., Page]) -> None:
    page = show(REPORT)
    x, y = place_of(page, 2)
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        page.point(x, y, kind)
    page.point(x - 60, y + 60)
    assert text_of(page, ".card .snippet") == OTHER_TEXT
    page.press("Escape")
    assert page.run("document.querySelector('.card').hidden")


@pytest.mark.long
def test_arrow_keys_walk_from_dot_to_dot(show: Callable[..., Page]) -> None:
    page = show(REPORT)
    page.run("document.querySelector('.map').focus()")
    seen = []
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight"):
        page.press(key)
        seen.append(text_of(page, ".card .snippet"))
    # From the middle, the upper left dot is nearer; then there is none above it but the one at the right.
    assert seen[0] == "Close the valve first."
    assert seen[-1] == OTHER_TEXT


@pytest.mark.long
def test_the_legend_shows_and_hides_partitions(show: Callable[..., Page]) -> None:
    page = show(REPORT)
    paths = "[...document.querySelectorAll('.dots:not(.rest, .halo, .spot)')]"
    drawn = f"{paths}.map(path => path.getAttribute('d').split('M').length - 1)"
    assert page.run("[...document.querySelectorAll('.entry')].map(e => e.textContent)") == ["manuals2", "letters1"]
    assert page.run(drawn) == [2, 1]
    page.click(".entry")
    assert page.run(drawn) == [0, 1]
    assert page.run("document.querySelector('.entry').getAttribute('aria-pressed')") == "false"
    page.point(*place_of(page, 1))
    assert page.run("document.querySelector('.card').hidden")
    page.click(".entry")
    assert page.run(drawn) == [2, 1]
    page.click(".both button:last-child")
    assert page.run(drawn) == [0, 0]


@pytest.mark.long
def test_a_word_is_found_on_the_map_and_in_its_table(show: Callable[..., Page]) -> None:
    page = show(REPORT)
    rows = "[...document.querySelectorAll('#map details tbody tr')].map(row => row.lastChild.textContent)"
    page.click("#map summary")
    assert page.run(f"{rows}.length") == 3
    page.click("#map input")
    page.call("Input.insertText", text="VALVE")
    page.settle()
    assert page.run(rows) == ["Close the valve first."]
    assert text_of(page, "#map .search span") == "in 1 chunk"


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_have_dots_bars_and_lines(show: Callable[..., Page], scheme: str) -> None:
    page = show(with_points("text", 400), media={"prefers-color-scheme": scheme})
    assert page.run("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    empty = page.run(
        "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width < 100"
        " || !s.querySelector('path[d^=M], rect[height], circle')).length"
    )
    assert (empty, page.run("document.querySelectorAll('svg').length")) == (0, 6)
    assert colors_of_map(page) > 0


def colors_of_map(page: Page) -> int:
    """How many colors a screenshot has where the map is that are far from its ground."""
    place_of(page, 0)
    page.settle()
    box = page.run("(b => [b.x, b.y, b.right, b.bottom])(document.querySelector('.map').getBoundingClientRect())")
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").crop(tuple(round(side) for side in box))
    pixels = np.asarray(picture, int).reshape(-1, 3)
    ground = pixels[picture.width // 2]
    return len(np.unique(pixels[np.abs(pixels - ground).sum(axis=1) > 100], axis=0))


@pytest.mark.long
def test_hostile_texts_are_shown_as_texts(show: Callable[..., Page]) -> None:
    hostile = "".join(HOSTILE[:4]) + "\x00\u202e\u2066abc"
    page = show(with_texts(REPORT, lambda text: f"{hostile}{text}"))
    plain = show(REPORT)
    count = "document.querySelectorAll('script, style, img, iframe, link, svg, meta').length"
    assert page.run(count) == plain.run(count)
    page.point(*place_of(page, 1))
    expected = (hostile + "Close the valve first.").replace("\x00", "\u2400")
    expected = expected.replace("\u202e", "[U+202E]").replace("\u2066", "[U+2066]")
    assert text_of(page, ".card .snippet") == expected
    assert page.run("document.querySelector('h1').textContent").endswith("The pumps of plant 7")


@pytest.mark.long
@pytest.mark.parametrize("report", [FACTS_ONLY, NOTHING_FOUND])
def test_empty_sections_say_so(show: Callable[..., Page], report: d.Report) -> None:
    page = show(report)
    for name, section in SECTIONS.items():
        said, part = text_of(page, f"#{section} .absent"), getattr(report, name)
        assert said.endswith(".") and said.count(" ") > 2
        assert not isinstance(part, d.Absent) or part.why in text_of(page, f"#{section}")
    assert page.run("document.querySelectorAll('svg, table').length") == 0
    assert "Nothing: all that was measured" in text_of(page, "#attention")


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_one_absent_section_leaves_the_others(show: Callable[..., Page], name: str) -> None:
    absent = replace(REPORT, **{name: d.Absent("It was not looked for: set EMBED_SOMETHING.")})
    page = show(absent)
    assert page.run("[...document.querySelectorAll('.absent')].map(e => e.textContent)") == [
        "It was not looked for: set EMBED_SOMETHING."
    ]


@pytest.mark.long
def test_of_many_partitions_the_legend_names_the_largest(show: Callable[..., Page]) -> None:
    def point(i: int) -> d.MapPoint:
        key = f"part-{i % 10}" if i < 100 else f"part-{i}"
        return d.MapPoint(key, "a.md", "", "", "text", x=float(i % 70), y=float(i // 70))

    points = tuple(map(point, range(4000)))
    partitions = tuple(d.Partition(f"part-{i}", 1, 2, 2, 0) for i in range(10_000))
    page = show(replace(REPORT, map=d.VectorMap(points, 4000, "t-SNE"), partitions=partitions))
    names = page.run("[...document.querySelectorAll('.entry .name')].map(e => e.textContent)")
    assert len(names) == 13
    assert names[:10] == [f"part-{i}" for i in range(10)]
    assert names[-1] == "3,898 other partitions"
    assert "10,000" in text_of(page, "header")
    assert "leaves out 8,000 partitions" in text_of(page, "#partitions")
    assert page.run("document.querySelectorAll('#partitions tbody tr').length") == 12


@pytest.mark.long
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_its_window(show: Callable[..., Page], width: int) -> None:
    page = show(with_texts(REPORT, lambda text: text + "long" * 60), width=width)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.long
def test_the_page_can_be_printed(show: Callable[..., Page]) -> None:
    assert show(REPORT, media={"prefers-color-scheme": "dark"}).pdf().startswith(b"%PDF")


@pytest.mark.long
def test_headings_sort_tables(show: Callable[..., Page]) -> None:
    partitions = tuple(d.Partition(key, count, 1, 1, 0) for key, count in (("b", 9), ("a", 100), ("c", 20), ("d", 3)))
    page = show(replace(REPORT, partitions=partitions))
    first = "[...document.querySelectorAll('#partitions tbody tr')].map(row => row.firstChild.textContent).join('')"
    page.click("#partitions th:nth-child(2) button")
    assert page.run(first) == "dbca"
    page.click("#partitions th:nth-child(2) button")
    assert page.run(first) == "acbd"
    page.click("#partitions th:nth-child(1) button")
    assert page.run(first) == "abcd"


@pytest.mark.long
def test_the_theme_goes_from_the_systems_to_light_and_dark(show: Callable[..., Page]) -> None:
    page = show(REPORT, media={"prefers-color-scheme": "dark"})
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.run(ground)
    page.click("#theme")
    assert page.run(ground) != dark
    page.click("#theme")
    assert page.run(ground) == dark
