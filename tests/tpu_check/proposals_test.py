"""What is proposed for a run that does not fit, and that it can be set."""

from __future__ import annotations

import pytest
import tensorflow as tf

from trainer.losses import BatchHardTripletLoss
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.tpu_check.compile_check import proposals
from trainer.tpu_check.compiler import Array
from trainer.tpu_check.replica_program import RunStep
from trainer.training.options import StepOptions
from trainer.training.step import TrainStep

_ACTIVATION = Array("encoder/conv_net/conv2d/Relu", 8, "8")
_DISTANCES = Array("MatMul", 8, "8")


def _proposals(largest, *, share=2.0, precision="float32", normalization="none", m=1):
  step = TrainStep(
    encoder=Encoder(
      backbone=ConvNet(filters=(2,), normalization=normalization),
      embedding_size=2,
      precision=precision,
    ),
    loss=BatchHardTripletLoss(margin=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
    options=StepOptions(num_micro_batches=m),
  )
  step.create_variables((4, 4, 1))
  run = RunStep(step, (4, 4, 1), num_classes=24, num_samples=4)
  return proposals(run, 2, share, largest)


def _bindings(lines):
  return [line.partition(":")[0] for line in lines]


def test_activations_are_cached_halved_or_made_fewer():
  assert _bindings(_proposals([_ACTIVATION])) == [
    "StepOptions.num_micro_batches = 3",
    "Encoder.precision = 'mixed_bfloat16'",
    "PKSampler.classes_per_batch = 12",
  ]


def test_distances_are_streamed():
  assert _bindings(_proposals([_DISTANCES])) == [
    "BatchHardTripletLoss.rows_per_tile = 128",
    "PKSampler.classes_per_batch = 12",
  ]


@pytest.mark.parametrize(("share", "expected"), [(1.1, 2), (3.0, 4), (9.0, 12)])
def test_more_micro_batches_are_proposed_the_more_is_missing(share, expected):
  first = _bindings(_proposals([_ACTIVATION], share=share))[0]
  assert first == f"StepOptions.num_micro_batches = {expected}"


def test_what_a_run_has_already_is_not_proposed_again():
  lines = _proposals([_ACTIVATION], precision="mixed_bfloat16", m=4)
  assert _bindings(lines) == [
    "StepOptions.num_micro_batches = 12",
    "PKSampler.classes_per_batch = 12",
  ]


def test_batch_normalisation_over_micro_batches_is_told_and_synchronised_left_alone():
  assert "sees micro-batches" in _proposals([_ACTIVATION], normalization="batch")[0]
  lines = _proposals([_ACTIVATION], normalization="synchronized_batch")
  assert not [line for line in lines if "num_micro_batches" in line]


def test_a_batch_that_can_not_be_smaller_is_not_proposed():
  assert "PKSampler" not in " ".join(_proposals([_DISTANCES], share=100.0))
