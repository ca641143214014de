"""Values and gradients of collectives, against sums computed by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

from tests.distribute.parity_test import LOSSES, _batches, _maker
from trainer.data.pipeline import Batch
from trainer.distribute.collectives import (
  OneReplica,
  XlaCollectives,
  current_collectives,
)
from trainer.distribute.strategy import make_strategy
from trainer.errors import UserError
from trainer.losses.loss_terms import Anchors
from trainer.losses.metric_accumulators import summarize
from trainer.losses.objectives import global_negatives
from trainer.run import Hardware


def _on_replicas(strategy, function):
  """Returns the result of a replica function on each replica."""
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
  # Replica r has the weights w·(1 + r); each row receives 3 times its part of w.
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

  def on_replica():
    collectives = current_collectives()
    first = 2 * collectives.replica_id
    rows = tf.ensure_shape(tf.constant(labels)[first : first + 2], [2, 3])
    anchors = Anchors(tf.ones([2, 4]), rows, tf.ones([2]))
    candidates = global_negatives(anchors, collectives).candidates
    assert candidates.labels.dtype == tf.bool
    return (candidates.labels,)

  for (gathered,) in _on_replicas(mirrored(2), on_replica):
    np.testing.assert_array_equal(gathered, labels)


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


def test_collectives_of_one_replica_are_the_identity():
  rows = tf.ones([2, 3])
  assert OneReplica().gather(rows) is rows
  assert OneReplica().sum(rows) is rows


def test_virtual_replicas_are_mirrored():
  assert make_strategy(Hardware("auto", 2)).num_replicas_in_sync == 2


@pytest.mark.parametrize(
  ("hardware", "message"),
  [
    (Hardware("cpu", 2), "use --strategy=mirrored"),
    (Hardware("mirrored"), "found no GPU"),
    (Hardware("auto", 64), "before TensorFlow uses a device"),
  ],
)
def test_missing_hardware_is_refused(hardware, message):
  if hardware.strategy == "mirrored" and tf.config.list_physical_devices("GPU"):
    pytest.skip("this machine has a GPU")
  with pytest.raises(UserError, match=message):
    make_strategy(hardware)


def _step_and_result(make_collectives, **options):
  step = _maker(LOSSES["InfoNCELoss-learned"], "gathered", "adam", **options)()
  parts = Batch(*(tf.constant(each) for each in _batches()[0]))

  @tf.function(jit_compile=True)
  def update(batch):
    return step(batch, make_collectives())

  statistics = tf.nest.map_structure(lambda v: v.numpy(), dict(update(parts)))
  return [v.numpy() for v in step.trainable_variables], summarize(statistics)


def test_one_replica_trains_like_a_model_without_collectives():
  weights, statistics = _step_and_result(lambda: XlaCollectives(1))
  expected_weights, expected_statistics = _step_and_result(OneReplica)
  assert statistics == pytest.approx(expected_statistics, rel=1e-5)
  for got, expected in zip(weights, expected_weights):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"num_micro_batches": 3, "dropout_rate": 0.2}])
def test_a_step_of_four_replicas_lowers_to_all_reduces(options):
  step = _maker(LOSSES["InfoNCELoss-learned"], "gathered", "adam", **options)()
  whole = tf.TensorSpec([6], tf.int32)
  specs = (tf.TensorSpec([6, 10]), whole, tf.TensorSpec([6]), whole)
  update = tf.function(
    lambda *batch: step(Batch(*batch), XlaCollectives(4)), jit_compile=True
  )
  text = update.experimental_get_compiler_ir(*specs)(stage="hlo")
  # Embeddings, labels and weights are gathered; count and gradients are summed.
  num_gradients = len(step.trainable_variables)
  gathered = re.findall(r"\[24(?:,6)?\]\S* all-reduce\(", text)
  assert len(re.findall(r" all-reduce\(", text)) >= 5 + num_gradients
  assert len(gathered) >= 3
  assert "replica-id()" in text


def test_rows_are_placed_by_the_number_of_the_replica():
  # A single replica plays each of four: its sums add nothing from the others.
  class Alone(XlaCollectives):
    replica_id = tf.constant(2)

    def _all_reduce(self, value):
      return value

  rows = tf.constant([[1.0, np.nan], [3.0, 4.0]])
  gathered = Alone(4).gather(rows).numpy()
  np.testing.assert_array_equal(gathered[4:6], rows)
  assert not gathered[:4].any()
  assert not gathered[6:].any()
