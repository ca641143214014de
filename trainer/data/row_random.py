"""Random numbers for the rows of a batch, whoever computes them.

The numbers of a row depend on seed, step and the row's place in the global batch, and
so neither on threads nor on how many workers or replicas share the batch. They are
drawn for all rows, and what is computed of them is too, before this worker's are taken:
the last bit of a root or an exponential may depend on how many are computed at once.

Shapes: G rows of the global batch, L of this worker.
"""

from __future__ import annotations

import tensorflow as tf

# Apart from other uses of a seed.
_SALT = 0x5EED


class RowRandom:
  """Draws numbers for this worker's rows of a step.

  Args:
    seed: of the run.
    step: scalar int64.
    num_rows: G.
    first_row: place of this worker's first row.
    num_local_rows: L.
  """

  def __init__(
    self,
    seed: int,
    step: tf.Tensor,
    *,
    num_rows: int,
    first_row: int,
    num_local_rows: int,
  ):
    self._seed = seed
    self._step = step
    self._num_rows = num_rows
    self._rows = slice(first_row, first_row + num_local_rows)
    self._num_calls = 0

  def uniform(
    self, num_values: int, low: float = 0.0, high: float = 1.0
  ) -> list[tf.Tensor]:
    """Numbers that no other call gives.

    Args:
      num_values: how many for each row.
      low: least value.
      high: above all values.

    Returns:
      As many [G] float32 tensors.
    """
    self._num_calls += 1
    salted = self._seed * 1_000_003 + _SALT + self._num_calls
    seed = tf.stack([tf.constant(salted % 2**63, tf.int64), self._step])
    shape = [self._num_rows, num_values]
    values = tf.random.stateless_uniform(shape, seed, low, high)
    return tf.unstack(values, axis=1)

  def local(self, values: tf.Tensor) -> tf.Tensor:
    """This worker's rows: [G, ...] to [L, ...]."""
    return values[self._rows]
