"""How often replicas speak in a step, counted in the graph that is run."""

from __future__ import annotations

import collections

import pytest
import tensorflow as tf

from tests.distribute.parity_test import LOSSES, _batches, _maker
from trainer.distribute.collectives import current_collectives
from trainer.training import parity

_NUM_REPLICAS, _NUM_GATHERED = 2, 24 * 6  # Embeddings of the global batch.


def _graph_and_step(strategy, objective, num_micro_batches):
  make_step = _maker(
    LOSSES["SupervisedContrastiveLoss-learned"],  # Its terms have no loop.
    objective,
    "sgd",
    num_micro_batches=num_micro_batches,
    mining_statistics=None,
  )
  with strategy.scope():
    step = make_step()
  update = tf.function(
    lambda batch: strategy.run(lambda part: step(part, current_collectives()), (batch,))
  )
  batch = parity._distributed(strategy, _batches()[0])
  return update.get_concrete_function(batch).graph, step


def _sizes_of_sums(graph):
  """How many numbers each sum over replicas has, and how often there is one."""
  operations = [each for each in graph.get_operations() if "Reduce" in each.type]
  sums = [each for each in operations if each.type.startswith("Collective")]
  sizes = collections.Counter(each.outputs[0].shape.num_elements() for each in sums)
  return {size: number / _NUM_REPLICAS for size, number in sizes.items()}


def _num_weights_and_more(step):
  """With the gradients, in the same sum, travel three numbers.

  Whether a replica's are not finite, and the two that are its active fraction.
  """
  return sum(v.shape.num_elements() for v in step.trainable_variables) + 3


@pytest.mark.parametrize("num_micro_batches", [1, 3, 12])
def test_gradients_travel_once_a_step_whatever_the_micro_batches(
  mirrored, num_micro_batches
):
  graph, step = _graph_and_step(mirrored(2), "gathered", num_micro_batches)
  num_sent = _num_weights_and_more(step)
  # The count; the gradient to the gathered embeddings; the gradients to the weights.
  assert _sizes_of_sums(graph) == {1: 1, _NUM_GATHERED: 1, num_sent: 1}
  operations = [each.type for each in graph.get_operations()]
  # The text has what is in functions and loops too, where there must be none.
  num_outside = sum(each.startswith("Collective") for each in operations)
  assert str(graph.as_graph_def()).count('op: "Collective') == num_outside > 0
  has_loop = any(each.endswith("While") for each in operations)
  assert has_loop == (num_micro_batches > 1)


def test_without_a_gather_the_gradients_alone_travel(mirrored):
  graph, step = _graph_and_step(mirrored(2), "alone", 3)
  num_sent = _num_weights_and_more(step)
  assert _sizes_of_sums(graph) == {num_sent: 1}
