from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.losses.softmax import LOG_ZERO, log_sum_exp, num_members

_VALUES = tf.constant([[1.0, 2.0, 500.0], [-900.0, -901.0, 3.0], [0.0, 1.0, 2.0]])
_IS_MEMBER = tf.constant(
  [[True, True, False], [True, True, False], [False, False, False]]
)


def test_log_of_the_sum_is_over_members_alone():
  expected = [np.logaddexp(1, 2), np.logaddexp(-900, -901), LOG_ZERO]
  np.testing.assert_allclose(log_sum_exp(_VALUES, _IS_MEMBER), expected, rtol=1e-6)


def test_gradient_is_the_softmax_of_members_and_zero_without_one():
  with tf.GradientTape() as tape:
    tape.watch(_VALUES)
    value = log_sum_exp(_VALUES, _IS_MEMBER)
  near = 1 / (1 + np.exp(-1))
  expected = [[1 - near, near, 0], [near, 1 - near, 0], [0, 0, 0]]
  np.testing.assert_allclose(tape.gradient(value, _VALUES), expected, rtol=1e-5)


def test_members_are_counted_by_anchor():
  np.testing.assert_array_equal(num_members(_IS_MEMBER), [2, 2, 0])
