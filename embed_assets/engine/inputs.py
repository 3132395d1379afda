"""What the model gets for a chunk: the prompt, where the chunk is from if that is asked for, and the chunk's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from embed_assets.engine.tokenization import ModelTokenizer
from embed_assets.records import hash_text

CONTEXT_TOKENS = 32
"""Most tokens of a context, or a quarter of what the model reads if that is less. Of 16,146 chunks of Rust RFCs, title
and headings have 8 in the median and 31 at the 99th percentile, of 667 of the Python reference 7 and 21."""
_SEPARATOR = " > "
_END = "\n\n"
_REMEMBERED = 10_000
"""Contexts that are kept: chunks of one section follow each other."""


@dataclass(frozen=True)
class ModelInput:
    """How a chunk becomes the model's input: ``{prompt}{title} > {headings}\\n\\n{text}``, as far as asked for."""

    tokenizer: ModelTokenizer
    prompt: str
    """Exact string before every chunk."""
    has_title: bool = False
    """Whether the title of its document is put before a chunk."""
    has_headings: bool = False
    """Whether the headings above a chunk are put before it."""
    context_tokens: int = 0
    """Most tokens that they take, with one for the seam before the text."""
    _known: dict[tuple[str, str], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def has_context(self) -> bool:
        """Whether the input depends on more than the chunk's text."""
        return self.has_title or self.has_headings

    def before(self, title: str, heading_path: str) -> str:
        """The exact string before the text of a chunk with this title and these headings."""
        if not self.has_context:
            return self.prompt
        place = title if self.has_title else "", heading_path if self.has_headings else ""
        if (known := self._known.get(place)) is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            known = self._known[place] = self.prompt + self._context(*place)
        return known

    def of(self, text: str, title: str, heading_path: str) -> str:
        """The exact string that the model gets for a chunk."""
        return self.before(title, heading_path) + text

    def _context(self, title: str, heading_path: str) -> str:
        """The context of a chunk, within its tokens; '' if it has none.

        Of a longer one, outer headings are left out, but not the first part; then the end.
        """
        headings = [" ".join(heading.split()) for heading in heading_path.split(_SEPARATOR)]
        parts = list(filter(None, [" ".join(title.split()), *headings]))
        if parts[1:2] == parts[:1] and title:
            del parts[0]  # the title is the first heading
        while len(parts) > 2 and not self._fits(_SEPARATOR.join(parts)):
            del parts[1]
        line = _SEPARATOR.join(parts)
        while line and not self._fits(line):
            line = self._shortened(line)
        return line + _END if line else ""

    def _fits(self, line: str) -> bool:
        return len(self.tokenizer.encode([line + _END])[0]) < self.context_tokens

    def _shortened(self, line: str) -> str:
        """The line without its last tokens, of which it has too many."""
        spans = self.tokenizer.tokens([line])[0].spans
        end = int(spans[min(self.context_tokens, len(spans)) - 1][0]) if len(spans) else 0
        return line[: min(end, len(line) - 1)].rstrip()

    def first_ids(self, before: Sequence[str]) -> list[np.ndarray | None]:
        """int32 ids, special ones included, that inputs begin with, given what is before each chunk's text.

        None where the end of what is before may change the first tokens of the text.
        """
        special, _ = self.tokenizer.added_ids
        distinct = list(dict.fromkeys(before))
        found: dict[str, np.ndarray | None] = {"": special}
        cut = [b for b in distinct if b and self.tokenizer.splits_at_whitespace and b[-1] in " \t\n\r"]
        found |= {b: np.concatenate([special, e]) for b, e in zip(cut, self.tokenizer.encode(cut), strict=True)}
        return [found.get(each) for each in before]


def hash_input(before: str, text: str, text_hash: str) -> str:
    """Hash of the model's input for a chunk, given what is before its text, and the hash of the text alone."""
    return hash_text(before + text) if before else text_hash
