"""Error bounds and exact order of distances, against float64 differences."""

from __future__ import annotations

import numpy as np
import pytest

from tests.retrieval import near_embeddings
from trainer.retrieval import exact_distances


@pytest.mark.parametrize("num_dimensions", [1, 3, 64, 512])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_error_of_float32_products_is_within_the_bound(num_dimensions, scale):
  rng = np.random.default_rng(num_dimensions)
  # Of equal sign, so that roundings do not cancel.
  queries, gallery = (
    (scale * rng.uniform(0.5, 1.5, [size, num_dimensions])).astype(np.float32)
    for size in (30, 300)
  )
  zero = np.zeros(num_dimensions, np.float32)
  [exact] = exact_distances.nearness_in_float64(queries, gallery, zero)
  half_norms = 0.5 * np.sum(gallery**2, axis=1)
  off = np.abs(half_norms - queries @ gallery.T - exact).max(axis=1)
  norms = np.linalg.norm(queries, axis=1), np.linalg.norm(gallery, axis=1).max()
  bound = exact_distances.product_error(
    num_dimensions, *norms, exact_distances.ROUNDOFF_32
  )
  assert (off <= bound).all()
  assert (bound < 1e3 * off.max()).all()


def test_bound_is_infinite_beyond_the_float32_range():
  bound = exact_distances.product_error(
    4, np.array([1.0, 1e19]), 1e18, exact_distances.ROUNDOFF_32
  )
  np.testing.assert_array_equal(np.isinf(bound), [False, True])


@pytest.mark.parametrize(
  ("vectors", "is_exact"),
  [
    (np.zeros((5, 4)), True),
    (np.array([[1, -1, 1], [-1, 1, 1]]), True),
    (2.0**-9 * np.arange(300).reshape(100, 3), True),
    (2.0**-9 * np.arange(30_000).reshape(10_000, 3), False),
    (2.0**-70 * np.arange(30).reshape(10, 3), False),
    (np.array([[0.1, 0.2, 0.3]]), False),
  ],
)
def test_vectors_on_a_coarse_grid_need_no_rounding(vectors, is_exact):
  vectors = vectors.astype(np.float32)
  zero = np.zeros(vectors.shape[1], np.float32)
  assert exact_distances.is_exact_in_float32(zero, vectors, vectors[:1]) == is_exact
  if is_exact:
    products = (vectors @ vectors.T).astype(np.float64)
    np.testing.assert_array_equal(products, np.float64(vectors) @ np.float64(vectors).T)


def test_single_row_off_the_grid_is_detected():
  vectors = np.ones((1000, 4), np.float32)
  vectors[-1, -1] = 0.1
  zero = np.zeros(4, np.float32)
  assert not exact_distances.is_exact_in_float32(zero, vectors[:10], vectors)


@pytest.mark.parametrize("spread", [1e-7, 1e-4, 1.0, 300.0])
def test_offset_reduces_vectors_to_their_spread(spread):
  rng = np.random.default_rng(1)
  vectors = 100.0 * rng.normal(size=5) + spread * rng.normal(size=(10_000, 5))
  left = vectors.mean(axis=0) - exact_distances.common_offset(vectors)
  assert np.abs(left).max() <= max(spread, 1e-4)


def test_vectors_around_zero_or_on_a_grid_have_no_offset():
  rng = np.random.default_rng(2)
  around_zero = rng.normal(size=(500, 6)) / 6**0.5
  assert not exact_distances.common_offset(around_zero).any()
  on_grid = rng.integers(1000, 1005, (500, 6)).astype(np.float32)
  offset = exact_distances.common_offset(on_grid)
  assert (np.abs(offset - 1002) <= 2).all()
  np.testing.assert_array_equal((on_grid - offset) % 0.5, 0)


@pytest.mark.parametrize("case", near_embeddings.CASES)
@pytest.mark.parametrize("num_neighbours", [1, 7, 240])
@pytest.mark.parametrize("is_loose", [False, True])
def test_float64_neighbours_equal_those_of_differences(
  case, num_neighbours, is_loose, monkeypatch
):
  monkeypatch.setattr(exact_distances, "_NUM_QUERIES", 10)
  monkeypatch.setattr(exact_distances, "_MAX_NUMBERS", 500)
  monkeypatch.setattr(exact_distances, "_NUM_CONVERTED", 100)
  gallery = near_embeddings.CASES[case]
  queries = gallery[::10]
  distances = near_embeddings.true_distances(queries, gallery)
  last = 240 if is_loose else num_neighbours
  indices, squares = exact_distances.nearest_in_float64(
    queries,
    gallery,
    exact_distances.common_offset(gallery),
    num_neighbours=num_neighbours,
    at_most=np.sort(distances, axis=1)[:, last - 1] ** 2,
  )
  wanted = near_embeddings.true_order(queries, gallery)[:, :num_neighbours]
  np.testing.assert_array_equal(indices, wanted)
  np.testing.assert_allclose(
    np.sqrt(squares), np.take_along_axis(distances, wanted, 1), rtol=1e-12
  )
