"""Losses of nearly equal embeddings, against float64 differences.

Shapes: B examples, D dimensions.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches, definition, oracles
from tests.losses.table import ROWS
from trainer import losses
from trainer.losses import distances

_ROWS = [row for row in ROWS if row.make().comparison.uses_norms]
# Distances that do not normalize the vectors.
_TRANSLATABLE = [r for r in _ROWS if r.compare is not oracles.normalized_euclidean]
_TOLERANCE = 1e-5


def _collapsed(spread, num_dimensions=5, labels="unbalanced", seed=0):
  """Returns [B, D] float32 unit vectors around one point, and labels [B]."""
  labels = np.array(batches.LABELS[labels], np.int32)
  random = np.random.default_rng(seed)
  vectors = random.normal(size=num_dimensions)
  vectors = vectors / np.linalg.norm(vectors)
  vectors = vectors + spread * random.normal(size=(len(labels), num_dimensions))
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors.astype(np.float32), labels


def _far(spread, num_dimensions=5):
  """Returns vectors around a point at a thousand times their spread, and labels."""
  random = np.random.default_rng(1)
  labels = np.array(batches.LABELS["unbalanced"], np.int32)
  vectors = random.normal(size=(len(labels), num_dimensions))
  return (spread * (1000.0 + vectors)).astype(np.float32), labels


def _slopes_of_all(compared, labels, margin):
  """Returns the mean over active triplets and its derivative by each distance."""
  slopes, costs = np.zeros_like(compared), []
  for a, p in np.ndindex(*compared.shape):
    if labels[a] != labels[p] or a == p:
      continue
    for n in np.flatnonzero(labels != labels[a]):
      cost = compared[a, p] - compared[a, n] + margin
      if cost > 0:
        costs.append(cost)
        slopes[a, p] += 1
        slopes[a, n] -= 1
  return np.mean(costs), slopes / len(costs)


def _slopes_of_hardest(compared, labels, margin):
  """Returns the mean over anchors and its derivative by each distance."""
  slopes, total = np.zeros_like(compared), 0.0
  for a, row in enumerate(compared):
    is_same = labels == labels[a]
    farthest = np.argmax(np.where(is_same, row, -1.0))
    nearest = np.argmin(np.where(is_same, np.inf, row))
    cost = row[farthest] * (farthest != a) - row[nearest] + margin
    if cost > 0:
      total += cost
      slopes[a, farthest] += farthest != a
      slopes[a, nearest] -= 1
  return total / len(labels), slopes / len(labels)


def _value_and_gradient(slopes_fn, embeddings, labels, margin, squared):
  differences = embeddings[:, None].astype(np.float64) - embeddings[None]
  squares = np.sum(differences**2, axis=2)
  value, slopes = slopes_fn(squares if squared else np.sqrt(squares), labels, margin)
  factors = 2 * slopes
  if not squared:
    factors = np.divide(slopes, np.sqrt(squares), where=squares > 0, out=factors)
  parts = factors[:, :, None] * differences
  return value, parts.sum(axis=1) - parts.sum(axis=0)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [0.2, 1.0])
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("make", [_collapsed, _far])
@pytest.mark.parametrize(
  ("loss_fn", "slopes_fn"),
  [
    (losses.batch_all_triplet_loss, _slopes_of_all),
    (losses.batch_hard_triplet_loss, _slopes_of_hardest),
  ],
)
def test_gradient_of_a_collapsed_batch_equals_that_of_differences(
  loss_fn, slopes_fn, make, spread, margin, squared
):
  embeddings, labels = make(spread)
  variable = tf.constant(embeddings)
  with tf.GradientTape() as tape:
    tape.watch(variable)
    value = loss_fn(labels, variable, margin, squared=squared)
    value = value[0] if isinstance(value, tuple) else value
  got = tape.gradient(value, variable).numpy()
  wanted, gradient = _value_and_gradient(slopes_fn, embeddings, labels, margin, squared)
  np.testing.assert_allclose(value, wanted, rtol=_TOLERANCE)
  np.testing.assert_allclose(
    got, gradient, rtol=0, atol=_TOLERANCE * np.abs(gradient).max()
  )


@pytest.mark.parametrize("spread", [1e-2, 1e-3])
@pytest.mark.parametrize("row", _ROWS, ids=[row.name for row in _ROWS])
def test_every_loss_of_distances_learns_from_a_collapsed_batch(row, spread):
  embeddings, labels = _collapsed(spread, num_dimensions=3, labels="all_distinct")
  labels = np.array([0, 0, 1, 1, 0], np.int32)
  related = np.array(oracles.relevance(labels))
  got = batches.evaluate(row.make(), embeddings, labels)
  points, wanted = np.float64(embeddings), np.zeros(embeddings.shape)
  # Squared distances have no third derivative; a larger step rounds less.
  step = spread * (0.1 if row.compare is oracles.squared_euclidean else 1e-4)
  for index in np.ndindex(*points.shape):
    direction = np.zeros_like(points)
    direction[index] = 1
    wanted[index] = definition.slope(row, points, direction, step, related)
  total, count = definition.total_and_count(row, embeddings, related)
  np.testing.assert_allclose(got[:2], (total, count), rtol=_TOLERANCE)
  np.testing.assert_allclose(
    got[2], wanted, rtol=0, atol=_TOLERANCE * np.abs(wanted).max()
  )


@pytest.mark.parametrize("squared", [False, True])
def test_a_collapsed_batch_that_is_compiled_has_the_gradient_of_differences(squared):
  random = np.random.default_rng(3)
  labels = np.arange(260, dtype=np.int32) // 4
  embeddings = 0.3 + 1e-3 * random.normal(size=(260, 8))
  embeddings = embeddings.astype(np.float32)
  loss = losses.BatchHardTripletLoss(
    margin=0.2, distance="squared_euclidean" if squared else "euclidean"
  )
  total, count, got = batches.evaluate(loss, embeddings, labels)
  value, wanted = _value_and_gradient(
    _slopes_of_hardest, embeddings, labels, 0.2, squared
  )
  assert total / count == pytest.approx(value, rel=_TOLERANCE)
  np.testing.assert_allclose(
    got / count, wanted, rtol=0, atol=_TOLERANCE * np.abs(wanted).max()
  )


@pytest.mark.parametrize("row", _ROWS, ids=[row.name for row in _ROWS])
@pytest.mark.parametrize("rows_per_tile", [None, 5])
def test_padding_does_not_change_a_collapsed_batch(row, rows_per_tile):
  embeddings, labels = _collapsed(1e-3)
  weights = np.ones(len(labels), np.float32)
  weights[[0, 5, 6, 11]] = 0
  is_real = weights > 0
  padded = embeddings.copy()
  padded[~is_real] = np.nan
  loss = row.make(rows_per_tile=rows_per_tile)
  *values, gradient = batches.evaluate(loss, padded, labels, weights)
  *wanted, slopes = batches.evaluate(row.make(), embeddings[is_real], labels[is_real])
  np.testing.assert_allclose(values, wanted, rtol=_TOLERANCE)
  np.testing.assert_allclose(
    gradient[is_real], slopes, rtol=0, atol=_TOLERANCE * np.abs(slopes).max()
  )
  assert not gradient[~is_real].any()


@pytest.mark.parametrize("rows_per_tile", [None, 3])
@pytest.mark.parametrize("squared", [False, True])
def test_fixed_candidates_near_the_batch_are_compared_by_differences(
  rows_per_tile, squared
):
  embeddings, labels = _collapsed(1e-4)
  num_fresh = 7
  loss = losses.BatchAllTripletLoss(
    margin=0.2,
    distance="squared_euclidean" if squared else "euclidean",
    rows_per_tile=rows_per_tile,
  )
  anchors, candidates = batches.arguments(embeddings, labels, rows=range(num_fresh))
  fresh = tf.constant(embeddings[:num_fresh])
  with tf.GradientTape() as tape:
    tape.watch(fresh)
    terms = loss(
      anchors._replace(embeddings=fresh),
      candidates._replace(
        embeddings=fresh, fixed_embeddings=tf.constant(embeddings[num_fresh:])
      ),
    )
  got = tape.gradient(terms.total, fresh).numpy()

  def of_first(compared, labels, margin):
    few = np.array(compared)
    few[num_fresh:] = np.inf  # Negatives at infinite distance do not contribute.
    with np.errstate(invalid="ignore"):
      return _slopes_of_all(few, labels, margin)

  _, wanted = _value_and_gradient(of_first, embeddings, labels, 0.2, squared)
  wanted = terms.count.numpy() * wanted[:num_fresh]
  np.testing.assert_allclose(
    got, wanted, rtol=0, atol=_TOLERANCE * np.abs(wanted).max()
  )


@pytest.mark.parametrize("row", _TRANSLATABLE, ids=[row.name for row in _TRANSLATABLE])
def test_loss_of_integers_is_bit_identical_far_from_zero(row):
  random = np.random.default_rng(5)
  labels = np.array(batches.LABELS["unbalanced"], np.int32)
  embeddings = random.integers(-2, 3, (12, 5)).astype(np.float32)
  near = batches.evaluate(row.make(), embeddings, labels)
  far = batches.evaluate(row.make(), embeddings + 1024, labels)
  for one, other in zip(near, far):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
@pytest.mark.parametrize("squared", [False, True])
def test_pairwise_distances_of_a_collapsed_batch_equal_differences(spread, squared):
  embeddings, _ = _collapsed(spread, num_dimensions=32)
  differences = embeddings[:, None].astype(np.float64) - embeddings[None]
  wanted = np.sum(differences**2, axis=2)
  got = losses.pairwise_distances(embeddings, squared=squared)
  np.testing.assert_allclose(got, wanted if squared else np.sqrt(wanted), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_offset_is_about_the_mean_and_on_a_grid_as_coarse_as_the_spread(dtype):
  random = np.random.default_rng(6)
  vectors = (1000.0 + 0.01 * random.normal(size=(40, 3))).astype(dtype)
  vectors[:, 1] -= 1000.0
  offset = distances.common_offset(vectors).numpy()
  assert offset.dtype == dtype
  assert (np.abs(vectors.mean(axis=0) - offset) < 0.01).all()
  assert (np.abs(offset[[0, 2]] - 1000) < 0.02).all() and offset[1] == 0
  np.testing.assert_array_equal(offset * 512 % 1, 0)


def test_offset_ignores_vectors_of_weight_zero():
  vectors = np.float32([[5, 5], [0, 0], [5.5, 5], [0, 0]])
  counted = np.array([True, False, True, False])
  offset = distances.common_offset(vectors, tf.constant(counted)).numpy()
  np.testing.assert_allclose(offset, [5.25, 5], atol=0.26)
  nothing = distances.common_offset(vectors, tf.constant(counted & False)).numpy()
  np.testing.assert_array_equal(nothing, [0, 0])
