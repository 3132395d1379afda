"""Word documents: everything that a reader sees in the body, once, and nothing else."""

from __future__ import annotations

import pytest

from embed_assets.corpus.formats.word import read_word
from embed_assets.corpus.items import BadRow
from embed_assets_tests.corpus.files import docx, paragraph, table, zipped


def markdown(body: str, **parts: str) -> str:
    return read_word(docx(body, **parts)).text


def box(text: str) -> str:
    return f"<w:txbxContent>{paragraph(text)}</w:txbxContent>"


def run(content: str, properties: str = "") -> str:
    return f"<w:r><w:rPr>{properties}</w:rPr>{content}</w:r>"


def content_control(content: str, properties: str = "") -> str:
    return f"<w:sdt><w:sdtPr>{properties}</w:sdtPr><w:sdtContent>{content}</w:sdtContent></w:sdt>"


def test_rows_and_cells_in_content_controls() -> None:
    cells = [f"<w:tc>{paragraph(text)}</w:tc>" for text in "ab"]
    row = f"<w:tr>{content_control(cells[0])}{cells[1]}</w:tr>"
    assert markdown(f"<w:tbl>{content_control(row)}{row}</w:tbl>") == "| a | b |\n| a | b |"


def test_a_field_that_nobody_filled_in_has_no_text() -> None:
    hint = content_control(run("<w:t>Click to enter text.</w:t>"), "<w:showingPlcHdr/>")
    assert markdown(f"<w:p>{run('<w:t>Name: </w:t>')}{hint}</w:p>") == "Name:"


def test_cells_of_several_blocks_stay_on_one_line() -> None:
    inner = table([paragraph("1"), paragraph("2")], [paragraph("3"), paragraph("4")])
    cell = paragraph("one") + paragraph("two") + inner + paragraph("three")
    assert markdown(table([paragraph("x"), cell])) == "| x | one two 1 | 2; 3 | 4 three |"


def test_a_table_of_one_column_only_frames_its_content() -> None:
    assert markdown(table([paragraph("one") + paragraph("two")], [paragraph("three")])) == "one\n\ntwo\n\nthree"


def test_deleted_rows_cells_and_paragraph_ends() -> None:
    rows = f"<w:tr><w:trPr><w:del/></w:trPr><w:tc>{paragraph('gone')}</w:tc></w:tr>" + (
        f"<w:tr><w:tc>{paragraph('kept')}</w:tc><w:tc><w:tcPr><w:cellDel/></w:tcPr>{paragraph('lost')}</w:tc>"
        f"<w:tc>{paragraph('also')}</w:tc></w:tr>"
    )
    joined = paragraph("One ", "<w:rPr><w:del/></w:rPr>") + paragraph("sentence.")
    assert markdown(f"<w:tbl>{rows}</w:tbl>{joined}") == "| kept | also |\n\nOne sentence."
    assert markdown(paragraph("The end", "<w:rPr><w:del/></w:rPr>")) == "The end"


def test_a_text_box_counts_once_whichever_branch_has_its_text() -> None:
    def alternatives(choice: str, fallback: str) -> str:
        branches = f'<mc:Choice Requires="wps">{choice}</mc:Choice><mc:Fallback>{fallback}</mc:Fallback>'
        return (
            f"<w:p><w:r><w:t>Anchor.</w:t></w:r><w:r><mc:AlternateContent>{branches}</mc:AlternateContent></w:r></w:p>"
        )

    assert markdown(alternatives(box("Box."), box("Box."))) == "Anchor.\n\nBox."
    assert markdown(alternatives("<w:drawing/>", box("Box."))) == "Anchor.\n\nBox."
    assert markdown(alternatives(box("Box."), "")) == "Anchor.\n\nBox."


def test_notes_stand_below_the_paragraph_that_has_their_mark() -> None:
    footnote, endnote = run('<w:footnoteReference w:id="2"/>'), run('<w:endnoteReference w:id="1"/>')
    body = f"<w:p>{run('<w:t>Claim</w:t>')}{footnote}{run('<w:t>.</w:t>')}</w:p>" + paragraph("Next.")
    notes = [f'<w:footnote w:id="{i}">{paragraph(text)}</w:footnote>' for i, text in ((0, "---"), (2, "Proof."))]
    found = markdown(
        body + f"<w:p>{run('<w:t>More</w:t>')}{endnote}</w:p>",
        footnotes="".join(notes),
        endnotes=f'<w:endnote w:id="1">{paragraph("Source.")}</w:endnote>',
    )
    assert found == "Claim[^2].\n\n[^2]: Proof.\n\nNext.\n\nMore[^e1]\n\n[^e1]: Source."


def style(name: str, more: str = "", based_on: str = "", style_id: str = "") -> str:
    return (
        f'<w:style w:type="paragraph" w:styleId="{style_id or name.replace(" ", "")}"><w:name w:val="{name}"/>'
        f'<w:basedOn w:val="{based_on}"/><w:pPr>{more}</w:pPr></w:style>'
    )


def styled(text: str, style_id: str, more: str = "") -> str:
    return paragraph(text, f'<w:pStyle w:val="{style_id}"/>{more}')


