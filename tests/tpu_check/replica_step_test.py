"""The exported program trains as the step does: run by XLA on virtual CPU devices."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.data.pipeline import PADDING_LABEL, Batch
from trainer.distribute.collectives import OneReplica
from trainer.losses import InfoNCELoss, LearnedTemperature
from trainer.losses.cross_batch_memory import CrossBatchMemory
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.tpu_check import replica_program
from trainer.training.options import StepOptions
from trainer.training.step import TrainStep

_NUM_CLASSES, _NUM_SAMPLES, _SHAPE = 8, 3, (6, 6, 1)
_NUM_REPLICAS = 4


def _batch():
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(_NUM_CLASSES, dtype=np.int32), _NUM_SAMPLES)
  labels[-1] = PADDING_LABEL
  inputs = rng.normal(size=(len(labels), *_SHAPE)).astype(np.float32)
  weights = (labels != PADDING_LABEL).astype(np.float32)
  return Batch(inputs, labels, weights, np.arange(len(labels), dtype=np.int32))


def _make_step(normalization):
  tf.keras.utils.set_random_seed(1)
  step = TrainStep(
    encoder=Encoder(
      backbone=ConvNet(filters=(4, 8), normalization=normalization), embedding_size=6
    ),
    loss=InfoNCELoss(temperature=LearnedTemperature(initial=0.5)),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
    mining_statistics=None,  # They take most of the time, and change nothing.
    cross_batch_memory=CrossBatchMemory(size=30, warm_up_steps=0),
    options=StepOptions(averaging_decay=0.9),
  )
  step.create_variables(_SHAPE)
  return step


def _run_on_replicas(compiler, normalization):
  """New values of the variables by every replica, and one replica's by the step."""
  step, batch = _make_step(normalization), _batch()
  size = len(batch.labels) // _NUM_REPLICAS
  specs = Batch(*(tf.TensorSpec([size, *v.shape[1:]], v.dtype) for v in batch))
  program = replica_program.export_program(step, specs, _NUM_REPLICAS)
  after = compiler.run(
    program.hlo,
    num_replicas=_NUM_REPLICAS,
    batch=batch,
    variables=[variable.numpy() for variable in program.variables],
  )
  updated = {number: program.variables[number] for number in after}
  before = {number: variable.numpy() for number, variable in updated.items()}
  step(Batch(*map(tf.constant, batch)), OneReplica())
  expected = {number: variable.numpy() for number, variable in updated.items()}
  return before, after, expected


def _largest_error(got, expected):
  """Relative to the largest of all floats; infinite where integers differ."""
  errors = {name: np.abs(got[name] - expected[name][None]).max() for name in expected}
  floats = {name for name in expected if expected[name].dtype == np.float32}
  scale = max(np.abs(expected[name]).max() for name in floats)
  if any(errors[name] > 0 for name in expected.keys() - floats):
    return np.inf
  return max(errors[name] / scale for name in floats)


def test_four_replicas_update_all_variables_as_one_with_the_whole_batch(compiler):
  before, updated, expected = _run_on_replicas(compiler, "synchronized_batch")
  assert _largest_error(updated, expected) < 1e-5
  assert all(np.any(updated[name] != before[name]) for name in before)
  assert {len(value) for value in updated.values()} == {_NUM_REPLICAS}


def test_replicas_that_do_not_speak_are_seen_to_differ(compiler):
  _, updated, expected = _run_on_replicas(compiler, "batch")
  assert _largest_error(updated, expected) > 1e-5
