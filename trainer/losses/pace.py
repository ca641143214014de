"""How far a curriculum has come: by the step, or by how much is still to be learned."""

from __future__ import annotations

from typing import Protocol

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.keras_loss import KerasSerializable
from trainer.losses.terms import Ratio


class Pace(Protocol):
  """Gives the progress of a curriculum, from 0 at its begin to 1 at its end."""

  def __call__(self, progress: tf.Tensor, step: tf.Tensor, active: Ratio) -> tf.Tensor:
    """The progress of the next step.

    Args:
      progress: [] float32, of the step that was done.
      step: [] int32, number of steps done.
      active: of the step that was done, the terms of all replicas that are not 0, and
        how many there were.
    """


@gin.register
class LinearPace(KerasSerializable):
  """From 0 to 1 in equal steps.

  Args:
    first_step: until which it is 0, >= 0.
    last_step: from which it is 1, above first_step.

  Raises:
    UserError: the steps are not in that order.
  """

  def __init__(self, *, first_step: int, last_step: int):
    if not 0 <= first_step < last_step:
      raise UserError(
        f"LinearPace goes from first_step={first_step} to last_step={last_step}; the "
        "first must be at least 0, and below the last."
      )
    self._first_step = first_step
    self._last_step = last_step

  def __call__(self, progress: tf.Tensor, step: tf.Tensor, active: Ratio) -> tf.Tensor:
    """By the step alone; see `Pace`."""
    del progress, active
    done = tf.cast(step - self._first_step, tf.float32)
    done /= self._last_step - self._first_step
    return tf.clip_by_value(done, 0.0, 1.0)


@gin.register
class ActivePace(KerasSerializable):
  """On where too little is active, back where too much is.

  Few active terms are starvation: what is compared is learned, and harder pairs teach
  more. Where nearly all are active nothing is learned, as in a collapse, where no
  distance differs from another: easier pairs, which are more, lead out of it.

  Args:
    lowest: share of active terms below which it goes on.
    highest: share above which it goes back.
    change: by how much a step; the inverse of the steps that the whole way takes.

  Raises:
    UserError: a number is out of its range.
  """

  def __init__(
    self, *, lowest: float = 0.2, highest: float = 0.9, change: float = 0.002
  ):
    if not 0 <= lowest < highest <= 1 or not 0 < change <= 1:
      raise UserError(
        f"ActivePace needs 0 <= lowest < highest <= 1 and 0 < change <= 1, not "
        f"lowest={lowest}, highest={highest}, change={change}."
      )
    self._lowest = lowest
    self._highest = highest
    self._change = change

  def __call__(self, progress: tf.Tensor, step: tf.Tensor, active: Ratio) -> tf.Tensor:
    """By the active share; where there was no term, as it was; see `Pace`."""
    del step
    share = active.total / tf.maximum(active.count, 1.0)
    is_starving = tf.logical_and(active.count > 0.0, share < self._lowest)
    change = tf.where(is_starving, self._change, 0.0)
    change = tf.where(share > self._highest, -self._change, change)
    return tf.clip_by_value(progress + change, 0.0, 1.0)
