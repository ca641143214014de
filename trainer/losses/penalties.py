"""What a triplet costs, given how far its positive and its negative are.

Shapes: T anchors, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Callable

import tensorflow as tf

from trainer.errors import UserError

# From d_ap [T, 1] and d_an [T, C]: the cost of each triplet and its derivative by
# d_ap, both [T, C]; the derivative by d_an is the same, negated.
PenaltyFn = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

# A number; a scalar variable or the tensor of a graph, which is read at each call; or
# "soft".
Margin = Any


def read_margin(margin: Margin) -> Any:
  """Reads a margin, and refuses one that no triplet needs to keep.

  Args:
    margin: a number, of NumPy or TensorFlow too; or a scalar variable or the tensor of
      a graph.

  Returns:
    A float; the variable or the tensor itself, so that its value may change.

  Raises:
    UserError: the margin is not one finite number above 0; a variable as it is now.
  """
  value = tf.get_static_value(margin) if tf.is_tensor(margin) else margin
  if isinstance(margin, tf.Variable):
    value = margin.numpy() if tf.executing_eagerly() else None
  if getattr(margin, "shape", ()) not in ((), None):
    raise UserError(f"margin has shape {tuple(margin.shape)}; give one number.")
  if value is None:
    return margin
  try:
    number = float(value)
  except (TypeError, ValueError):
    raise UserError(f"margin={margin!r} is no number; give one such as 0.2.") from None
  if not number > 0:
    raise UserError(f"margin={value} is not above 0; give a margin such as 0.2.")
  if number == math.inf:
    raise UserError(f"margin={value} is not finite; give a margin such as 0.2.")
  return margin if isinstance(margin, tf.Variable) else number


def margin_parameters(margin: Any) -> list[tf.Tensor]:
  """Returns what a loss passes into its compiled part: a margin that may change.

  Args:
    margin: as of `read_margin`.

  Returns:
    Its value, [] float32, without gradient; nothing for a float, which is compiled in.
  """
  if not tf.is_tensor(margin):
    return []
  return [tf.stop_gradient(tf.cast(tf.convert_to_tensor(margin), tf.float32))]


def margin_of(margin: Any, parameters: Sequence[tf.Tensor]) -> Any:
  """Returns the margin in the compiled part.

  Args:
    margin: as of `read_margin`.
    parameters: values of `margin_parameters`.
  """
  return tf.stop_gradient(parameters[0]) if tf.is_tensor(margin) else margin


def penalty_of(margin: Margin) -> PenaltyFn:
  """The hinge of a margin, or the soft margin for None.

  Args:
    margin: as of `margin_of`, or None.
  """
  return soft_margin if margin is None else hinge(margin)


def hinge(margin: Any) -> PenaltyFn:
  """max(d_ap − d_an + margin, 0)."""

  def penalty(positive: tf.Tensor, negative: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    cost = tf.nn.relu(positive + margin - negative)
    return cost, tf.sign(cost)

  return penalty


def hinge_of_semi_hard(margin: Any) -> PenaltyFn:
  """d_ap − d_an + margin where d_ap < d_an < d_ap + margin, and 0 elsewhere."""

  def penalty(positive: tf.Tensor, negative: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    cost = tf.nn.relu(positive + margin - negative)
    cost = tf.where(negative > positive, cost, 0.0)
    return cost, tf.sign(cost)

  return penalty


def soft_margin(
  positive: tf.Tensor, negative: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """log(1 + exp(d_ap − d_an))."""
  return tf.nn.softplus(positive - negative), tf.sigmoid(positive - negative)
