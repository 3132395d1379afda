"""Which texts go through the model together. Pure."""

from __future__ import annotations

import numpy as np


def pack_batches(lengths: np.ndarray, max_batch_tokens: int) -> list[np.ndarray]:
    """Rows of each forward pass: sorted by length, longest first, packed greedily under the token budget.

    A batch costs ``rows x longest row`` tokens, padding included, which is what the device pays. Every row is in
    exactly one batch; only a batch of one row may exceed the budget. Equal inputs give equal plans.

    `lengths` is an integer array of shape (texts,), in tokens. The result holds int64 row numbers.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        # The first row is the longest, so it alone decides how many fit.
        rows = max(1, max_batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def padded_tokens(lengths: np.ndarray, batches: list[np.ndarray]) -> int:
    """Tokens the device computes for a plan, padding included."""
    return sum(len(rows) * int(lengths[rows[0]]) for rows in batches)
