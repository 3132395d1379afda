"""Places a sample of vectors on a map, and finds those that are far from all others."""

from __future__ import annotations

import numpy as np

from embed_assets.errors import LakeError

METHOD = "t-SNE"
_PERPLEXITY = 30
"""Neighbours that a vector is drawn to; 20 group no better. Of 3,000 chunks of seven manuals, 94 % of the ten nearest
on the map are of the same partition; 92 % of the ten nearest vectors are, and 62 % on two principal axes."""
_ITERATIONS = 500
"""Half of scikit-learn's default: the rest takes as long again, and finds no more of the true neighbours (52 %)."""
_ANGLE = 0.8
"""How coarsely far groups count: scikit-learn's 0.5 finds no more of the true neighbours, and takes twice as long."""
_FEWEST = 10
"""Fewer vectors have no groups to show: two principal axes do."""
_BLOCK = 512
"""Rows compared at once: with 5,000 vectors, 10 MB of similarities."""


def project(vectors: np.ndarray) -> np.ndarray:
    """Places for unit-norm vectors of shape (n, dimension), so that near ones are similar: float32, shape (n, 2).

    The same vectors get the same places on the same machine, however many cores it has. Distances between far groups
    mean nothing. Takes 13 s of one core for 3,000 vectors of 384, and 22 s for 5,000: n should not exceed
    `data.MAX_POINTS`. Raises ``LakeError`` if a vector is not finite.
    """
    _check_finite(vectors)
    if len(vectors) == 0 or not np.ptp(vectors, axis=0).any():
        return np.zeros((len(vectors), 2), np.float32)
    from sklearn.manifold import TSNE  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    axes = _principal_axes(vectors)
    if len(vectors) < _FEWEST:
        return axes
    model = TSNE(
        perplexity=min(_PERPLEXITY, (len(vectors) - 1) / 3),
        # The spread that t-SNE begins with: wider, and groups could not pass each other.
        init=axes * (1e-4 / axes[:, 0].std()),
        max_iter=_ITERATIONS,
        angle=_ANGLE,
        random_state=0,
    )
    # One thread adds in one order. Two take three times as long on two busy cores: each iteration waits for both.
    with threadpool_limits(1):
        return np.asarray(model.fit_transform(vectors), np.float32)


def _principal_axes(vectors: np.ndarray) -> np.ndarray:
    """Vectors of which not all are equal on their two principal axes: float32, shape (n, 2)."""
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits

    count = min(2, *vectors.shape)
    with threadpool_limits(1):
        flat = PCA(count, svd_solver="randomized", random_state=0).fit_transform(vectors)
    return np.pad(np.asarray(flat, np.float32), ((0, 0), (0, 2 - count)))


def outliers(vectors: np.ndarray, k: int = 10, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """The unit-norm vectors, of shape (n, dimension), with the lowest mean cosine to their `k` nearest neighbours.

    Returns all rows' mean cosines, float32 of shape (n,), and the numbers of the `count` rows with the lowest ones,
    lowest first, int64. With fewer than `k` others, all of them count; a vector alone has none, and is no outlier.
    Holds `_BLOCK` rows of similarities. Raises ``LakeError`` if a vector is not finite.
    """
    _check_finite(vectors)
    k = min(k, len(vectors) - 1)
    scores = np.ones(len(vectors), np.float32)
    if k < 1:
        return scores, np.empty(0, np.int64)
    for start in range(0, len(vectors), _BLOCK):
        similarities = vectors[start : start + _BLOCK] @ vectors.T
        own = np.arange(len(similarities))
        similarities[own, start + own] = -np.inf
        scores[start : start + _BLOCK] = np.partition(similarities, -k, axis=1)[:, -k:].mean(axis=1)
    return scores, np.argsort(scores, kind="stable")[:count]


def _check_finite(vectors: np.ndarray) -> None:
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise LakeError(
            f"vectors must be finite to be compared, and {len(broken)} of {len(vectors)} in the sample are not, "
            f"the first at {broken[0]}; run 'embed-assets verify --repair'"
        )
