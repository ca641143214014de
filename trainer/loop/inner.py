"""The inner loop: several steps on all replicas for one call from the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from trainer.distribute.collectives import current_collectives
from trainer.loop.step import TrainStep


class InnerLoop:
  """Runs steps on the devices, and brings their statistics to the host once.

  Args:
    step: one update on one replica.
    strategy: the replicas.
    batches: distributed iterator over replica batches.
    zero_statistics: zeros in the structure that a step returns.
  """

  def __init__(
    self,
    *,
    step: TrainStep,
    strategy: tf.distribute.Strategy,
    batches: Any,
    zero_statistics: Mapping[str, Any],
  ):
    self._step = step
    self._strategy = strategy
    self._batches = batches
    self._zero_statistics = zero_statistics

  def run(self, num_steps: int) -> Mapping[str, Any]:
    """Runs that many steps.

    Args:
      num_steps: how many; another number doesn't trace again.

    Returns:
      The steps' statistics, added up over steps and replicas, as NumPy values.
    """
    totals = self._run(self._batches, tf.constant(num_steps))
    return tf.nest.map_structure(lambda total: total.numpy(), totals)

  @tf.function
  def _run(self, batches, num_steps):
    # The loop is around strategy.run: all_gather raises in a loop inside of it.
    totals = self._strategy.run(self._zeros)
    for _ in tf.range(num_steps):
      totals = self._strategy.run(self._step_and_add, args=(next(batches), totals))
    return tf.nest.map_structure(
      lambda total: self._strategy.reduce("SUM", total, axis=None), totals
    )

  def _zeros(self):
    return tf.nest.map_structure(tf.zeros_like, self._zero_statistics)

  def _step_and_add(self, batch, totals):
    statistics = self._step(batch, current_collectives())
    return tf.nest.map_structure(tf.add, totals, statistics)
