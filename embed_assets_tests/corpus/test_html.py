"""Web pages: the text that a reader can get to see, without what surrounds it."""

from __future__ import annotations

import pytest

from embed_assets.corpus.formats.html import html_to_markdown


def markdown(html: str) -> str:
    return html_to_markdown(html).text.strip()


@pytest.mark.parametrize(
    ("html", "kept"),
    [
        ("<form><p>Prose in a form.</p><textarea>typed</textarea></form>", ["Prose in a form.", "typed"]),
        ("<body><form id=f><main><h1>Page</h1></main></form></body>", ["# Page"]),
        ("<header><h1>Headline</h1><p>Lead.</p></header><main>Body</main>", ["# Headline", "Lead.", "Body"]),
        ("<details><summary>Why?</summary><p>Because.</p></details>", ["Why?", "Because."]),
        ("<div role=tabpanel hidden><p>Second tab.</p></div>", ["Second tab."]),
        ('<div class="answer" style="display: none"><p>Folded.</p></div>', ["Folded."]),
        ("<nav><p>All there is.</p></nav>", ["All there is."]),
    ],
)
def test_text_is_kept(html: str, kept: list[str]) -> None:
    found = markdown(html)
    assert all(part in found for part in kept), found


@pytest.mark.parametrize(
    "html",
    [
        "<nav><a href=/>Noise</a></nav>",
        "<div role=navigation><ul><li>Noise</li></ul></div>",
        "<ul role=menu><li>Noise</li></ul>",
        '<a class="skip-link" href="#main">Noise</a>',
        "<div id=onetrust-consent-sdk>Noise</div>",
        '<div class="cookie-banner open">Noise</div>',
        "<script>Noise</script><style>Noise</style><svg><title>Noise</title></svg>",
        "<form><select><option>Noise</option></select><button type=submit>Noise</button></form>",
        '<p><img alt="" src="data:image/png;base64,Noise"><a href="data:text/plain,Noise">.</a></p>',
    ],
)
def test_template_noise_stays_out(html: str) -> None:
    found = markdown(f"{html}<p>Text.</p>")
    assert "Text." in found and "Noise" not in found


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("10<sup>6</sup> cells", "10^6 cells"),
        ("5 · 10<sup>-3</sup> m<sup>2</sup>/s", "5 · 10^-3 m^2/s"),
        ("x<sup>n+1</sup>", "x^(n+1)"),
        ("the 1<sup>st</sup> and 2<sup>nd</sup>", "the 1st and 2nd"),
        ('seen<sup><a href="#n1">[1]</a></sup>', "seen[[1]](#n1)"),
        ("H<sub>2</sub>O", "H2O"),
        ("Donau\u00addampfer", "Donaudampfer"),
    ],
)
def test_superscripts_and_soft_hyphens(html: str, expected: str) -> None:
    assert markdown(f"<p>{html}</p>") == expected


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ('Setup<a class="headerlink" href="#s">¶</a>', "# Setup"),
        ('<a class="header" href="#d">Data Types</a>', "# Data Types"),
        ('Install <a href="#install">#</a>', "# Install"),
        ('See <a href="/x">that</a>', "# See [that](/x)"),
    ],
)
def test_links_of_headings_to_themselves(heading: str, expected: str) -> None:
    assert markdown(f"<h1>{heading}</h1>") == expected


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<!-- <title>Draft</title> --><title>Real &amp; good</title>", "Real & good"),
        ('<script>"<title>js</title>"</script><h1>H</h1>', ""),
        ("<svg><title>Icon</title></svg><h1>H</h1>", ""),
        ("<title>Untitled Document</title>", ""),
    ],
)
def test_titles(html: str, expected: str) -> None:
    assert html_to_markdown(html).title == expected


CODE = "def f():\n    return 1"


@pytest.mark.parametrize(
    "html",
    [
        '<table class="highlighttable"><tr><td class="linenos"><pre>1\n2</pre></td>'
        f'<td class="code"><pre>{CODE}</pre></td></tr></table>',
        '<table><tbody><tr><td class="gutter"><pre>1\n2</pre></td>'
        f"<td class=code><pre>{CODE}</pre></td></tr></tbody></table>",
        '<table class="hljs-ln"><tr><td class="hljs-ln-numbers">1</td><td class="hljs-ln-code">def f():</td></tr>'
        '<tr><td class="hljs-ln-numbers">2</td><td class="hljs-ln-code">    return 1</td></tr></table>',
        '<table><tr><td data-line-number="1"></td><td class="blob-code"><b>def</b> f():</td></tr>'
        '<tr><td data-line-number="2"></td><td class="blob-code">    return 1</td></tr></table>',
    ],
)
def test_code_in_tables_keeps_its_lines(html: str) -> None:
    assert markdown(f"<p>Before.</p>{html}<p>After.</p>") == f"Before.\n\n```\n{CODE}\n```\n\nAfter."


def test_tables_without_code_stay_tables() -> None:
    html = "<table><tr><th>A</th><th>B</th></tr><tr><td>1</td><td><p>x</p><p>y</p></td></tr></table>"
    assert "| 1 | x y |" in markdown(html).replace("  ", " ")
