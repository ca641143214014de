from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.losses import triplet_sums

_POSITIVE = tf.constant([[1.0], [2.0]])
_NEGATIVE = tf.constant([[0.5, 1.25, 3.0], [2.0, 2.25, 2.75]])


def test_hinge_costs_what_the_margin_lacks():
  cost, derivative = triplet_sums.hinge(0.5)(_POSITIVE, _NEGATIVE)
  np.testing.assert_allclose(cost, [[1.0, 0.25, 0], [0.5, 0.25, 0]])
  np.testing.assert_array_equal(derivative, [[1, 1, 0], [1, 1, 0]])


def test_semi_hard_hinge_leaves_out_negatives_nearer_than_the_positive():
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
def test_derivative_is_that_by_the_positive(penalty):
  positive = tf.broadcast_to(_POSITIVE, _NEGATIVE.shape)
  with tf.GradientTape() as tape:
    tape.watch(positive)
    cost, derivative = penalty(positive, _NEGATIVE)
  np.testing.assert_allclose(derivative, tape.gradient(cost, positive), rtol=1e-6)
