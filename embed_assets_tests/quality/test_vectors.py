"""Measures of a sample of vectors, against slow definitions and on spaces that are broken in known ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_assets.quality.vectors import (
    LEAST_ROWS,
    dead_dimensions,
    effective_rank,
    mean_cosine,
    measure,
    near_duplicate_share,
)


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def random_vectors(rows: int, dimension: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Unit vectors in random directions, or around one direction if they are shifted."""
    return unit(np.random.default_rng(seed).normal(shift, 1, (rows, dimension)))


def names(rows: int) -> list[str]:
    return [f"text {row}" for row in range(rows)]


SAMPLES = st.builds(
    random_vectors, st.integers(2, 40), st.integers(2, 40), st.integers(0, 10), st.sampled_from([0.0, 0.5, 5.0])
)


@given(SAMPLES)
def test_the_mean_cosine_is_that_of_all_pairs(vectors: np.ndarray) -> None:
    cosines = vectors @ vectors.T
    pairs = cosines[~np.eye(len(vectors), dtype=bool)]
    assert mean_cosine(vectors) == pytest.approx(pairs.mean(), abs=1e-6)


@given(SAMPLES)
def test_the_effective_rank_is_that_of_the_singular_values_and_within_its_bounds(vectors: np.ndarray) -> None:
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False).astype(np.float64)
    shares = values[values > 1e-5] / values[values > 1e-5].sum()
    rank = effective_rank(vectors)
    assert rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-2)
    assert 1 - 1e-9 <= rank <= min(len(vectors) - 1, vectors.shape[1]) + 1e-2


@given(SAMPLES, st.integers(0, 10))
def test_measures_do_not_depend_on_the_order_of_rows_or_dimensions(vectors: np.ndarray, seed: int) -> None:
    generator = np.random.default_rng(seed)
    turned = vectors[generator.permutation(len(vectors))][:, generator.permutation(vectors.shape[1])]
    assert mean_cosine(turned) == pytest.approx(mean_cosine(vectors), abs=1e-6)
    assert effective_rank(turned) == pytest.approx(effective_rank(vectors), rel=1e-3)
    assert len(dead_dimensions(turned)) == len(dead_dimensions(vectors))


@pytest.mark.parametrize("directions", [1, 2, 5, 30])
def test_the_effective_rank_counts_the_directions_that_rows_vary_in(directions: int) -> None:
    steps = np.eye(64)[:directions]
    rows = np.concatenate([steps, -steps]) + 3 * np.eye(64)[63]
    assert effective_rank(unit(rows)) == pytest.approx(directions, rel=0.01)


def test_vectors_that_are_all_equal_have_no_rank_and_only_dead_dimensions() -> None:
    vectors = np.tile(random_vectors(1, 384), (200, 1))
    found = measure(vectors, names(200))
    assert found is not None
    assert found.mean_cosine == pytest.approx(1, abs=1e-6)
    assert (found.effective_rank, found.effective_rank_percent) == (0, 0)
    assert found.dead_dimensions == tuple(range(384))
    assert found.near_duplicate_percent == 100


@pytest.mark.parametrize("dimension", [64, 384])
def test_random_vectors_pass_everything(dimension: int) -> None:
    found = measure(random_vectors(2000, dimension), names(2000))
    assert found is not None
    assert (found.rows, found.dimension) == (2000, dimension)
    assert abs(found.mean_cosine) < 0.01
    assert found.effective_rank_percent > 90
    assert found.effective_rank == pytest.approx(found.effective_rank_percent / 100 * dimension)
    assert (found.dead_dimensions, found.near_duplicate_percent) == ((), 0)


@pytest.mark.parametrize("left", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("dimension", [64, 384])
def test_a_dimension_that_is_set_to_a_constant_is_dead(left: float, dimension: int) -> None:
    vectors = random_vectors(1000, dimension)
    vectors[:, 7] = left
    assert dead_dimensions(unit(vectors)) == (7,)


@given(st.sets(st.integers(0, 31), max_size=31), st.floats(0.1, 1))
def test_dead_are_exactly_the_dimensions_that_do_not_vary(dead: set[int], least: float) -> None:
    vectors = np.random.default_rng(1).normal(0, 1, (300, 32)) * np.linspace(least, 1, 32)
    vectors[:, sorted(dead)] = 0
    assert dead_dimensions(unit(vectors)) == tuple(sorted(dead))


def test_near_duplicates_are_rows_of_different_texts() -> None:
    vectors = random_vectors(1200, 64)  # more rows than a block
    texts = names(1200)
    vectors[1100] = vectors[3]
    vectors[[20, 1150]] = vectors[[21, 1151]]
    texts[20], texts[1150] = texts[21], texts[1151]  # the same texts: no surprise that the vectors are equal
    assert near_duplicate_share(vectors, texts, 0.999) == 2 / 1200
    assert near_duplicate_share(vectors, texts, -1.0) == 1
    assert near_duplicate_share(vectors, ["same"] * 1200, -1.0) == 0


@settings(max_examples=30)
@given(st.integers(1, 12), st.lists(st.sampled_from("abc"), min_size=2, max_size=12), st.floats(-0.5, 0.9))
def test_near_duplicates_are_those_of_all_pairs(seed: int, texts: list[str], threshold: float) -> None:
    vectors = random_vectors(len(texts), 3, seed)
    near = [
        any(float(one @ other) > threshold and a != b for b, other in zip(texts, vectors, strict=True))
        for a, one in zip(texts, vectors, strict=True)
    ]
    assert near_duplicate_share(vectors, texts, threshold) == pytest.approx(sum(near) / len(texts))


def test_a_small_sample_tells_nothing() -> None:
    assert measure(random_vectors(LEAST_ROWS - 1, 64), names(LEAST_ROWS - 1)) is None
    assert measure(np.empty((0, 64), np.float32), []) is None
    found = measure(random_vectors(LEAST_ROWS, 384), names(LEAST_ROWS))
    assert found is not None
    assert 90 < found.effective_rank_percent <= 100
