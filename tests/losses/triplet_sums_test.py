""""""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches
from trainer import losses
from trainer.losses import triplet, triplet_sums
from trainer.losses.loss_terms import PairMasks, lists_of_pairs
from trainer.losses.triplet_sums import all_triplets

_POSITIVE = tf.constant([[1.0], [2.0]])
_NEGATIVE = tf.constant([[0.5, 1.25, 3.0], [2.0, 2.25, 2.75]])


def test_hinge_is_the_missing_margin():
  cost, derivative = triplet_sums.hinge(0.5)(_POSITIVE, _NEGATIVE)
  np.testing.assert_allclose(cost, [[1.0, 0.25, 0], [0.5, 0.25, 0]])
  np.testing.assert_array_equal(derivative, [[1, 1, 0], [1, 1, 0]])


def test_semi_hard_hinge_excludes_negatives_nearer_than_the_positive():
  cost, derivative = triplet_sums.hinge_of_semi_hard(0.5)(_POSITIVE, _NEGATIVE)
  np.testing.assert_allclose(cost, [[0, 0.25, 0], [0, 0.25, 0]])
  np.testing.assert_array_equal(derivative, [[0, 1, 0], [0, 1, 0]])


@pytest.mark.parametrize(
  "penalty",
  [
    triplet_sums.hinge(0.5),
    triplet_sums.hinge_of_semi_hard(0.5),
    triplet_sums.soft_margin,
  ],
)
def test_derivative_is_with_respect_to_the_positive_distance(penalty):
  positive = tf.broadcast_to(_POSITIVE, _NEGATIVE.shape)
  with tf.GradientTape() as tape:
    tape.watch(positive)
    cost, derivative = penalty(positive, _NEGATIVE)
  np.testing.assert_allclose(derivative, tape.gradient(cost, positive), rtol=1e-6)


def _random_pairs(seed, num_kinds=3):
  """Returns distances with ties; pairs are positive, negative or neither."""
  random = np.random.default_rng(seed)
  distances = np.round(random.gamma(2, 0.5, (12, 40)), 1 if seed % 2 else 6)
  kinds = random.integers(0, num_kinds, distances.shape)
  is_positive, is_negative = (tf.constant(kinds == kind) for kind in (0, 1))
  pairs = PairMasks(is_positive, is_negative, lists_of_pairs(is_positive))
  return tf.constant(distances, tf.float32), pairs


def _evaluate(distances, pairs, margin=0.25):
  with tf.GradientTape() as tape:
    tape.watch(distances)
    total, num_active = all_triplets(distances, pairs, margin)
  return total, num_active, tape.gradient(total, distances)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_kinds", [1, 2, 3])
def test_sums_counts_and_slopes_equal_those_of_the_loop(seed, num_kinds):
  distances, pairs = _random_pairs(seed, num_kinds)
  got = _evaluate(distances, pairs._replace(lists=None))
  expected = _evaluate(distances, pairs)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(got[1], expected[1])
  np.testing.assert_array_equal(got[2], expected[2])


def test_small_hinges_are_not_lost_in_large_distances():
  distances = tf.constant([[1000.0, 1000.0625, 1000.125, 5000.0]])
  is_positive = tf.constant([[True, False, False, False]])
  pairs = PairMasks(is_positive, ~is_positive)
  total, num_active = all_triplets(distances, pairs, 0.25)
  assert total.numpy() == pytest.approx(0.1875 + 0.125)
  assert num_active.numpy() == 2


def test_batch_all_is_the_same_sorted_whole_and_tiled(
  monkeypatch,
):
  embeddings, labels = batches.random_batch("unbalanced")
  looped = batches.evaluate(losses.BatchAllTripletLoss(margin=0.7), embeddings, labels)
  monkeypatch.setattr(triplet, "MAX_POSITIVES_OF_LOOP", 0)
  loss = losses.BatchAllTripletLoss(margin=0.7)
  found = batches.evaluate(loss, embeddings, labels)
  for got, expected in zip(found, looped):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  in_tiles = batches.evaluate(
    losses.BatchAllTripletLoss(margin=0.7, rows_per_tile=4), embeddings, labels
  )
  for got, expected in zip(in_tiles, looped):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_large_class_uses_the_sorted_form(monkeypatch):
  calls, plain = [], triplet_sums.sorted_sums_and_slope

  def counted(*arguments):
    calls.append(arguments)
    return plain(*arguments)

  monkeypatch.setattr(triplet_sums, "sorted_sums_and_slope", counted)
  embeddings = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
  labels = np.repeat(np.arange(2, dtype=np.int32), [270, 30])
  total, count, gradient = batches.evaluate(
    losses.BatchAllTripletLoss(margin=0.5), embeddings, labels
  )
  assert len(calls) == 1
  assert count > 0
  assert np.isfinite(gradient).all()
  assert np.isfinite(total)
