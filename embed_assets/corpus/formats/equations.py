"""Writes Office equations (OMML, ECMA-376 part 1, section 22.1) on one line, such as 'x_i^2/(a+b)'. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_WORD_TEXT = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}t"


def linear(element: Any) -> str:
    """The equation on one line."""
    if not isinstance(element.tag, str):  # a comment or processing instruction
        return ""
    if element.tag in (f"{_MATH}t", _WORD_TEXT):
        return element.text or ""
    write = _WRITERS.get(str(element.tag).removeprefix(_MATH))
    return write(element) if write else "".join(linear(child) for child in element)


def _part(element: Any, name: str) -> str:
    found = element.find(_MATH + name)
    return linear(found) if found is not None else ""


def _parts(element: Any, name: str) -> list[str]:
    return [linear(found) for found in element.iterchildren(_MATH + name)]


def _operand(text: str) -> str:
    """The text in parentheses, unless it reads as one thing."""
    return text if text.isalnum() or len(text) == 1 else f"({text})"


def _scripts(element: Any) -> str:
    """What stands below and above, as '_i^2'."""
    below, above = _part(element, "sub"), _part(element, "sup")
    return (f"_{_operand(below)}" if below else "") + (f"^{_operand(above)}" if above else "")


def _property(element: Any, name: str, default: str) -> str:
    """A character that the element's properties name; the default where they name none."""
    found = element.find(f"{_MATH}{element.tag.removeprefix(_MATH)}Pr/{_MATH}{name}")
    return default if found is None else str(found.get(f"{_MATH}val", ""))


def _fraction(element: Any) -> str:
    return f"{_operand(_part(element, 'num'))}/{_operand(_part(element, 'den'))}"


def _root(element: Any) -> str:
    degree = _part(element, "deg")
    return f"{f'root_{_operand(degree)}' if degree else '√'}({_part(element, 'e')})"


def _large_operator(element: Any) -> str:
    return f"{_property(element, 'chr', '∫')}{_scripts(element)} {_part(element, 'e')}"


def _delimited(element: Any) -> str:
    between = _property(element, "sepChr", "|").join(_parts(element, "e"))
    return f"{_property(element, 'begChr', '(')}{between}{_property(element, 'endChr', ')')}"


def _function(element: Any) -> str:
    return f"{_part(element, 'fName')} {_part(element, 'e')}"


def _matrix(element: Any) -> str:
    return "; ".join(", ".join(_parts(row, "e")) for row in element.iterchildren(f"{_MATH}mr"))


_WRITERS: dict[str, Callable[[Any], str]] = {
    "f": _fraction,
    "rad": _root,
    "nary": _large_operator,
    "d": _delimited,
    "func": _function,
    "m": _matrix,
    "eqArr": lambda e: "; ".join(_parts(e, "e")),
    "sSup": lambda e: _part(e, "e") + _scripts(e),
    "sSub": lambda e: _part(e, "e") + _scripts(e),
    "sSubSup": lambda e: _part(e, "e") + _scripts(e),
    "sPre": lambda e: _scripts(e) + _part(e, "e"),
    "limLow": lambda e: f"{_part(e, 'e')}_{_operand(_part(e, 'lim'))}",
    "limUpp": lambda e: f"{_part(e, 'e')}^{_operand(_part(e, 'lim'))}",
    "acc": lambda e: _part(e, "e") + _property(e, "chr", "\u0302"),
}
"""By element name. What is not here is written as its parts one after the other."""
