"""Guesses which name a typo stands for, so that a misspelt setting is not mistaken for one that was never given."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping


def did_you_mean(name: str, known: Collection[str]) -> str:
    """' (did you mean X?)' with every known name that is one typo away, else the closest one; '' when none is close."""
    meant = typos(known).get(name) or difflib.get_close_matches(name, known, 1)
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def typos(known: Collection[str]) -> Mapping[str, list[str]]:
    """Every misspelling of the known names by one typo, with the names it may stand for.

    A typo is a dropped letter, a doubled letter or two swapped neighbours.
    """
    found: dict[str, list[str]] = {}
    for name in known:
        for typo in set(_typos_of(name)) - {name}:
            found.setdefault(typo, []).append(name)
    return found


def _typos_of(name: str) -> Iterator[str]:
    for i in range(len(name)):
        yield name[:i] + name[i + 1 :]
        yield name[: i + 1] + name[i:]
        yield name[:i] + name[i : i + 2][::-1] + name[i + 2 :]