def test_headings_by_derived_styles_and_outline_levels() -> None:
    styles = (
        style("heading 2")
        + style("Berichtstitel", based_on="heading2")
        + style("Chapter", '<w:outlineLvl w:val="0"/>')
        + style("Circle", based_on="Ring")
        + style("Ring", based_on="Circle")
    )
    body = (
        styled("A", "Berichtstitel") + styled("B", "Chapter") + styled("C", "Chapter", '<w:outlineLvl w:val="9"/>')
        + styled("D", "Circle") + styled("E", "Heading3") + paragraph("F", '<w:outlineLvl w:val="3"/>')
    )  # fmt: skip
    assert markdown(body, styles=styles) == "## A\n\n# B\n\nC\n\nD\n\n### E\n\n#### F"


LEVELS = (
    '<w:abstractNum w:abstractNumId="1"><w:lvl w:ilvl="0"><w:start w:val="3"/><w:numFmt w:val="decimal"/>'
    '<w:lvlText w:val="%1."/></w:lvl>'
    '<w:lvl w:ilvl="1"><w:numFmt w:val="lowerLetter"/><w:lvlText w:val="%1.%2)"/></w:lvl>'
    '<w:lvl w:ilvl="2"><w:numFmt w:val="bullet"/><w:lvlText w:val="*"/></w:lvl></w:abstractNum>'
    '<w:num w:numId="7"><w:abstractNumId w:val="1"/></w:num>'
    '<w:num w:numId="8"><w:abstractNumId w:val="1"/>'
    '<w:lvlOverride w:ilvl="0"><w:startOverride w:val="1"/></w:lvlOverride></w:num>'
)


def item(text: str, level: int, list_id: int = 7) -> str:
    return paragraph(text, f'<w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="{list_id}"/></w:numPr>')


def test_numbered_lists_have_their_numbers() -> None:
    body = item("x", 0) + item("y", 1) + item("z", 1) + item("dot", 2) + item("next", 0) + item("again", 1)
    found = markdown(body + item("other", 0, 8) + item("no list", 0, 0), numbering=LEVELS).split("\n\n")
    assert found == ["3. x", "  3.a) y", "  3.b) z", "    - dot", "4. next", "  4.a) again", "1. other", "no list"]


def test_headings_have_their_numbers() -> None:
    styles = style("heading 1", '<w:numPr><w:numId w:val="7"/></w:numPr>')
    assert markdown(styled("Scope", "heading1"), styles=styles, numbering=LEVELS) == "# 3. Scope"


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("<m:f><m:num><m:r><m:t>a+b</m:t></m:r></m:num><m:den><m:r><m:t>2</m:t></m:r></m:den></m:f>", "(a+b)/2"),
        ("<m:rad><m:deg/><m:e><m:r><m:t>x</m:t></m:r></m:e></m:rad>", "√(x)"),
        (
            '<m:nary><m:naryPr><m:chr m:val="∑"/></m:naryPr><m:sub><m:r><m:t>i=1</m:t></m:r></m:sub>'
            "<m:sup><m:r><m:t>n</m:t></m:r></m:sup><m:e><m:r><m:t>i</m:t></m:r></m:e></m:nary>",
            "∑_(i=1)^n i",
        ),
        (
            '<m:d><m:dPr><m:begChr m:val="["/><m:endChr m:val="]"/></m:dPr><m:e><m:r><m:t>x</m:t></m:r></m:e></m:d>',
            "[x]",
        ),
    ],
)
def test_equations(equation: str, expected: str) -> None:
    assert markdown(f"<w:p>{run('<w:t>Is </w:t>')}<m:oMath>{equation}</m:oMath></w:p>") == f"Is {expected}"


def test_symbols_fields_and_hidden_text() -> None:
    body = (
        run('<w:sym w:font="Wingdings" w:char="F0FE"/>')
        + run("<w:t>\uf061</w:t>", '<w:rFonts w:ascii="Symbol"/>')
        + '<w:fldSimple w:instr="SEQ Figure"><w:r><w:t>7</w:t></w:r></w:fldSimple>'
        + run("<w:instrText>PAGE</w:instrText>")
        + run("<w:t>secret</w:t>", "<w:vanish/>")
        + run("<w:t>shown</w:t>", '<w:vanish w:val="0"/>')
        + run("<w:t>4711</w:t><w:noBreakHyphen/><w:t>soft</w:t><w:softHyphen/><w:t>ly</w:t>")
    )
    assert markdown(f"<w:p>{body}</w:p>") == "☑α7shown4711-softly"


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Annual Report", "Annual Report"),
        ("Word Document", "Heading"),
        ("Microsoft Word - x.doc", "Heading"),
        ("", "Heading"),
    ],
)
def test_titles(title: str, expected: str) -> None:
    styles = style("Title")
    assert read_word(docx(styled("Heading", "Title"), title, styles=styles)).title == expected


def test_strict_documents_are_read_too() -> None:
    space = 'xmlns:w="http://purl.oclc.org/ooxml/wordprocessingml/main"'
    document = f"<w:document {space}><w:body>{paragraph('x')}</w:body></w:document>"
    assert read_word(zipped({"word/document.xml": document})).text == "x"


@pytest.mark.parametrize("files", [{"a.txt": "x"}, {"word/document.xml": "<w:document"}, {"word/document.xml": "<x/>"}])
def test_archives_that_are_no_word_documents(files: dict[str, str]) -> None:
    with pytest.raises(BadRow.Error) as caught:
        read_word(zipped(files))
    assert caught.value.row.reason == "broken_file" and "Word document" in caught.value.row.detail
