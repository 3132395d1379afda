"""Reads web pages as Markdown, so that the chunker sees their headings, lists and code."""

from __future__ import annotations

import html as html_entities
import re

from embed_assets.corpus.encoding import Undecodable, decode
from embed_assets.corpus.formats.code_tables import unfold_code_tables
from embed_assets.corpus.formats.parsed import Parsed, real_title, without_soft_hyphens
from embed_assets.corpus.formats.properties import html_properties
from embed_assets.corpus.items import BadRow

_NOISE = (
    *("nav", "[role=navigation]", "[role=search]", "[aria-label=breadcrumb]", ".breadcrumb", ".breadcrumbs"),
    *("[role=menu]", "[role=menubar]", ".sphinxsidebar", "#mdbook-help-container", ".theme-popup", ".test-arrow"),
    *(".skip-link", ".skip-main-content", ".skip-nav", ".skipnav", ".visually-hidden-focusable", ".sr-only-focusable"),
    *("svg", "select", "[type=submit]", "[type=reset]"),
    # Links of a heading to itself: Sphinx and MkDocs, Docusaurus, GitHub and others.
    *("a.headerlink", "a.hash-link", "a.header-anchor", "a.anchor", "a.anchorjs-link", "a.heading-anchor"),
    *("#cookie-banner", "#cookie-consent", "#cookie-notice", "#cookie-law-info-bar", "#onetrust-consent-sdk"),
    *("#CybotCookiebotDialog", "#usercentrics-root", ".cookie-banner", ".cookie-consent", ".cookie-notice"),
    *(".cookiebanner", ".cookieconsent", ".cc-window", ".cc-banner", ".gdpr-banner", "[aria-label='cookie consent']"),
)
"""CSS selectors of what surrounds a page's text."""
_RAISED = "\ue000"
"""Put around superscripts by the converter, then taken out again. A private use character, which no page needs."""
_SUPERSCRIPT = re.compile(f"{_RAISED}([^{_RAISED}\n]*){_RAISED}")
_NO_EXPONENT = re.compile(r"st|nd|rd|th|er|re|ers|e|ème|o|a|os|as|tm|sm|℠|™|®|©|\*+|\[.*", re.IGNORECASE)
"""Superscripts that are read without one: ordinals, marks, and links to notes."""
_TITLE_SEARCH_CHARACTERS = 1 << 16
"""How far into a page its title is looked for: the patterns take quadratic time on hostile pages."""
_NO_TITLE = re.compile(r"<!--.*?-->|<(script|style|svg|template)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
_HEADING = re.compile(r"^(#{1,6} )(.*)$", re.MULTILINE)
_LINK_TO_SELF = re.compile(r"\[([^\]]*)\]\(#[^)]*\)")
_PERMALINK_MARKS = frozenset({"", "#", "¶", "§", "🔗", "\u200b", "\\#", "link", "permalink"})


def read_html(data: bytes) -> Parsed:
    """The page as Markdown, its encoding declared or guessed. Raises ``BadRow.Error``."""
    try:
        return html_to_markdown(decode(data, html=True)[0])
    except Undecodable as error:
        raise BadRow.Error("undecodable", str(error)) from None


def html_to_markdown(html: str) -> Parsed:
    """The page as Markdown, without its scripts, styles, navigation and cookie banners, but with all that a reader can
    get to see, such as tabs and answers that are folded away. Raises ``BadRow.Error``.
    """
    properties = html_properties(html)
    html = unfold_code_tables(html.replace(_RAISED, ""))
    text = _convert(html, _NOISE)
    if not text.strip():  # a page may stand as a whole in an element that is noise elsewhere
        text = _convert(html, ())
    text = _SUPERSCRIPT.sub(lambda m: _superscript(m[1]), text)
    text = _HEADING.sub(lambda m: m[1] + _without_permalinks(m[2]), text)
    title = _TITLE.search(_NO_TITLE.sub("", html[:_TITLE_SEARCH_CHARACTERS]))
    found = real_title(html_entities.unescape(title[1])) if title else ""
    return Parsed(without_soft_hyphens(text), found, properties=properties)


def _convert(html: str, noise: tuple[str, ...]) -> str:
    """Markdown of a page without the elements that the selectors `noise` choose."""
    from html_to_markdown import ConversionOptions, PreprocessingOptions, convert

    options = ConversionOptions(
        extract_metadata=False,
        skip_images=True,
        inline_data_media="alt_text_only",
        code_block_style="backticks",
        sup_symbol=_RAISED,
        hidden_content="reachable",
        preprocessing=PreprocessingOptions(remove_navigation=False, remove_forms=False),
        exclude_selectors=list(noise),
    )
    try:
        result = convert(html, options)
    except Exception as error:  # the library raises all sorts of exceptions
        raise BadRow.Error("broken_file", f"its HTML could not be parsed: {error}") from error
    for warning in result.warnings:
        if str(warning.kind) == "depth_limit_exceeded":
            raise BadRow.Error("broken_file", f"its HTML is nested too deeply: {warning.message}")
    return result.content or ""


def _superscript(text: str) -> str:
    """A superscript with a mark that keeps an exponent apart from its base."""
    if not text.strip() or _NO_EXPONENT.fullmatch(text):
        return text
    return f"^{text}" if text.lstrip("+-−–").isalnum() else f"^({text})"


def _without_permalinks(heading: str) -> str:
    """A heading without links to itself; a link that is all of its text leaves the text."""
    return _LINK_TO_SELF.sub(lambda m: "" if m[1].strip().lower() in _PERMALINK_MARKS else m[1], heading).rstrip()
