"""Which name was meant: a misspelt setting must not pass for one that was never given."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator


def did_you_mean(name: str, known: Collection[str]) -> str:
    """' (did you mean X?)', with all names that are one slip of the finger away; '' when nothing is near."""
    one_slip = [candidate for candidate in known if is_slip(name, candidate)]
    meant = one_slip or difflib.get_close_matches(name, known, 1)
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def is_slip(name: str, right: str) -> bool:
    """`name` is `right` with one letter dropped or doubled, or two neighbours swapped."""
    return name != right and name in _slips(right)


def _slips(name: str) -> Iterator[str]:
    for i in range(len(name)):
        yield name[:i] + name[i + 1 :]
        yield name[: i + 1] + name[i:]
        yield name[:i] + name[i : i + 2][::-1] + name[i + 2 :]
