"""Collectives without a strategy: they lower for N replicas, and are right for one."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

from tests.distribute.parity_test import LOSSES, _batches, _maker
from trainer.data.pipeline import Batch
from trainer.distribute.collectives import OneReplica, XlaCollectives
from trainer.losses.metric_accumulators import summarize


def _step_and_result(make_collectives, **options):
  step = _maker(LOSSES["InfoNCELoss-learned"], "gathered", "adam", **options)()
  parts = Batch(*(tf.constant(each) for each in _batches()[0]))

  @tf.function(jit_compile=True)
  def update(batch):
    return step(batch, make_collectives())

  statistics = tf.nest.map_structure(lambda v: v.numpy(), dict(update(parts)))
  return [v.numpy() for v in step.trainable_variables], summarize(statistics)


def test_one_replica_trains_as_without_them():
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
  # Embeddings, labels and weights are gathered; the count and gradients summed.
  num_gradients = len(step.trainable_variables)
  gathered = re.findall(r"\[24(?:,6)?\]\S* all-reduce\(", text)
  assert len(re.findall(r" all-reduce\(", text)) >= 5 + num_gradients
  assert len(gathered) >= 3
  assert "replica-id()" in text


def test_rows_are_placed_by_the_number_of_the_replica():
  # One replica stands for each of four: its sums bring nothing from others.
  class Alone(XlaCollectives):
    replica_id = tf.constant(2)

    def _all_reduce(self, value):
      return value

  rows = tf.constant([[1.0, np.nan], [3.0, 4.0]])
  gathered = Alone(4).gather(rows).numpy()
  np.testing.assert_array_equal(gathered[4:6], rows)
  assert not gathered[:4].any()
  assert not gathered[6:].any()
