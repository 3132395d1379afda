"""Maps on which groups are apart, and outliers, of made vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embed_assets.errors import LakeError
from embed_assets.report.projection import outliers, project


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def random_vectors(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((count, dimension)))


def groups(count: int, members: int) -> np.ndarray:
    """Vectors in as many groups, one after the other."""
    noise = np.random.default_rng(1).standard_normal((count, members, 64)) / 8
    return unit((random_vectors(count, 64)[:, None] + noise).reshape(-1, 64))


def test_groups_are_apart_on_the_map() -> None:
    places = project(groups(6, 40))
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    labels = np.repeat(np.arange(6), 40)
    nearest = labels[np.argsort(distances, axis=1)[:, :10]]
    assert (nearest == labels[:, None]).mean() > 0.99


def test_a_map_is_the_same_each_time() -> None:
    vectors = groups(3, 30)
    places = project(vectors)
    assert places.dtype == np.float32
    assert places.tobytes() == project(vectors).tobytes()


@pytest.mark.parametrize("dimension", [1, 2, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, 10, 11, 40])
def test_few_vectors_have_places(count: int, dimension: int) -> None:
    places = project(random_vectors(count, dimension))
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()


def test_equal_vectors_are_in_the_middle() -> None:
    assert not project(np.repeat(random_vectors(1, 8), 50, axis=0)).any()


def test_vectors_of_which_many_are_equal_have_places() -> None:
    assert np.isfinite(project(np.repeat(random_vectors(2, 8), 30, axis=0))).all()


def reference_scores(vectors: np.ndarray, k: int) -> list[float]:
    """One row at a time, from sorted lists."""
    scores = []
    for i, vector in enumerate(vectors):
        others = sorted((float(vector @ other) for j, other in enumerate(vectors) if j != i), reverse=True)[:k]
        scores.append(sum(others) / len(others))
    return scores


@given(count=st.integers(2, 30), k=st.integers(1, 40), asked=st.integers(0, 40), seed=st.integers(0, 99))
def test_outliers_have_the_lowest_mean_cosine(count: int, k: int, asked: int, seed: int) -> None:
    vectors = random_vectors(count, 4, seed)
    scores, rows = outliers(vectors, k, asked)
    np.testing.assert_allclose(scores, reference_scores(vectors, k), atol=1e-5)
    assert len(rows) == min(asked, count)
    assert scores[rows].tolist() == sorted(scores.tolist())[:asked]


def test_outliers_across_blocks() -> None:
    vectors = groups(3, 500)
    vectors[[3, 700, 1499]] = random_vectors(3, 64, seed=7)
    scores, rows = outliers(vectors, 10, 3)
    assert sorted(rows) == [3, 700, 1499]
    np.testing.assert_allclose(
        scores[[0, 511, 512, 1024]], [reference_scores_of(vectors, i) for i in (0, 511, 512, 1024)], atol=1e-5
    )


def reference_scores_of(vectors: np.ndarray, row: int) -> float:
    others = np.delete(vectors @ vectors[row], row)
    return float(np.sort(others)[-10:].mean())


@pytest.mark.parametrize("count", [0, 1])
def test_without_neighbours_there_are_no_outliers(count: int) -> None:
    scores, rows = outliers(random_vectors(count, 4))
    assert (len(scores), len(rows)) == (count, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_named(value: float) -> None:
    vectors = random_vectors(20, 4)
    vectors[[5, 7], 1] = value
    for find in (project, outliers):
        with pytest.raises(LakeError, match="2 of 20 in the sample are not, the first at 5; run 'embed-assets verify"):
            find(vectors)
