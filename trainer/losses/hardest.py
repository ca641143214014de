"""The hardest positive and negative of each anchor.

Shapes: T anchors, C candidates.
"""

from __future__ import annotations

import tensorflow as tf

from trainer.losses.relevance import Relevance


def farthest_positive(distances: tf.Tensor, is_positive: tf.Tensor) -> tf.Tensor:
  """Distance of each anchor to its farthest positive, [T]; 0 if it has none.

  Args:
    distances: [T, C] float32 >= 0.
    is_positive: [T, C] bool.
  """
  return tf.reduce_max(tf.where(is_positive, distances, 0.0), 1)


def nearest_negative(distances: tf.Tensor, pairs: Relevance) -> tf.Tensor:
  """Distance of each anchor to its nearest negative, [T].

  An anchor without a negative has its farthest positive instead, 0 without either.

  Args:
    distances: [T, C] float32 >= 0.
    pairs: which distances are to positives and which to negatives.
  """
  has_negative = tf.reduce_any(pairs.is_negative, 1)
  nearest = tf.reduce_min(tf.where(pairs.is_negative, distances, float("inf")), 1)
  farthest = farthest_positive(distances, pairs.is_positive)
  return tf.where(has_negative, nearest, farthest)
