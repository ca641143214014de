"""Every public loss lowers to a program of several replicas.

That libtpu takes these programs too, with the statistics of the mining, is what
`python -m tests.tpu_check.all_losses` shows, in a quarter of an hour.
"""

from __future__ import annotations

import pytest
import tensorflow as tf

from tests.distribute.parity_test import LOSSES
from trainer.data.pipeline import Batch
from trainer.losses import tiled_loss
from trainer.losses.loss_terms import Anchors, Candidates
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.tpu_check import replica_program
from trainer.training.step import TrainStep

_NUM_REPLICAS, _NUM_EXAMPLES, _INPUT_SIZE = 4, 6, 10
STEPS = LOSSES


def lowered(make_loss, num_replicas, mining_statistics, optimizer=None):
  """The program of a tiny step with this loss, serialized."""
  step = TrainStep(
    encoder=Encoder(backbone=Perceptron(hidden_units=(4,)), embedding_size=6),
    loss=make_loss(),
    objective_fn=global_negatives,
    optimizer=optimizer or tf.keras.optimizers.SGD(0.1),
    mining_statistics=mining_statistics,
  )
  step.create_variables((_INPUT_SIZE,))
  batch = Batch(
    tf.TensorSpec([_NUM_EXAMPLES, _INPUT_SIZE]),
    tf.TensorSpec([_NUM_EXAMPLES], tf.int32),
    tf.TensorSpec([_NUM_EXAMPLES]),
    tf.TensorSpec([_NUM_EXAMPLES], tf.int32),
  )
  return replica_program.export_program(step, batch, num_replicas).hlo


@pytest.mark.parametrize("num_candidates", [1024, 65_536])
def test_tiles_are_those_of_an_accelerator_while_a_step_is_traced_for_one(
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


@pytest.mark.parametrize("name", STEPS)
def test_the_step_of_every_loss_lowers(name):
  assert b"all-reduce" in lowered(STEPS[name], _NUM_REPLICAS, None)
