"""Which name was meant: a misspelt setting must not pass for one that was never given."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping


def did_you_mean(name: str, known: Collection[str]) -> str:
    """' (did you mean X?)', with all names that are one slip of the finger away; '' when nothing is near."""
    meant = slips(known).get(name) or difflib.get_close_matches(name, known, 1)
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def slips(known: Collection[str]) -> Mapping[str, list[str]]:
    """What the names become with one letter dropped or doubled, or two neighbours swapped, and which they were."""
    found: dict[str, list[str]] = {}
    for name in known:
        for slip in set(_slips(name)) - {name}:
            found.setdefault(slip, []).append(name)
    return found


def _slips(name: str) -> Iterator[str]:
    for i in range(len(name)):
        yield name[:i] + name[i + 1 :]
        yield name[: i + 1] + name[i:]
        yield name[:i] + name[i : i + 2][::-1] + name[i + 2 :]
