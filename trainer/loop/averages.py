"""Exponential moving averages of the weights, for evaluation and export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import tensorflow as tf

from trainer.errors import UserError


class AveragedWeights(tf.Module):
  """An average beside each weight: a ← d·a + (1 − d)·w after each step.

  At step t, d = min(decay, (1 + t) / (10 + t)), so that it forgets where it started.

  Args:
    weights: variables of the encoder, which exist.
    decay: d, in (0, 1).

  Raises:
    UserError: the decay is not in (0, 1).
  """

  def __init__(self, weights: Sequence[tf.Variable], *, decay: float):
    super().__init__()
    if not 0 < decay < 1:
      raise UserError(f"averaging_decay={decay} must be between 0 and 1, e.g. 0.999.")
    self._decay = decay
    # Hidden in a function, or checkpoints would name the weights after this.
    self._weights_fn = lambda: tuple(weights)
    # All replicas have the same, each computes its own: nothing need be sent.
    self.averages = [
      tf.Variable(
        tf.convert_to_tensor(weight),
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
      )
      for weight in weights
    ]

  def update(self, step: tf.Tensor) -> None:
    """Takes in the weights; to be called on each replica after each step.

    Args:
      step: [] integer, number of steps done.
    """
    step = tf.cast(step, tf.float32)
    decay = tf.minimum(self._decay, (1.0 + step) / (10.0 + step))
    for average, weight in zip(self.averages, self._weights_fn()):
      average.assign_add((1.0 - decay) * (tf.cast(weight, tf.float32) - average))

  @contextlib.contextmanager
  def in_use(self) -> Iterator[None]:
    """Puts the averages in the place of the weights, for as long as the block takes.

    Yields:
      Nothing.
    """
    weights = self._weights_fn()
    before = [weight.numpy() for weight in weights]
    for weight, average in zip(weights, self.averages):
      weight.assign(average.numpy())
    try:
      yield
    finally:
      for weight, value in zip(weights, before):
        weight.assign(value)
