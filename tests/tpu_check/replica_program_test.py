"""The exported program trains like the step: run by XLA on virtual CPU devices.

That libtpu takes these programs too, with the statistics of the mining, is what
`python -m tests.tpu_check.all_losses` shows, in a quarter of an hour.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.distribute.parity_test import LOSSES
from tests.thorough import thorough_except
from trainer.data.pipeline import PADDING_LABEL, Batch
from trainer.distribute.collectives import OneReplica
from trainer.losses import ArcFaceLoss, InfoNCELoss, LearnedTemperature, tiled_loss
from trainer.losses.class_centres import ClassCentres, TrainingClasses
from trainer.losses.cross_batch_memory import CrossBatchMemory
from trainer.losses.loss_terms import Anchors, Candidates
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet, Perceptron
from trainer.models.encoder import Encoder
from trainer.tpu_check import replica_program
from trainer.training import optimizers
from trainer.training.optimizers import MultiOptimizer
from trainer.training.options import StepOptions
from trainer.training.row_optimizers import RowSGD
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
    mining_statistics=None,  # Slow to compile, without effect on the updates.
    cross_batch_memory=CrossBatchMemory(size=30, warm_up_steps=0),
    options=StepOptions(averaging_decay=0.9),
  )
  step.create_variables(_SHAPE)
  return step


def _run_on_replicas(compiler, normalization):
  """Returns new variables by every replica, and by the step on one replica."""
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
  """Returns the error relative to the largest float; infinite for integers."""
  errors = {name: np.abs(got[name] - expected[name][None]).max() for name in expected}
  floats = {name for name in expected if expected[name].dtype == np.float32}
  scale = max(np.abs(expected[name]).max() for name in floats)
  if any(errors[name] > 0 for name in expected.keys() - floats):
    return np.inf
  return max(errors[name] / scale for name in floats)


def test_four_replicas_update_all_variables_like_one_replica(compiler):
  before, updated, expected = _run_on_replicas(compiler, "synchronized_batch")
  assert _largest_error(updated, expected) < 1e-5
  assert all(np.any(updated[name] != before[name]) for name in before)
  assert {len(value) for value in updated.values()} == {_NUM_REPLICAS}


def test_replicas_without_collectives_differ(compiler):
  _, updated, expected = _run_on_replicas(compiler, "batch")
  assert _largest_error(updated, expected) > 1e-5


_NUM_REPLICAS_LOSSES, _NUM_EXAMPLES, _INPUT_SIZE = 4, 6, 10
_BATCH = Batch(
  tf.TensorSpec([_NUM_EXAMPLES, _INPUT_SIZE]),
  tf.TensorSpec([_NUM_EXAMPLES], tf.int32),
  tf.TensorSpec([_NUM_EXAMPLES]),
  tf.TensorSpec([_NUM_EXAMPLES], tf.int32),
)
STEPS = LOSSES


def lowered(make_loss, num_replicas, mining_statistics, optimizer=None):
  """Returns the serialized program of a tiny step with this loss."""
  step = TrainStep(
    encoder=Encoder(backbone=Perceptron(hidden_units=(4,)), embedding_size=6),
    loss=make_loss(),
    objective_fn=global_negatives,
    optimizer=optimizer or tf.keras.optimizers.SGD(0.1),
    mining_statistics=mining_statistics,
  )
  step.create_variables((_INPUT_SIZE,))
  return replica_program.export_program(step, _BATCH, num_replicas).hlo


@pytest.mark.parametrize("num_candidates", [1024, 65_536])
def test_step_traced_for_an_accelerator_uses_its_tile_size(
  num_candidates,
):
  anchors = Anchors(tf.zeros([1024, 2]), tf.zeros([1024], tf.int32), tf.ones([1024]))
  candidates = Candidates(
    tf.zeros([num_candidates, 2]),
    tf.zeros([num_candidates], tf.int32),
    tf.ones([num_candidates], tf.bool),
    tf.range(1024),
  )
  here = tiled_loss._num_rows(anchors, candidates, None)
  with tiled_loss.for_accelerator():
    there = tiled_loss._num_rows(anchors, candidates, None)
  assert here < 1024
  assert there == {1024: None, 65_536: 256}[num_candidates]
  assert tiled_loss._num_rows(anchors, candidates, None) == here


# One per class, whose name is a prefix.
_ONE_OF_EACH = list({name.split("-")[0]: name for name in STEPS}.values())


@pytest.mark.parametrize("name", thorough_except(_ONE_OF_EACH, STEPS))
def test_the_step_of_every_loss_lowers(name):
  assert b"all-reduce" in lowered(STEPS[name], _NUM_REPLICAS_LOSSES, None)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_step_with_class_centres_lowers(rate):
  table = ClassCentres(optimizer=RowSGD(learning_rate=0.1), sampling_rate=rate)
  step = TrainStep(
    encoder=Encoder(backbone=Perceptron(hidden_units=(4,)), embedding_size=6),
    loss=ArcFaceLoss(centres=table),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
    mining_statistics=None,
  )
  step.create_variables((_INPUT_SIZE,))
  table.create_variables(
    6, TrainingClasses(range(10)), num_replicas=_NUM_REPLICAS_LOSSES
  )
  assert table.classes_per_replica == 3
  program = replica_program.export_program(step, _BATCH, _NUM_REPLICAS_LOSSES)
  assert b"all-reduce" in program.hlo
  assert [3, 6] in [[*each.shape] for each in program.variables] or rate < 1


_OPTIMIZERS = {
  "adam": lambda: optimizers.adam(learning_rate=0.1, global_clipnorm=1.0),
  "adamw": lambda: optimizers.adamw(learning_rate=0.1, weight_decay=0.1),
  "lamb": lambda: optimizers.lamb(learning_rate=0.1, weight_decay_rate=0.1),
  "per_part": lambda: MultiOptimizer(
    backbone=optimizers.adam(learning_rate=0.1), head=optimizers.adam(learning_rate=0.1)
  ),
}
if sys.version_info < (3, 12):  # TensorFlow Addons supports no later version.
  _OPTIMIZERS.update(
    novograd=lambda: optimizers.novograd(learning_rate=0.1),
    rectified_adam=lambda: optimizers.rectified_adam(
      learning_rate=0.1, lookahead_steps=5
    ),
  )


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_the_update_of_every_optimizer_lowers(name):
  optimizer = _OPTIMIZERS[name]()
  program = lowered(STEPS["InfoNCELoss-0.5"], 4, None, optimizer)
  assert b"all-reduce" in program
