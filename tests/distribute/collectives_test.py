"""Collectives: values and gradients, against sums worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.distribute.collectives import OneReplica, current_collectives
from trainer.distribute.strategy import make_strategy
from trainer.errors import UserError
from trainer.losses.loss_terms import Anchors, LossOutput
from trainer.losses.objectives import global_negatives
from trainer.run import Hardware


def _on_replicas(strategy, function):
  """What a replica function returns on each replica."""
  results = tf.function(lambda: strategy.run(function))()
  return [
    tf.nest.map_structure(lambda v: v.numpy(), each)
    for each in zip(*(strategy.experimental_local_results(r) for r in results))
  ]


def _gathered():
  collectives = current_collectives()
  identity = tf.cast(collectives.replica_id, tf.float32)
  rows = tf.stack([[identity, 1.0], [identity, 2.0]])
  weights = tf.reshape(tf.range(8.0), [4, 2]) * (1 + identity)
  with tf.GradientTape() as tape:
    tape.watch(rows)
    gathered = collectives.gather(rows)
    value = tf.reduce_sum(gathered * weights)
  return gathered, tape.gradient(value, rows)


def test_gather_stacks_rows_in_the_order_of_the_replicas(mirrored):
  for gathered, _ in _on_replicas(mirrored(2), _gathered):
    np.testing.assert_array_equal(gathered, [[0, 1], [0, 2], [1, 1], [1, 2]])


def test_gather_sums_the_gradients_of_all_replicas(mirrored):
  # Replica r weighs by w·(1 + r), so that rows get 3·w, each its own part of w.
  weights = 3 * np.arange(8.0).reshape(4, 2)
  for replica, (_, gradient) in enumerate(_on_replicas(mirrored(2), _gathered)):
    np.testing.assert_allclose(gradient, weights[2 * replica : 2 * replica + 2])


def test_gather_keeps_the_static_shape(mirrored):
  shapes = []

  def record():
    gathered = current_collectives().gather(tf.zeros([3, 5]))
    shapes.append(gathered.shape)
    return (gathered,)

  _on_replicas(mirrored(2), record)
  assert shapes[0] == (6, 5)


def test_labels_of_several_classes_are_gathered(mirrored):
  labels = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1]], bool)
  seen = []

  def loss(anchors, candidates):
    seen.append(candidates.labels.dtype)
    total = tf.reduce_sum(anchors.embeddings)
    return LossOutput(total, tf.constant(2.0), {"labels": candidates.labels})

  def on_replica():
    collectives = current_collectives()
    first = 2 * collectives.replica_id
    rows = tf.ensure_shape(tf.constant(labels)[first : first + 2], [2, 3])
    anchors = Anchors(tf.ones([2, 4]), rows, tf.ones([2]))
    return (global_negatives(loss, anchors, collectives).statistics["labels"],)

  for (gathered,) in _on_replicas(mirrored(2), on_replica):
    np.testing.assert_array_equal(gathered, labels)
  assert set(seen) == {tf.bool}


def test_sum_adds_over_replicas_and_so_does_its_gradient(mirrored):
  def summed():
    collectives = current_collectives()
    scale = tf.cast(collectives.replica_id, tf.float32) + 1
    x = tf.constant(5.0)
    with tf.GradientTape() as tape:
      tape.watch(x)
      value = scale * collectives.sum(x)
    return value, tape.gradient(value, x)

  assert _on_replicas(mirrored(2), summed) == [(10.0, 3.0), (20.0, 3.0)]


def test_one_replica_moves_nothing():
  rows = tf.ones([2, 3])
  assert OneReplica().gather(rows) is rows
  assert OneReplica().sum(rows) is rows


def test_virtual_replicas_are_mirrored():
  assert make_strategy(Hardware("auto", 2)).num_replicas_in_sync == 2


@pytest.mark.parametrize(
  ("hardware", "message"),
  [
    (Hardware("cpu", 2), "needs mirrored"),
    (Hardware("mirrored"), "found no GPU"),
    (Hardware("auto", 64), "before TensorFlow uses a device"),
  ],
)
def test_hardware_that_is_not_there_is_refused(hardware, message):
  if hardware.strategy == "mirrored" and tf.config.list_physical_devices("GPU"):
    pytest.skip("this machine has a GPU")
  with pytest.raises(UserError, match=message):
    make_strategy(hardware)
