from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import oracles
from trainer.errors import UserError
from trainer.losses import distances

_ORACLES = {
  "euclidean": oracles.euclidean,
  "squared_euclidean": oracles.squared_euclidean,
  "normalized_euclidean": oracles.normalized_euclidean,
  "exact_euclidean": oracles.euclidean,
  "exact_squared_euclidean": oracles.squared_euclidean,
  "cosine": oracles.cosine,
}
_COMPARISONS = [
  *((distances.DISTANCES[name], oracle) for name, oracle in _ORACLES.items()),
  (distances.cosine_similarity, oracles.cosine_similarity),
  (distances.inner_product, np.dot),
]
_each_function = pytest.mark.parametrize(
  ("distance_fn", "oracle"),
  _COMPARISONS,
  ids=[*_ORACLES, "cosine_similarity", "inner_product"],
)


def test_every_named_distance_has_an_oracle():
  assert _ORACLES.keys() == distances.DISTANCES.keys()


def _vectors(num, seed, norm=1.0):
  vectors = np.random.default_rng(seed).normal(size=(num, 7))
  return (norm * vectors).astype(np.float32)


@_each_function
@pytest.mark.parametrize("norm", [1e-4, 1.0, 1e4])
def test_entries_are_distances_between_rows_and_columns(distance_fn, oracle, norm):
  anchors, candidates = _vectors(3, 0, norm), _vectors(5, 1, norm)
  expected = [
    [oracle(np.float64(a), np.float64(c)) for c in candidates] for a in anchors
  ]
  np.testing.assert_allclose(
    distance_fn(anchors, candidates), expected, rtol=1e-5, atol=1e-6 if norm == 1 else 0
  )


@_each_function
def test_gradient_equals_finite_differences(distance_fn, oracle):
  anchors, candidates = _vectors(3, 0), _vectors(4, 1)
  slopes = np.random.default_rng(2).normal(size=(3, 4))
  variables = [tf.constant(anchors), tf.constant(candidates)]
  with tf.GradientTape() as tape:
    tape.watch(variables)
    value = tf.reduce_sum(tf.cast(slopes, tf.float32) * distance_fn(*variables))
  gradients = tape.gradient(value, variables)

  def total(points):
    left, right = points[:3], points[3:]
    pairs = np.ndindex(3, 4)
    return sum(slopes[i, j] * oracle(left[i], right[j]) for i, j in pairs)

  points = np.float64(np.concatenate([anchors, candidates]))
  expected = np.zeros_like(points)
  for index in np.ndindex(*points.shape):
    step = np.zeros_like(points)
    step[index] = 1e-6
    expected[index] = (total(points + step) - total(points - step)) / 2e-6
  np.testing.assert_allclose(np.concatenate(gradients), expected, atol=1e-4)


@pytest.mark.parametrize(
  "distance_fn",
  [
    distances.euclidean,
    distances.squared_euclidean,
    distances.exact_euclidean,
    distances.exact_squared_euclidean,
  ],
)
def test_duplicates_have_distance_zero_and_gradient_zero(distance_fn):
  embeddings = tf.constant(np.repeat(_vectors(1, 0), 4, axis=0))
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    values = distance_fn(embeddings, embeddings)
  assert not values.numpy().any()
  assert not tape.gradient(values, embeddings).numpy().any()


@pytest.mark.parametrize("num_dimensions", [8, 128, 2048])
def test_error_of_a_squared_distance_is_below_the_duplicate_threshold(num_dimensions):
  random = np.random.default_rng(num_dimensions)
  anchors = random.normal(size=(64, num_dimensions)).astype(np.float32)
  near = anchors + random.normal(size=anchors.shape, scale=1e-2).astype(np.float32)
  expected = np.sum((np.float64(anchors) - near) ** 2, axis=1)
  error = np.diag(distances.squared_euclidean(anchors, near)) - expected
  bound = 2 * 8 * 2.0**-23 * np.sum(np.float64(anchors) ** 2, axis=1)
  assert (np.abs(error) < bound).all()


def _moved_unit_vectors(distance, num=256, num_dimensions=128):
  """Returns unit vectors, others at a distance, and distances after rounding."""
  random = np.random.default_rng(0)
  points = random.normal(size=(num, num_dimensions))
  moves = random.normal(size=points.shape)
  for vectors in (points, moves):
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  anchors, moved = np.float32(points), np.float32(points + distance * moves)
  return anchors, moved, np.linalg.norm(np.float64(moved) - anchors, axis=1)


# A squared distance of unit vectors is wrong by up to 16 ulp, 1.9e-6, in the Gram form:
# d by half of that over d². Below 1.4e-3 all is taken for duplicates. The exact forms
# have the same ulp of float64, 3.6e-15, and half an ulp of float32, 6e-8, at the end.
@pytest.mark.parametrize(
  ("form", "distance", "bound"),
  [
    ("euclidean", 1e-1, 1e-4),
    ("euclidean", 1e-2, 1e-2),
    ("euclidean", 3e-3, 0.11),
    ("exact_euclidean", 1e-1, 7e-8),
    ("exact_euclidean", 1e-2, 7e-8),
    ("exact_euclidean", 1e-3, 7e-8),
    ("exact_euclidean", 1e-4, 3e-7),
    ("exact_squared_euclidean", 1e-1, 7e-8),
    ("exact_squared_euclidean", 1e-2, 7e-8),
    ("exact_squared_euclidean", 1e-3, 7e-8),
    ("exact_squared_euclidean", 1e-4, 6e-7),
  ],
)
def test_error_of_a_small_distance_is_within_the_stated_bound(
  form, distance, bound, record_property
):
  anchors, moved, expected = _moved_unit_vectors(distance)
  expected = expected**2 if "squared" in form else expected
  got = np.diag(distances.distance_named(form)(anchors, moved))
  error = np.max(np.abs(got - expected) / expected)
  record_property("largest_relative_error", f"{error:.1e}")
  assert error <= bound


@pytest.mark.parametrize("distance", [1e-3, 1e-4])
def test_gram_form_treats_smaller_distances_as_duplicates(distance):
  anchors, moved, _ = _moved_unit_vectors(distance)
  assert not np.diag(distances.euclidean(anchors, moved)).any()


def test_zero_vector_has_cosine_similarity_zero():
  assert (
    not distances.cosine_similarity(np.zeros((1, 3)), _vectors(2, 0)[:, :3])
    .numpy()
    .any()
  )


def test_unknown_distance_is_refused():
  with pytest.raises(UserError, match="manhattan"):
    distances.distance_named("manhattan")
