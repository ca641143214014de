"""The inner loop: several steps on all replicas for one call from the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.distribute.collectives import current_collectives
from trainer.distribute.replica_batches import ReplicaBatches
from trainer.loop.step import TrainStep

# AutoGraph is for the loop below alone: to convert what runs inside of it, which has no
# conditions, takes a third of a run's start.
_as_it_is = tf.autograph.experimental.do_not_convert


class Done(NamedTuple):
  """What a call of the inner loop did.

  Attributes:
    num_steps: how many updates were made: fewer than asked where the next one was not
      finite, which was not made.
    statistics: of these steps, added up over steps and replicas, as NumPy values.
    words: [n] int32, what the hosts had to say at the end of the call, summed over
      replicas: so all of them know the same.
  """

  num_steps: int
  statistics: Mapping[str, Any]
  words: np.ndarray


class InnerLoop:
  """Runs steps on the devices, and brings their statistics to the host once.

  Args:
    step: one update on one replica.
    strategy: the replicas.
    batches: of the replicas.
    zero_statistics: zeros in the structure that a step returns.
    words_fn: what this host has to say to all, [n] int32; asked once a call, after the
      steps.
  """

  def __init__(
    self,
    *,
    step: TrainStep,
    strategy: tf.distribute.Strategy,
    batches: ReplicaBatches,
    zero_statistics: Mapping[str, Any],
    words_fn: Callable[[], np.ndarray],
  ):
    self._step = step
    self._strategy = strategy
    self._batches = batches
    self._zero_statistics = zero_statistics
    self._words_fn = words_fn

  def run(self, num_steps: int) -> Done:
    """Runs that many steps, or as many as are finite.

    Args:
      num_steps: how many; another number doesn't trace again.
    """
    done = self._run(self._batches.iterator, tf.constant(num_steps))
    num_done, totals, words = tf.nest.map_structure(lambda each: each.numpy(), done)
    return Done(int(num_done), totals, words)

  def go_on_with(self, batches: ReplicaBatches) -> None:
    """Takes other batches from here on; nothing is traced again.

    Args:
      batches: of the replicas, of the same shapes.
    """
    self._batches = batches

  @tf.function
  def _run(self, batches, num_steps):
    # The loop is around strategy.run: all_gather raises in a loop inside of it, and an
    # update in a condition.
    totals = self._strategy.run(self._zeros)
    num_done, is_finite = 0, True
    while num_done < num_steps and is_finite:
      before = self._strategy.run(self._forward_state)
      proposal = self._strategy.run(self._propose, args=(next(batches),))
      is_finite = self._strategy.experimental_local_results(proposal.is_finite)[0]
      if is_finite:
        totals = self._strategy.run(self._apply_and_add, args=(proposal, totals))
        num_done += 1
      else:
        self._strategy.run(self._restore, args=(before,))
    words = self._strategy.run(self._as_given, args=(self._words(),))
    return num_done, *tf.nest.map_structure(self._sum, (totals, words))

  @_as_it_is
  def _words(self):
    words = tf.numpy_function(self._words_fn, [], tf.int32)
    return tf.ensure_shape(words, np.shape(self._words_fn()))

  @_as_it_is
  def _sum(self, value):
    return self._strategy.reduce("SUM", value, axis=None)

  @_as_it_is
  def _as_given(self, value):
    return tf.identity(value)

  @_as_it_is
  def _zeros(self):
    return tf.nest.map_structure(tf.zeros_like, self._zero_statistics)

  @_as_it_is
  def _propose(self, batch):
    return self._step.propose(batch, current_collectives())

  @_as_it_is
  def _apply_and_add(self, proposal, totals):
    self._step.apply(proposal.update)
    return tf.nest.map_structure(tf.add, totals, proposal.statistics)

  @_as_it_is
  def _forward_state(self):
    return self._step.read_forward_state()

  @_as_it_is
  def _restore(self, values):
    self._step.write_forward_state(values)
