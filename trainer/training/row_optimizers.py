"""Optimizers for the rows of a table, of which a step may read only some.

Rows that are read in every step get the updates of the dense optimizers. Others keep
value and moments in the steps that do not read them: momentum and weight decay act only
on rows that are read. The bias correction of Adam counts all steps.

Shapes: n rows, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.training.learning_rates import LearningRate, as_schedule


@gin.register
class RowSGD:
  """v ← μ·v + g + λ·w; w ← w − η·v.

  Args:
    learning_rate: η > 0, or a schedule.
    momentum: μ, in [0, 1).
    weight_decay: λ >= 0.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(
    self,
    *,
    learning_rate: LearningRate,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
  ):
    if not 0 <= momentum < 1 or not 0 <= weight_decay < math.inf:
      raise UserError(
        f"RowSGD.momentum={momentum} must be in [0, 1) and weight_decay={weight_decay} "
        "at least 0."
      )
    self._rate_fn = as_schedule("RowSGD", learning_rate)
    self._momentum = momentum
    self._weight_decay = weight_decay
    self.num_moments = 1 if momentum else 0

  def update(
    self,
    values: tf.Tensor,
    moments: Sequence[tf.Tensor],
    gradients: tf.Tensor,
    step: tf.Tensor,
  ) -> tuple[tf.Tensor, Sequence[tf.Tensor]]:
    """Returns new values and moments; see `RowOptimizer`."""
    changes = gradients + self._weight_decay * values
    if moments:
      changes = self._momentum * moments[0] + changes
    return values - self._rate_fn(step) * changes, [changes] if moments else []


@gin.register
class RowAdam:
  """Adam, or AdamW with a weight decay, as in Keras.

  w ← w − η·(m̂ / (√v̂ + ε̂) + λ·w), where ε̂ = ε / √(1 − β₂^t) at step t.

  Args:
    learning_rate: η > 0, or a schedule.
    beta_1: decay of m, the mean of the gradients.
    beta_2: decay of v, the mean of the squared gradients.
    epsilon: ε > 0.
    weight_decay: λ >= 0.

  Raises:
    UserError: an argument is out of its range.
  """

  num_moments = 2

  def __init__(
    self,
    *,
    learning_rate: LearningRate,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float = 0.0,
  ):
    are_decays = 0 <= beta_1 < 1 and 0 <= beta_2 < 1
    if not are_decays or not 0 < epsilon < math.inf or not 0 <= weight_decay < math.inf:
      raise UserError(
        f"RowAdam.beta_1={beta_1} and beta_2={beta_2} must be in [0, 1), "
        f"epsilon={epsilon} above 0 and weight_decay={weight_decay} at least 0."
      )
    self._rate_fn = as_schedule("RowAdam", learning_rate)
    self._beta_1 = beta_1
    self._beta_2 = beta_2
    self._epsilon = epsilon
    self._weight_decay = weight_decay

  def update(
    self,
    values: tf.Tensor,
    moments: Sequence[tf.Tensor],
    gradients: tf.Tensor,
    step: tf.Tensor,
  ) -> tuple[tf.Tensor, Sequence[tf.Tensor]]:
    """Returns new values and moments; see `RowOptimizer`."""
    mean, square = moments
    count = tf.cast(step + 1, tf.float32)
    mean = self._beta_1 * mean + (1 - self._beta_1) * gradients
    square = self._beta_2 * square + (1 - self._beta_2) * gradients**2
    # As Keras does, with ε beside the root of the uncorrected second moment.
    correction = tf.sqrt(1 - self._beta_2**count) / (1 - self._beta_1**count)
    rate = self._rate_fn(step)
    decayed = values * (1 - rate * self._weight_decay)
    changes = rate * correction * mean / (tf.sqrt(square) + self._epsilon)
    return decayed - changes, [mean, square]
