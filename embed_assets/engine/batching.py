"""Plans which texts of a window go through the model together. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

_MAX_ROUNDING = 1 / 16
"""A batch is widened to the kernels' favourite multiple only if that adds at most this share of padding.

Always widening to a multiple of 8 would add 1 to 3 % to chunks, but 20 % to very short texts (simulated)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a window that one forward pass computes."""

    rows: np.ndarray
    """int64 row numbers, longest text first."""
    width: int
    """Tokens that every row is padded to; 0 when rows are packed end to end without padding."""
    tokens: int
    """Tokens that the device computes, including padding."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a backend lays texts out in a batch."""

    is_packed: bool = False
    """True: texts end to end, without padding. False: a rectangle as wide as the longest text."""
    width_multiple: int = 1
    """Widths that are a multiple of this are faster per token."""
    max_rows: int = 1 << 31
    """Maximum number of texts in a batch, whatever their tokens."""

    def width_of(self, longest: int) -> int:
        """Width in tokens of a rectangle whose longest text has `longest` tokens."""
        rounded = -(-longest // self.width_multiple) * self.width_multiple
        return rounded if rounded - longest <= longest * _MAX_ROUNDING else longest


def plan_batches(lengths: np.ndarray, max_batch_tokens: int, layout: Layout) -> list[Batch]:
    """Batches of one window: texts sorted by length, longest first, and filled greedily up to `max_batch_tokens`.

    `lengths` is an integer array of shape (texts,), in tokens. A rectangular batch costs ``rows x width`` tokens, a
    packed one the sum of its lengths. Every row is in exactly one batch. Only a batch of one row may exceed the
    budget, and no batch has more rows than the layout allows. Equal inputs give equal plans.
    """
    order = np.argsort(-lengths, kind="stable")
    return (
        _packed(order, lengths, max_batch_tokens, layout.max_rows)
        if layout.is_packed
        else _padded(order, lengths, max_batch_tokens, layout)
    )


def plan_part(rows: np.ndarray, lengths: np.ndarray, max_batch_tokens: int, layout: Layout) -> list[Batch]:
    """Batches of some rows of a window, planned as `plan_batches` plans a whole one.

    `lengths` (tokens) are those of the whole window, and the batches hold the window's row numbers.
    """
    return [replace(batch, rows=rows[batch.rows]) for batch in plan_batches(lengths[rows], max_batch_tokens, layout)]


def _padded(order: np.ndarray, lengths: np.ndarray, budget: int, layout: Layout) -> list[Batch]:
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        # Rows are sorted: the first is the longest, so it decides how many fit.
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
