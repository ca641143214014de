"""Learning rates: schedules over the steps, and scaling with the batch size.

Each schedule begins with a warm-up: at step t < warmup_steps, counted from 0, the rate
is peak · (t + 1) / warmup_steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Union

import gin
import tensorflow as tf

from trainer.errors import UserError


class _Warmed(tf.keras.optimizers.schedules.LearningRateSchedule):
  """Base of the schedules: a linear warm-up to a peak."""

  def __init__(self, *, peak: float, warmup_steps: int):
    if peak <= 0 or warmup_steps < 0:
      raise UserError(
        f"{type(self).__name__} has peak={peak} and warmup_steps={warmup_steps}; the "
        "peak must be above 0 and the steps 0 or more."
      )
    self._peak = peak
    self._warmup_steps = warmup_steps

  def __call__(self, step) -> tf.Tensor:
    """Returns the rate of a step, [] float32."""
    step = tf.cast(step, tf.float32)
    warm = self._peak * (step + 1.0) / max(1, self._warmup_steps)
    return tf.where(step < self._warmup_steps, warm, self._after(step))

  def _after(self, step: tf.Tensor) -> tf.Tensor:
    raise NotImplementedError

  def get_config(self):
    """Returns the arguments."""
    return {"peak": self._peak, "warmup_steps": self._warmup_steps}


@gin.register
class Constant(_Warmed):
  """A constant rate after the warm-up.

  Args:
    peak: the rate, > 0.
    warmup_steps: steps until it is reached; 0 for none.
  """

  def __init__(self, *, peak: float, warmup_steps: int = 0):
    super().__init__(peak=peak, warmup_steps=warmup_steps)

  def _after(self, step):
    return tf.constant(self._peak, tf.float32)


@gin.register
class Cosine(_Warmed):
  """A half cosine from the peak to `end`, until `num_steps`.

  Args:
    peak: the rate after the warm-up, > 0.
    num_steps: total number of steps, including the warm-up.
    warmup_steps: steps until the peak is reached; 0 for none.
    end: the rate at and after `num_steps`.
  """

  def __init__(
    self, *, peak: float, num_steps: int, warmup_steps: int = 0, end: float = 0.0
  ):
    super().__init__(peak=peak, warmup_steps=warmup_steps)
    if num_steps <= warmup_steps:
      raise UserError(
        f"Cosine.num_steps={num_steps} must be more than warmup_steps={warmup_steps}."
      )
    self._num_steps = num_steps
    self._end = end

  def _after(self, step):
    length = self._num_steps - self._warmup_steps
    done = tf.clip_by_value((step - self._warmup_steps) / length, 0.0, 1.0)
    return self._end + (self._peak - self._end) * (1 + tf.cos(math.pi * done)) / 2

  def get_config(self):
    """Returns the arguments."""
    return {**super().get_config(), "num_steps": self._num_steps, "end": self._end}


@gin.register
class Steps(_Warmed):
  """The peak, multiplied by `factor` at each of the given steps.

  Args:
    peak: the rate after the warm-up, > 0.
    at_steps: steps at which the rate changes, ascending.
    factor: multiplier at each of them, usually 0.1.
    warmup_steps: steps until the peak is reached; 0 for none.
  """

  def __init__(
    self,
    *,
    peak: float,
    at_steps: Sequence[int],
    factor: float = 0.1,
    warmup_steps: int = 0,
  ):
    super().__init__(peak=peak, warmup_steps=warmup_steps)
    if list(at_steps) != sorted(set(at_steps)):
      raise UserError(f"Steps.at_steps={at_steps} must be increasing.")
    self._at_steps = tuple(at_steps)
    self._factor = factor

  def _after(self, step):
    passed = step[..., None] >= tf.constant(self._at_steps, tf.float32)
    num_passed = tf.reduce_sum(tf.cast(passed, tf.float32), -1)
    return self._peak * self._factor**num_passed

  def get_config(self):
    """Returns the arguments."""
    return {
      **super().get_config(),
      "at_steps": self._at_steps,
      "factor": self._factor,
    }


@gin.register
def scaled_to_batch(
  *,
  rate: float,
  reference_batch_size: int,
  classes_per_batch: int,
  samples_per_class: int,
) -> float:
  """Applies the linear scaling rule: rate · global batch / reference batch.

  Source: Goyal et al. 2017, https://arxiv.org/abs/1706.02677.

  Args:
    rate: learning rate for the reference batch.
    reference_batch_size: examples.
    classes_per_batch: P of this run.
    samples_per_class: K of this run.
  """
  return rate * classes_per_batch * samples_per_class / reference_batch_size


LearningRate = Union[float, tf.keras.optimizers.schedules.LearningRateSchedule]


def as_schedule(
  name: str, learning_rate: LearningRate
) -> tf.keras.optimizers.schedules.LearningRateSchedule:
  """Returns a schedule for a learning rate, so that no variable holds the rate.

  Keras keeps a constant rate in a variable of the optimizer. A checkpoint would restore
  it, and the rate of a changed configuration would have no effect.

  Args:
    name: of the optimizer, for the message.
    learning_rate: a number or a schedule.

  Raises:
    UserError: the learning rate is a number that is not above 0.
  """
  if not isinstance(learning_rate, (int, float)):
    return learning_rate
  if not learning_rate > 0:
    raise UserError(f"{name}.learning_rate={learning_rate} must be greater than 0.")
  return Constant(peak=learning_rate)
