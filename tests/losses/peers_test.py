"""Losses compared with TensorFlow Addons, where both have them.

Recorded by the version in the file, for embeddings and labels of the golden vectors:
its losses with their default distance and reducer, after its miners where named.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches, golden
from trainer import losses
from trainer.losses import presets
from trainer.losses.loss_terms import Anchors, Candidates


@pytest.fixture(scope="module")
def addons():
  return pytest.importorskip("tensorflow_addons").losses


def test_contrastive_loss_is_half_of_addons_over_all_pairs(addons):
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


def test_n_pairs_loss_of_two_views_equals_addons(addons):
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
  """Returns anchors of the first view and candidates of the second view."""
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


_RECORDED = np.load(pathlib.Path(__file__).parents[1] / "golden" / "pml_losses.npz")
_CASES = ("pk_4x4x8", "unit_norm", "unbalanced", "lone_anchor", "large_labels")
# Recorded: TripletMarginLoss(margin) alone, after BatchHardMiner(), and after
# TripletMarginMiner(margin, "semihard"); NTXentLoss(0.5); SupConLoss(0.5);
# CircleLoss(0.4, 16); MultiSimilarityLoss(2, 10, 0.5) after MultiSimilarityMiner(0.1).
_LOSSES = {
  "batch_all/margin=0.05": presets.pml_batch_all(margin=0.05),
  "batch_all/margin=0.2": presets.pml_batch_all(margin=0.2),
  "batch_hard/margin=0.05": presets.pml_batch_hard(margin=0.05),
  "batch_hard/margin=0.2": presets.pml_batch_hard(margin=0.2),
  "semi_hard/margin=0.05": presets.pml_semi_hard(margin=0.05),
  "semi_hard/margin=0.2": presets.pml_semi_hard(margin=0.2),
  "info_nce/temperature=0.5": losses.InfoNCELoss(temperature=0.5),
  "supervised_contrastive/temperature=0.5": losses.SupervisedContrastiveLoss(
    temperature=0.5
  ),
  "circle": losses.CircleLoss(margin=0.4, scale=16.0),
  "multi_similarity": losses.MultiSimilarityLoss(
    positive_scale=2.0, negative_scale=10.0, threshold=0.5, mining_margin=0.1
  ),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", _LOSSES)
def test_value_and_gradient_equal_the_recorded_ones(name):
  for case in _CASES:
    total, count, gradient = batches.evaluate(
      _LOSSES[name],
      golden.VECTORS[f"{case}/embeddings"],
      golden.VECTORS[f"{case}/labels"].astype(np.int32),
    )
    wanted, slopes = (
      _RECORDED[f"{case}/{name}/{each}"] for each in ("loss", "gradient")
    )
    np.testing.assert_allclose(total / count, wanted, rtol=1e-5)
    atol = 2e-6 * np.abs(slopes).max()
    np.testing.assert_allclose(gradient / count, slopes, rtol=0, atol=atol)
