"""What a triplet costs, given how far its positive and its negative are.

Shapes: T anchors, C candidates.
"""

from __future__ import annotations

from typing import Callable, Union

import tensorflow as tf

from trainer.errors import UserError

# From d_ap [T, 1] and d_an [T, C]: the cost of each triplet and its derivative by
# d_ap, both [T, C]; the derivative by d_an is the same, negated.
PenaltyFn = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

Margin = Union[float, str]


def check_margin(margin: float) -> None:
  """Refuses a margin that no triplet needs to keep.

  Raises:
    UserError: the margin is not above 0.
  """
  if not margin > 0:
    raise UserError(f"margin={margin} is not above 0; give a margin such as 0.2.")


def penalty_of(margin: Margin) -> PenaltyFn:
  """The hinge of a margin, or the soft margin for "soft".

  Raises:
    UserError: the margin is neither a number above 0 nor "soft".
  """
  if margin == "soft":
    return soft_margin
  if isinstance(margin, str):
    raise UserError(f'margin={margin!r} is unknown; give a number above 0, or "soft".')
  check_margin(margin)
  return hinge(margin)


def hinge(margin: float) -> PenaltyFn:
  """max(d_ap − d_an + margin, 0)."""

  def penalty(positive: tf.Tensor, negative: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    cost = tf.nn.relu(positive + margin - negative)
    return cost, tf.sign(cost)

  return penalty


def hinge_of_semi_hard(margin: float) -> PenaltyFn:
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
