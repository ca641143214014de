from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.losses.loss_terms import PairMasks
from trainer.losses.triplet import farthest_positive, nearest_negative

_DISTANCES = tf.constant([[0.0, 3.0, 5.0, 4.0], [2.0, 0.0, 7.0, 1.0]])


def _pairs(positive, negative):
  return PairMasks(
    *(tf.constant(np.array(each, bool)) for each in (positive, negative))
  )


def test_farthest_positive_is_the_largest_distance_to_one():
  is_positive = tf.constant([[False, True, False, True], [True, False, False, True]])
  np.testing.assert_array_equal(farthest_positive(_DISTANCES, is_positive), [4, 2])


def test_anchor_without_a_positive_has_farthest_positive_zero():
  is_positive = tf.zeros([2, 4], tf.bool)
  np.testing.assert_array_equal(farthest_positive(_DISTANCES, is_positive), [0, 0])


def test_nearest_negative_is_the_smallest_distance_to_one():
  pairs = _pairs([[0, 1, 0, 0], [1, 0, 0, 0]], [[0, 0, 1, 1], [0, 0, 1, 1]])
  np.testing.assert_array_equal(nearest_negative(_DISTANCES, pairs), [4, 1])


def test_anchor_without_a_negative_has_its_farthest_positive_instead():
  pairs = _pairs([[0, 1, 1, 1], [0, 0, 0, 0]], np.zeros((2, 4)))
  np.testing.assert_array_equal(nearest_negative(_DISTANCES, pairs), [5, 0])
