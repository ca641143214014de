"""Random values of class centres: initial ones, and the classes drawn in a step.

Both are pure functions of a seed, so they are the same on any number of replicas.

Shapes: C classes, k centres of a class, D dimensions, n intervals.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

# Classes whose values are drawn together.
_BLOCK = 4096


def initial_centres(
  first: int, last: int, centres_per_class: int, embedding_size: int, seed: int
) -> np.ndarray:
  """Returns random centres with norms of about 1, [last − first, k·D] float32.

  Args:
    first: first class.
    last: last class, exclusive.
    centres_per_class: k.
    embedding_size: D.
    seed: of all classes.
  """
  parts = []
  for block in range(first // _BLOCK, -(-last // _BLOCK)):
    values = tf.random.stateless_normal(
      [_BLOCK, centres_per_class * embedding_size],
      [seed, block],
      stddev=embedding_size**-0.5,
      alg="philox",
    )
    begin = block * _BLOCK
    parts.append(values[max(first - begin, 0) : last - begin].numpy())
  return np.concatenate(parts)


def draw_classes(
  first: tf.Tensor,
  classes_per_replica: int,
  num_intervals: int,
  num_classes: int,
  seed: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
  """Draws a class from each interval that contains classes of a replica.

  The C classes, from a random one on, are divided into n intervals of nearly equal
  length.

  Args:
    first: [] int32, first class of the replica.
    classes_per_replica: number of its classes.
    num_intervals: n.
    num_classes: C.
    seed: [2] int32, of the step.

  Returns:
    [m] int32, classes, some of them of other replicas; [m] float32, lengths of their
    intervals.
  """
  num_before = (classes_per_replica - 1) * num_intervals
  size = min(num_intervals, -(-num_before // num_classes) + 2)
  # These bits are the same on all devices; floats would differ with XLA.
  draws = tf.random.stateless_uniform(
    [num_intervals + 1], seed, None, None, tf.uint32, alg="philox"
  )
  count = tf.constant(num_classes, tf.int64)
  # Intervals have unequal lengths if their number does not divide C. They begin at a
  # random class, so that each class is drawn with equal frequency.
  offset = _part_of(draws[-1], count)
  start = (tf.cast(first, tf.int64) - offset) % count
  start = start * num_intervals // count
  intervals = (start + tf.range(size, dtype=tf.int64)) % num_intervals
  begins = intervals * count // num_intervals
  lengths = (intervals + 1) * count // num_intervals - begins
  places = _part_of(tf.gather(draws, intervals), lengths)
  classes = (begins + places + offset) % count
  classes = tf.ensure_shape(tf.cast(classes, tf.int32), [size])
  return classes, tf.cast(lengths, tf.float32)


def _part_of(draws: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
  """Returns integers in 0…length−1, int64, from random uint32."""
  products = tf.cast(draws, tf.int64) * lengths
  return tf.bitwise.right_shift(products, tf.constant(32, tf.int64))
