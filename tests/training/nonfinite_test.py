"""Diagnosis of nonfinite steps: inputs, weights, layer, loss and gradient."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer.data import ingestion
from trainer.data.images import ImageDecoder
from trainer.data.pipeline import Batch, Batches
from trainer.data.records import RecordIndex
from trainer.data.samplers import PKSampler
from trainer.data.sources.source import Item, encode_png
from trainer.distribute.collectives import OneReplica
from trainer.errors import NotFiniteError
from trainer.losses import SupervisedContrastiveLoss
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.training.learning_rates import Cosine
from trainer.training.nonfinite import Diagnosis, NonfinitePolicy, StepRerun
from trainer.training.optimizers import MultiOptimizer, set_step
from trainer.training.options import LoopOptions, StepOptions
from trainer.training.step import TrainStep


class _NaNDecoder(ImageDecoder):
  def __call__(self, records):
    images = super().__call__(records)
    return tf.concat([images[:-1], images[-1:] * float("nan")], axis=0)


class _Overflow(tf.keras.layers.Layer):
  def call(self, inputs):
    return tf.exp(inputs * 1e6 + 1e6)


class _BrokenLoss(SupervisedContrastiveLoss):
  def __call__(self, anchors, candidates):
    terms = super().__call__(anchors, candidates)
    return terms._replace(total=terms.total * float("inf"))


@tf.custom_gradient
def _steep_zero(embeddings):
  return tf.zeros([]), lambda upstream: upstream * tf.fill(embeddings.shape, np.inf)


class _LargeLoss(SupervisedContrastiveLoss):
  def __call__(self, anchors, candidates):
    terms = super().__call__(anchors, candidates)
    return terms._replace(total=terms.total * 1e25)


class _SteepLoss(SupervisedContrastiveLoss):
  def __call__(self, anchors, candidates):
    terms = super().__call__(anchors, candidates)
    return terms._replace(total=terms.total + _steep_zero(anchors.embeddings))


@pytest.fixture
def diagnose(tmp_path):
  """Returns the diagnosis of step 2 of a training with one broken part."""

  def call(
    backbone=None, loss=SupervisedContrastiveLoss, decoder=ImageDecoder, **spoil
  ):
    rng = np.random.default_rng(0)
    items = (
      Item(f"photo {n}", str(n % 4), encode_png(rng.integers(0, 255, (6, 6), np.uint8)))
      for n in range(40)
    )
    ingestion.write_records(
      items, str(tmp_path / "data"), records_per_shard=100, fingerprint={}
    )
    index = RecordIndex.open(str(tmp_path / "data"))
    step = TrainStep(
      encoder=Encoder(backbone=backbone or ConvNet(filters=(2,)), embedding_size=4),
      loss=loss(temperature=0.2),
      objective_fn=global_negatives,
      optimizer=tf.keras.optimizers.SGD(0.1),
      mining_statistics=None,
    )
    step.create_variables((6, 6, 1))
    if spoil:
      step.trainable_variables[0].assign(step.trainable_variables[0] * float("nan"))
    sampler = PKSampler(index, classes_per_batch=3, samples_per_class=4, seed=1)
    return Diagnosis(
      step=step,
      index=index,
      sampler=sampler,
      batches=Batches(index, sampler, decoder(height=6, width=6, channels=1)),
      model_dir=str(tmp_path),
    )(2)

  return call


def test_bad_records_are_named_and_all_are_written(diagnose, tmp_path):
  said = diagnose(decoder=_NaNDecoder)
  facts = json.loads((tmp_path / "nonfinite-2.json").read_text())
  assert facts["step"] == 2
  assert len(facts["keys"]) == 12
  assert all(key.startswith("photo ") for key in facts["keys"])
  assert (
    f"the batch has {facts['keys'][0]}, " in said and "(12 records; all in " in said
  )


def test_bad_inputs_are_named_by_their_rows(diagnose):
  said = diagnose(decoder=_NaNDecoder)
  assert said.startswith("the inputs of rows [11] of the batch are not finite")


def test_bad_weights_are_named(diagnose):
  assert "the weights of " in diagnose(is_spoilt=True)


def test_first_nonfinite_layer_is_named(diagnose):
  backbone = tf.keras.Sequential([_Overflow(name="wild"), tf.keras.layers.Flatten()])
  assert diagnose(backbone=backbone).startswith(
    "the output of layer wild is not finite"
  )


def test_nonfinite_loss_is_reported_with_its_value(diagnose):
  assert diagnose(loss=_BrokenLoss).startswith("the loss, _BrokenLoss, is inf")


def test_weights_with_a_nonfinite_gradient_are_named(diagnose):
  said = diagnose(loss=_SteepLoss)
  assert said.startswith("the gradient to ") and "kernel" in said.split(";")[0]


def test_step_that_is_finite_when_recomputed_is_reported(diagnose):
  assert diagnose().startswith("all values are finite when")


def test_gradient_whose_square_overflows_is_named(diagnose):
  said = diagnose(loss=_LargeLoss)
  assert said.startswith("the gradient is so large that its squared norm is not finite")


def test_batch_that_cannot_be_reread_is_reported_with_the_reason(diagnose):
  class Broken(ImageDecoder):
    def __call__(self, records):
      raise AttributeError("no such part")

  said = diagnose(decoder=Broken)
  assert said.startswith("what is not finite could not be found") and "no such" in said


def _step(backbone, **options):
  tf.keras.utils.set_random_seed(1)
  step = TrainStep(
    encoder=Encoder(backbone=backbone, embedding_size=4),
    loss=SupervisedContrastiveLoss(temperature=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
    mining_statistics=None,
    options=StepOptions(**options),
  )
  step.create_variables((6, 6, 1))
  return step


def _batch(scale):
  images = np.random.default_rng(0).random((6, 6, 6, 1), np.float32) * np.float32(scale)
  labels = tf.constant([0, 0, 1, 1, 2, 2])
  return Batch(tf.constant(images), labels, tf.ones([6]), tf.range(6))


def _state(strategy, step):
  results = strategy.experimental_local_results
  return [v.numpy() for each in step.forward_state for v in results(each)]


_LAYER_OVERFLOWS = ("batch", 3e38, "the output of layer batch_norm", 2)
_VARIANCE_OVERFLOWS = ("batch", 1e25, "moving_variance:0 is not finite", 2)


@pytest.mark.parametrize(
  ("normalization", "scale", "expected", "num_replicas"),
  thorough_except(
    [_VARIANCE_OVERFLOWS],
    [
      _LAYER_OVERFLOWS,
      ("synchronized_batch", 3e38, "the output of layer synchronized_batch_norm", 1),
      _VARIANCE_OVERFLOWS,
      ("batch", 1.0, "all values are finite when", 1),
      ("batch", 3e38, "the output of layer batch_norm", 1),
      ("synchronized_batch", 3e38, "the output of layer synchronized_batch_norm", 2),
      ("batch", 1e25, "moving_variance:0 is not finite", 1),
      ("batch", 1.0, "all values are finite when", 2),
    ],
  ),
)
def test_internal_overflow_is_diagnosed_without_changing_the_state(
  mirrored, num_replicas, normalization, scale, expected
):
  strategy = mirrored(num_replicas)
  with strategy.scope():
    step = _step(ConvNet(filters=(2,), normalization=normalization))
    before = _state(strategy, step)
    assert expected in StepRerun(step).describe(_batch(scale))
    after = _state(strategy, step)
  assert len(before) == 2 * num_replicas
  np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
  "options",
  thorough_except(
    [{"compiled": "step"}],
    [{"num_micro_batches": 3}, {"compiled": "encoder"}, {"compiled": "step"}],
  ),
)
def test_layers_in_loops_and_compiled_functions_are_named(options):
  step = _step(ConvNet(filters=(2,), normalization="batch"), **options)
  step.compute_update(_batch(1.0), OneReplica())
  step.forward_state[0].assign([0.25, 0.5])
  assert (
    StepRerun(step).describe(_batch(3e38)).startswith("the output of layer batch_norm")
  )
  np.testing.assert_array_equal(step.forward_state[0], [0.25, 0.5])


def test_damaged_moving_average_is_named():
  step = _step(ConvNet(filters=(2,), normalization="batch"))
  step.forward_state[1].assign([1.0, np.inf])
  said = StepRerun(step).describe(_batch(1.0))
  assert "moving_variance:0 was not finite before the step" in said


def test_diagnosis_does_not_change_operation_layers():
  inputs = tf.keras.Input((6, 6, 1))
  outputs = tf.keras.layers.Flatten()(tf.nn.relu6(inputs * 2.0 + 3.0) / 6.0)
  step = _step(tf.keras.Model(inputs, outputs))
  before = step.encoder(_batch(1.0).inputs)
  StepRerun(step).describe(_batch(1.0))
  np.testing.assert_array_equal(step.encoder(_batch(1.0).inputs), before)


class _Parts:
  """A policy and the state that it changes; a restore returns to step 4."""

  def __init__(self, optimizer=None, **options):
    self.optimizer = optimizer or tf.keras.optimizers.SGD(0.1)
    set_step(self.optimizer, 7)
    self.checkpoints = types.SimpleNamespace(
      notes={}, wait=lambda: None, newest="the newest checkpoint is of step 4"
    )
    self.restored = []
    self.policy = NonfinitePolicy(
      options=LoopOptions(
        num_steps=9, steps_per_loop=1, checkpoint_every_steps=1, **options
      ),
      optimizer=self.optimizer,
      checkpoints=self.checkpoints,
      restore_fn=self._restore,
      diagnose_fn=lambda step: f"layer x of {step}",
    )

  def _restore(self):
    self.restored.append(4)
    self.checkpoints.notes = {}
    set_step(self.optimizer, 4)


def test_stop_policy_reports_cause_step_and_checkpoint():
  parts = _Parts()
  expected = "step 7: layer x of 7; the update is not applied; the newest checkpoint is"
  with pytest.raises(NotFiniteError, match=expected):
    parts.policy.handle_nonfinite(7)
  assert parts.policy.metrics() == {}


def test_skipped_batch_counts_as_a_step():
  parts = _Parts(on_nonfinite="skip")
  parts.policy.handle_nonfinite(7)
  assert int(parts.optimizer.iterations) == 8
  assert parts.restored == []
  assert parts.policy.metrics() == {"train/nonfinite_steps": 1.0}


def test_restore_policy_continues_after_the_bad_batch():
  parts = _Parts(on_nonfinite="restore")
  for step in (7, 8):
    parts.policy.handle_nonfinite(step)
    parts.checkpoints.notes["nonfinite_steps"] = step - 6
  assert parts.restored == [4, 4]
  assert int(parts.optimizer.iterations) == 9


@pytest.mark.parametrize("policy", ["skip", "restore"])
def test_all_optimizers_continue_at_the_same_step_and_rate(policy):
  schedule = Cosine(peak=0.1, num_steps=20)
  per_part = MultiOptimizer(
    backbone=tf.keras.optimizers.SGD(schedule), head=tf.keras.optimizers.SGD(schedule)
  )
  weights = [tf.Variable(1.0), tf.Variable(1.0)]
  per_part.divide(weights[:1])
  per_part.build(weights)
  parts = _Parts(per_part, on_nonfinite=policy)
  parts.policy.handle_nonfinite(7)
  assert [int(part.iterations) for part in per_part.parts] == [8, 8]
  per_part.apply_gradients([(tf.constant(1.0), weight) for weight in weights])
  moves = [1.0 - float(weight) for weight in weights]
  assert moves == pytest.approx([float(schedule(8))] * 2, rel=1e-5)


@pytest.mark.parametrize("policy", ["skip", "restore"])
def test_run_stops_after_too_many_nonfinite_steps(policy):
  parts = _Parts(on_nonfinite=policy, max_nonfinite_steps=1)
  parts.policy.handle_nonfinite(7)
  with pytest.raises(NotFiniteError, match="1 batches were skipped before"):
    parts.policy.handle_nonfinite(8)
