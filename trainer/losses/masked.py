"""Logarithms of sums over some candidates, safe where there is none.

Shapes: T anchors, C candidates.
"""

from __future__ import annotations

import tensorflow as tf

# Stands for log 0: finite, so that gradients through it are 0 and not NaN.
LOG_OF_NOTHING = -1e30


def log_sum_exp(values: tf.Tensor, is_member: tf.Tensor) -> tf.Tensor:
  """Log of Σ exp(value) over members, [T]; `LOG_OF_NOTHING` where there is none.

  Args:
    values: [T, C] float32.
    is_member: [T, C] bool.
  """
  masked = tf.where(is_member, values, LOG_OF_NOTHING)
  largest = tf.stop_gradient(tf.reduce_max(masked, 1, keepdims=True))
  # Not a pass of its own. What is not a number is a member.
  has_member = ~(largest[:, 0] <= LOG_OF_NOTHING)
  shares = tf.where(is_member, tf.exp(masked - largest), 0.0)
  total = tf.where(has_member, tf.reduce_sum(shares, 1), 1.0)
  return tf.where(has_member, tf.math.log(total) + largest[:, 0], LOG_OF_NOTHING)


def num_members(is_member: tf.Tensor) -> tf.Tensor:
  """How many members each anchor has, [T] float32."""
  return tf.reduce_sum(tf.cast(is_member, tf.float32), 1)
