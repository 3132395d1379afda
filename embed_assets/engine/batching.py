"""Which texts go through the model together. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

_MOST_ROUNDING = 1 / 16
"""A batch is widened to a multiple that the kernels like only if that adds at most this share of tokens."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a window that go through the model together."""

    rows: np.ndarray
    """int64 row numbers, longest text first."""
    width: int
    """Tokens that every row is padded to; 0 when rows are packed one after the other without padding."""
    tokens: int
    """Tokens that the device computes, padding included."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a backend lays texts out in a batch."""

    is_packed: bool = False
    """Texts one after the other, no padding; else a rectangle as wide as the longest."""
    width_multiple: int = 1
    """Rectangles whose width is a multiple of this are faster per token."""
    max_rows: int = 1 << 31
    """Texts of a batch at most, whatever their tokens."""

    def width_of(self, longest: int) -> int:
        """Width of a rectangle whose longest text has `longest` tokens."""
        rounded = -(-longest // self.width_multiple) * self.width_multiple
        return rounded if rounded - longest <= longest * _MOST_ROUNDING else longest


def plan_batches(lengths: np.ndarray, max_batch_tokens: int, layout: Layout) -> list[Batch]:
    """Batches of one window: sorted by length, longest first, packed greedily under the token budget.

    A rectangular batch costs ``rows x width`` tokens, a packed one the plain sum. Every row is in exactly one batch;
    only a batch of one row may exceed the budget, and none exceeds the layout's rows. Equal inputs give equal plans.

    `lengths` is an integer array of shape (texts,), in tokens.
    """
    order = np.argsort(-lengths, kind="stable")
    return (
        _packed(order, lengths, max_batch_tokens, layout.max_rows)
        if layout.is_packed
        else _padded(order, lengths, max_batch_tokens, layout)
    )


def plan_part(rows: np.ndarray, lengths: np.ndarray, max_batch_tokens: int, layout: Layout) -> list[Batch]:
    """The same for some rows of a window, whose numbers the batches keep. `lengths` are those of the whole window."""
    return [replace(batch, rows=rows[batch.rows]) for batch in plan_batches(lengths[rows], max_batch_tokens, layout)]


def _padded(order: np.ndarray, lengths: np.ndarray, budget: int, layout: Layout) -> list[Batch]:
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        # The first row is the longest, so it alone decides how many fit.
        longest = max(1, int(lengths[order[start]]))
        width = layout.width_of(longest)
        if width > budget:
            width = longest
        rows = order[start : start + min(layout.max_rows, max(1, budget // width))]
        batches.append(Batch(rows, width, len(rows) * width))
        start += len(rows)
    return batches


def _packed(order: np.ndarray, lengths: np.ndarray, budget: int, max_rows: int) -> list[Batch]:
    batches: list[Batch] = []
    ends = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        end = min(end, start + max_rows)
        batches.append(Batch(order[start:end], 0, int(ends[end - 1]) - before))
        start = end
    return batches
