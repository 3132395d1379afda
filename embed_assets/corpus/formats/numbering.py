"""Counts the numbered paragraphs of a Word document (ECMA-376 part 1, section 17.9)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_LEVELS = 9
_PLACE = re.compile(r"%([1-9])")
_ROMAN = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"))
_ROMAN_ONES = ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")


@dataclass(frozen=True, slots=True)
class _Level:
    start: int
    format: str
    text: str
    """Such as '%1.%2', whose parts are the numbers of the levels."""


class Numbering:
    """The numbers of a document's paragraphs, in order."""

    def __init__(self, root: Any) -> None:
        """`root` is that of numbering.xml, None if the document has none."""
        self._levels: dict[str, list[_Level]] = {}
        self._abstract: dict[str, str] = {}
        self._counts: dict[str, list[int | None]] = {}
        if root is None:
            return
        by_style: dict[str, str] = {}
        linked: dict[str, str] = {}
        for element in root.iterchildren(f"{WORD}abstractNum"):
            key = str(element.get(f"{WORD}abstractNumId", ""))
            self._levels[key] = [_level(element, level) for level in range(_LEVELS)]
            by_style[_value(element, "styleLink")] = key
            linked[key] = _value(element, "numStyleLink")
        for element in root.iterchildren(f"{WORD}num"):
            key, base = str(element.get(f"{WORD}numId", "")), _value(element, "abstractNumId")
            base = by_style.get(linked.get(base, ""), base) if linked.get(base) else base
            overrides = element.findall(f"{WORD}lvlOverride")
            if overrides and base in self._levels:  # a list that is counted by itself
                levels = list(self._levels[base])
                for override in overrides:
                    at = _index(override.get(f"{WORD}ilvl"))
                    levels[at] = _overridden(levels[at], override, at)
                base = f"num {key}"
                self._levels[base] = levels
            self._abstract[key] = base

    def label(self, list_id: str, level: int) -> str | None:
        """What the next paragraph of a list and level begins with: '-', '2.', 'b)', '' or, without a list, None."""
        key = self._abstract.get(list_id)
        if key is None or key not in self._levels:
            return None
        at, levels = _index(level), self._levels[key]
        counts = self._counts.setdefault(key, [None] * _LEVELS)
        previous = counts[at]
        counts[at] = levels[at].start if previous is None else previous + 1
        counts[at + 1 :] = [None] * (_LEVELS - at - 1)
        if levels[at].format == "bullet":
            return "-"
        if levels[at].format == "none":
            return ""

        def number(match: re.Match[str]) -> str:
            i = int(match[1]) - 1
            count = counts[i]
            return _FORMATS.get(levels[i].format, str)(levels[i].start if count is None else count)

        return _PLACE.sub(number, levels[at].text).strip()


def _value(element: Any, name: str) -> str:
    """The value of the child of that name; '' if there is none."""
    child = element.find(WORD + name)
    return "" if child is None else str(child.get(f"{WORD}val", ""))


def _index(level: object) -> int:
    return min(max(int(str(level)), 0), _LEVELS - 1) if str(level).lstrip("-").isdecimal() else 0


def _level(parent: Any, at: int) -> _Level:
    for element in parent.iterchildren(f"{WORD}lvl"):
        if _index(element.get(f"{WORD}ilvl")) == at:
            start = _value(element, "start")
            number_format = _value(element, "numFmt") or "decimal"
            return _Level(int(start) if start.isdecimal() else 1, number_format, _value(element, "lvlText"))
    return _Level(1, "decimal", f"%{at + 1}.")


def _overridden(level: _Level, override: Any, at: int) -> _Level:
    if override.find(f"{WORD}lvl") is not None:
        level = _level(override, at)
    start = _value(override, "startOverride")
    return _Level(int(start), level.format, level.text) if start.isdecimal() else level


def _letters(number: int) -> str:
    """a to z, then aa, bb, as Word counts."""
    return chr(ord("a") + (number - 1) % 26) * min((number - 1) // 26 + 1, 10) if number > 0 else str(number)


def _roman(number: int) -> str:
    if not 0 < number < 4000:
        return str(number)
    digits = ""
    for value, sign in _ROMAN:
        digits += sign * (number // value)
        number %= value
    return digits + _ROMAN_ONES[number]


_FORMATS: dict[str, Callable[[int], str]] = {
    "lowerLetter": _letters,
    "upperLetter": lambda n: _letters(n).upper(),
    "lowerRoman": _roman,
    "upperRoman": lambda n: _roman(n).upper(),
    "decimalZero": lambda n: f"{n:02}",
}
"""All others are written as decimal numbers."""
