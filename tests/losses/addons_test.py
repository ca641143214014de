"""Losses beside TensorFlow Addons, where both have the same."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches
from trainer import losses
from trainer.losses.loss_terms import Anchors, Candidates


@pytest.fixture(scope="module")
def addons():
  return pytest.importorskip("tensorflow_addons").losses


def test_contrastive_is_half_of_addons_over_all_pairs(addons):
  embeddings, labels = batches.random_batch("unbalanced")
  one, other = np.nonzero(~np.eye(len(labels), dtype=bool))
  points = tf.constant(embeddings)
  with tf.GradientTape() as tape:
    tape.watch(points)
    distances = tf.norm(tf.gather(points, one) - tf.gather(points, other), axis=1)
    costs = addons.contrastive_loss(labels[one] == labels[other], distances, 2.5)
    expected = tf.reduce_mean(costs) / 2
  total, count, gradient = batches.evaluate(
    losses.ContrastiveLoss(margin=2.5), embeddings, labels
  )
  np.testing.assert_allclose(total / count, expected, rtol=1e-5)
  _assert_same_gradient(gradient / count, tape.gradient(expected, points))


def test_n_pairs_of_two_views_is_that_of_addons(addons):
  random = np.random.default_rng(0)
  views = [tf.constant(random.normal(size=(6, 5)), tf.float32) for _ in range(2)]
  labels = tf.range(6)
  with tf.GradientTape(persistent=True) as tape:
    tape.watch(views)
    products = tf.matmul(*views, transpose_b=True)
    expected = addons.npairs_loss(labels, products)
    terms = losses.NPairsLoss()(*_first_against_second(views, labels))
    mean = terms.total / terms.count
  np.testing.assert_allclose(mean, expected, rtol=1e-5)
  for got, other in zip(tape.gradient(mean, views), tape.gradient(expected, views)):
    _assert_same_gradient(got, other)


def _first_against_second(views, labels):
  """Anchors of the first view; of the candidates only the second view's count."""
  num = len(labels)
  candidates = Candidates(
    embeddings=tf.concat(views, 0),
    labels=tf.concat([labels, labels], 0),
    is_valid=tf.repeat([False, True], num),
    positions=tf.range(num),
  )
  return Anchors(views[0], labels, tf.ones([num])), candidates


def _assert_same_gradient(got, expected):
  expected = tf.convert_to_tensor(expected).numpy()
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
