"""PDF: what is read of each page, what is not, and where the pages are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embed_assets.corpus.formats.page_text import Line, joined_pages, page_ranges
from embed_assets.corpus.formats.pdf import read_pdf
from embed_assets.corpus.items import BadRow
from embed_assets_tests.corpus.files import PICTURE, lines, pdf


def test_pages_are_paragraphs_and_have_their_starts() -> None:
    parsed = read_pdf(pdf(lines("One line.", "Two lines."), lines("Second page."), title="My Report"))
    assert parsed.text == "One line.\nTwo lines.\n\nSecond page."
    assert parsed.page_starts == (0, 22)
    assert (parsed.title, parsed.media_type, parsed.metadata) == ("My Report", "text/plain", {"pages": 2})


def test_paragraphs_are_told_by_distance_and_size() -> None:
    page = "\n".join(
        [lines("A heading", top=740, size=20), lines("First.", "Still.", top=700), lines("Next.", "Too.", top=650)]
    )
    assert read_pdf(pdf(page)).text == "A heading\n\nFirst.\nStill.\n\nNext.\nToo."


def test_pages_without_text_are_named() -> None:
    text = lines("A page of words that is long enough.")
    few = read_pdf(pdf(text, PICTURE, text, text, ""))
    assert few.metadata == {"pages": 5, "pages_without_text": "2"} and few.lost == ()
    [row] = read_pdf(pdf(text, PICTURE, PICTURE, PICTURE + "\n" + lines("4"))).lost
    assert (row.key, row.reason) == ("pages", "pages_without_text")
    assert "3 of its 4 pages" in row.detail and "2-4" in row.detail


def test_a_document_of_pictures_is_rejected() -> None:
    with pytest.raises(BadRow.Error, match="OCR") as caught:
        read_pdf(pdf(PICTURE, PICTURE))
    assert caught.value.row.reason == "empty"


def test_values_typed_into_forms_are_read() -> None:
    stream = b"/Tx BMC BT /F1 12 Tf 2 5 Td (Ada Lovelace) Tj ET EMC"
    font = b"/Resources << /Font << /F1 3 0 R >> >>"
    field = (
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (Ada Lovelace) "
        b"/Rect [150 715 400 735] /F 4 /AP << /N 7 0 R >> >>"
    )
    form = b"<< /Type /XObject /Subtype /Form /BBox [0 0 250 20] %s /Length %d >>\nstream\n%s\nendstream" % (
        font, len(stream), stream,
    )  # fmt: skip
    found = read_pdf(pdf(lines("Name:"), extra=[field, form], page_entries="/Annots [6 0 R]")).text
    assert found.split() == ["Name:", "Ada", "Lovelace"]


@pytest.mark.parametrize(
    "title", ["untitled", "Microsoft Word - x.doc", "C:\\reports\\a.pdf", "/home/me/a", "thesis.dvi"]
)
def test_titles_that_are_none(title: str) -> None:
    assert read_pdf(pdf(lines("x"), title=title.replace("\\", "\\\\"))).title == ""


def pages(*texts: str) -> list[list[Line]]:
    return [[Line(line) for line in text.split("\n")] for text in texts]


def test_running_headers_stay_where_they_stand_first_and_page_numbers_nowhere() -> None:
    body = ["alpha\nbeta\ngamma\ndelta", "one\ntwo\nthree\nfour", "red\ngreen\nblue\npink", "a\nb\nc\nd"]
    numbered = [f"The Report\nChapter {i // 2} {i + 5}\n{text}\n- {i + 1} -" for i, text in enumerate(body)]
    text, _ = joined_pages(pages(*numbered))
    assert text.count("The Report") == 1 and "- 1 -" not in text and "- 4 -" not in text
    assert all(line in text for part in body for line in part.split("\n"))
    assert text.startswith("The Report\nChapter 0 5\nalpha")


def test_page_numbers_beside_the_number_of_pages() -> None:
    text, _ = joined_pages(pages(*(f"a{i}\nb{i}\nc{i}\nd{i}\ne{i}\nPage {i} of 5" for i in range(1, 6))))
    assert "Page" not in text and all(f"c{i}" in text for i in range(1, 6))


def test_numbered_titles_are_not_running_headers() -> None:
    slides = [[Line(f"Question {i}", is_large=True), Line(f"answer {'abc'[i - 1]}")] for i in (1, 2, 3)]
    assert [line for line in joined_pages(slides)[0].split("\n") if line.startswith("Question")] == [
        "Question 1", "Question 2", "Question 3",
    ]  # fmt: skip
    figures = pages(*(f"Total {n}\nx\ny\nz\nw" for n in (13, 400, 7)))
    assert [f"Total {n}" in joined_pages(figures)[0] for n in (13, 400, 7)] == [True] * 3


def test_words_are_whole_and_ligatures_are_letters() -> None:
    text, _ = joined_pages(pages("an exam\ufffeple of a well\ufffeknown e\ufb03cient case", "a well-known one"))
    assert text == "an example of a well-known efficient case\n\na well-known one"
    assert joined_pages(pages("1 Scope . . . . . . . . 7\nsoft\u00adly"))[0] == "1 Scope ... 7\nsoftly"


@given(st.lists(st.lists(st.text("ab 1\ufffe-\u00ad", max_size=6), max_size=5), max_size=6))
def test_page_starts_ascend_within_the_text(texts: list[list[str]]) -> None:
    text, starts = joined_pages([[Line(line) for line in page] for page in texts])
    assert len(starts) == len(texts) and list(starts) == sorted(starts)
    assert all(0 <= start <= len(text) for start in starts)
    assert not starts or starts[0] == 0
    assert "\ufffe" not in text and "\u00ad" not in text


def test_page_ranges() -> None:
    assert page_ranges([2, 3, 4, 7, 9, 10]) == "2-4, 7, 9-10"
