from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.losses import batches, golden
from trainer import losses
from trainer.errors import UserError
from trainer.losses.loss_terms import PairMasks
from trainer.losses.triplet import farthest_positive, nearest_negative

_DISTANCES = tf.constant([[0.0, 3.0, 5.0, 4.0], [2.0, 0.0, 7.0, 1.0]])


def _pairs(positive, negative):
  return PairMasks(
    *(tf.constant(np.array(each, bool)) for each in (positive, negative))
  )


def test_farthest_positive_is_the_largest_positive_distance():
  is_positive = tf.constant([[False, True, False, True], [True, False, False, True]])
  np.testing.assert_array_equal(farthest_positive(_DISTANCES, is_positive), [4, 2])


def test_anchor_without_a_positive_has_farthest_positive_zero():
  is_positive = tf.zeros([2, 4], tf.bool)
  np.testing.assert_array_equal(farthest_positive(_DISTANCES, is_positive), [0, 0])


def test_nearest_negative_is_the_smallest_negative_distance():
  pairs = _pairs([[0, 1, 0, 0], [1, 0, 0, 0]], [[0, 0, 1, 1], [0, 0, 1, 1]])
  np.testing.assert_array_equal(nearest_negative(_DISTANCES, pairs), [4, 1])


def test_anchor_without_a_negative_has_its_farthest_positive_instead():
  pairs = _pairs([[0, 1, 1, 1], [0, 0, 0, 0]], np.zeros((2, 4)))
  np.testing.assert_array_equal(nearest_negative(_DISTANCES, pairs), [5, 0])


_CLASSES = [losses.BatchAllTripletLoss, losses.BatchHardTripletLoss]
_each_class = pytest.mark.parametrize("loss_class", _CLASSES)


@_each_class
@pytest.mark.parametrize("margin", [0, -0.2])
def test_margin_not_above_zero_is_refused(loss_class, margin):
  with pytest.raises(UserError, match="not above 0"):
    loss_class(margin=margin)


@_each_class
def test_unknown_reduction_is_refused(loss_class):
  with pytest.raises(UserError, match="'sum' is unknown"):
    loss_class(margin=0.2, reduction="sum")


@_each_class
def test_unknown_distance_is_refused(loss_class):
  with pytest.raises(UserError, match="'manhattan' is unknown"):
    loss_class(margin=0.2, distance="manhattan")


@_each_class
def test_column_of_labels_is_refused(loss_class):
  embeddings, labels = batches.random_batch("balanced")
  with pytest.raises(UserError, match="one integer for each"):
    loss_class(margin=0.2)(*batches.arguments(embeddings, labels[:, None]))


def test_batch_hard_loss_without_negatives_equals_the_margin():
  embeddings, labels = batches.random_batch("one_class")
  total, count, gradient = batches.evaluate(
    losses.BatchHardTripletLoss(margin=0.25), embeddings, labels
  )
  assert total / count == pytest.approx(0.25)
  np.testing.assert_array_equal(gradient, 0)


def _mean(loss, embeddings, labels):
  terms = loss(*batches.arguments(embeddings, labels))
  return tf.math.divide_no_nan(terms.total, terms.count)


def _addons(labels, embeddings, margin, squared):
  distance = "squared_euclidean" if squared else "euclidean"
  return _mean(_semi_hard(margin, distance), embeddings, labels)


@functools.cache  # Avoids a new compilation.
def _semi_hard(margin, distance):
  return losses.SemiHardTripletLoss(margin=margin, distance=distance)


@pytest.mark.golden
@pytest.mark.parametrize("key", golden.keys("tfa_semihard"))
def test_semi_hard_equals_addons(key):
  loss, gradient = golden.value_and_gradient(_addons, key)
  golden.assert_value_equals(loss, f"{key}/loss")
  golden.assert_gradient_equals(gradient, key)


def test_semi_hard_is_zero_where_addons_is_nan():
  total, count, gradient = batches.evaluate(
    losses.SemiHardTripletLoss(margin=0.5), *batches.random_batch("all_distinct")
  )
  assert (total, count) == (0, 0)
  assert not gradient.any()


_BATCH_ALL = losses.BatchAllTripletLoss(margin=0.5)
_CHOSEN_OF_ALL = losses.TripletLoss(
  positives="all", negatives="all", margin=0.5, reduction="mean_active"
)


@pytest.mark.parametrize("batch", batches.LABELS)
def test_all_positives_and_all_negatives_equal_batch_all(batch):
  embeddings, labels = batches.random_batch(batch)
  np.testing.assert_allclose(
    _mean(_CHOSEN_OF_ALL, embeddings, labels),
    _mean(_BATCH_ALL, embeddings, labels),
    rtol=1e-6,
  )


_CHOICES = {
  "positives": "all",
  "negatives": "hardest",
  "margin": 0.2,
  "reduction": "mean_active",
}


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"positives": "farthest"}, "positives='farthest' is unknown"),
    ({"negatives": "easy"}, "negatives='easy' is unknown"),
    ({"margin": "hard"}, "margin='hard' is unknown"),
    ({"margin": 0}, "margin=0 is not above 0"),
    ({"reduction": "sum"}, "reduction='sum' is unknown"),
    ({"distance": "manhattan"}, "distance='manhattan' is unknown"),
    (
      {"negatives": losses.DistanceWeightedNegatives(num_dimensions=8)},
      "distance='euclidean' does not fit DistanceWeightedNegatives",
    ),
  ],
)
def test_unknown_choice_is_refused(changed, message):
  with pytest.raises(UserError, match=message):
    losses.TripletLoss(**{**_CHOICES, **changed})


@pytest.mark.parametrize(
  "loss_class", [losses.SemiHardTripletLoss, losses.InsideMarginTripletLoss]
)
def test_margin_not_above_zero_is_refused_triplet_choices(loss_class):
  with pytest.raises(UserError, match="not above 0"):
    loss_class(margin=-1.0)
