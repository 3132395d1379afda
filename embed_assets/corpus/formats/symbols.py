"""Reads the characters of symbol fonts, whose codes are no Unicode. Pure functions."""

from __future__ import annotations

_SYMBOL = (
    "!∀#∃%&∋()∗+,−./0123456789:;<=>?≅ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ[∴]⊥_‾αβχδεφγηιϕκλμνοπθρστυϖωξψζ{|}∼",
    "€ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…⏐⎯↵ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊〈®©™∑⎛⎜⎝⎡⎢⎣⎧⎨⎩⎪",
    "〉∫⌠⎮⌡⎞⎟⎠⎤⎥⎦⎫⎬⎭",
)
"""From 0x21, 0xA0 and 0xF1 on: the encoding of the Symbol font
(https://www.unicode.org/Public/MAPPINGS/VENDORS/ADOBE/symbol.txt)."""
_CODES: dict[str, dict[int, str]] = {
    "symbol": {
        first + i: sign
        for first, signs in zip((0x21, 0xA0, 0xF1), _SYMBOL, strict=True)
        for i, sign in enumerate(signs)
    },
    "wingdings": {
        0x46: "☞", 0x4A: "☺", 0x4C: "☹", 0x6C: "●", 0x6D: "○", 0x6E: "■", 0x6F: "□", 0x71: "❑", 0x75: "◆", 0x76: "❖",
        0x77: "⬥", 0x9E: "·", 0x9F: "•", 0xA7: "▪", 0xA8: "☐", 0xAB: "★", 0xD8: "➢", 0xDF: "←", 0xE0: "→", 0xE1: "↑",
        0xE2: "↓", 0xE8: "➔", 0xEF: "⇦", 0xF0: "⇨", 0xF1: "⇧", 0xF2: "⇩", 0xFB: "✗", 0xFC: "✓", 0xFD: "☒", 0xFE: "☑",
    },
    "wingdings 2": {0x4F: "✗", 0x50: "✓", 0x51: "☒", 0x52: "☑", 0x53: "☒", 0x54: "☒", 0xA3: "☐"},
}  # fmt: skip
"""By font, in lower case. Of the Wingdings only marks that carry meaning."""
_PRIVATE_USE = 0xF000
"""Where Word puts the codes of symbol fonts: 0xF020 to 0xF0FF."""


def symbol(font: str, code: int) -> str:
    """The character that a symbol font shows for a code, a space where that is not known, so that nothing is glued."""
    low = code - _PRIVATE_USE if _PRIVATE_USE <= code <= _PRIVATE_USE + 0xFF else code
    signs = _CODES.get(font.lower())
    if signs is not None:
        return signs.get(low, " ")
    return chr(code) if low == code and not 0xD800 <= code < 0xE000 else " "


def from_private_use(font: str, text: str) -> str:
    """The text with the codes that Word keeps in the private use area replaced by what they show."""
    if not any("\uf020" <= c <= "\uf0ff" for c in text):
        return text
    known = font if font.lower() in _CODES else "symbol"
    return "".join(symbol(known, ord(c)) if "\uf020" <= c <= "\uf0ff" else c for c in text)
