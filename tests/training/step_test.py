"""The step's options: precision, compilation, averages, micro-batches, clipping."""

from __future__ import annotations

import collections
import os
import traceback

import numpy as np
import pytest
import tensorflow as tf

import trainer
from tests.distribute.parity_test import LOSSES, _batches, _maker
from trainer.data.pipeline import Batch
from trainer.distribute.collectives import OneReplica, current_collectives
from trainer.errors import UserError
from trainer.losses import (
  BatchAllTripletLoss,
  BatchHardTripletLoss,
  SupervisedContrastiveLoss,
)
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet, Perceptron
from trainer.models.encoder import Encoder
from trainer.training import checks, gradients, parity
from trainer.training.optimizers import MultiOptimizer
from trainer.training.options import StepOptions
from trainer.training.step import TrainStep, Update


def _batch():
  rng = np.random.default_rng(6)
  labels = np.repeat(np.arange(4, dtype=np.int32), 3)
  images = rng.random((4, 8, 8, 1))[labels] + rng.random((12, 8, 8, 1))
  rows = (tf.constant(labels), tf.ones([len(labels)]), tf.range(len(labels)))
  return Batch(tf.constant(images, tf.float32), *rows)


def _step(*, normalization="none", precision="float32", optimizer=None, **options):
  tf.keras.utils.set_random_seed(1)
  encoder = Encoder(
    backbone=ConvNet(filters=(4, 6), normalization=normalization),
    embedding_size=5,
    precision=precision,
  )
  step = TrainStep(
    encoder=encoder,
    loss=SupervisedContrastiveLoss(temperature=0.2),
    objective_fn=global_negatives,
    optimizer=optimizer or tf.keras.optimizers.SGD(0.02),
    mining_statistics=None,  # Slow to compile.
    options=StepOptions(**options),
  )
  step.create_variables((8, 8, 1))
  return step


def _loss_of_steps(step, num_steps=5, strategy=None):
  """Returns the loss of each step, on one replica or those of a strategy."""

  def on_replica(batch):
    collectives = current_collectives() if strategy else OneReplica()
    num_rows = len(batch.labels) // collectives.num_replicas
    first = collectives.replica_id * num_rows
    part = (each[first : first + num_rows] for each in batch)
    part = (tf.ensure_shape(each, [num_rows, *each.shape[1:]]) for each in part)
    return step(Batch(*part), collectives)["train/loss"].total

  @tf.function
  def update(batch):
    if strategy is None:
      return on_replica(batch)
    return strategy.reduce("SUM", strategy.run(on_replica, (batch,)), axis=None)

  return [float(update(_batch())) for _ in range(num_steps)]


@pytest.mark.parametrize("compiled", ["encoder", "step"])
def test_compiled_steps_equal_uncompiled_steps(compiled):
  expected = _loss_of_steps(_step())
  assert _loss_of_steps(_step(compiled=compiled)) == pytest.approx(expected, rel=1e-5)
  assert expected[-1] < expected[0]


def test_encoder_is_compiled_on_several_replicas(mirrored):
  with mirrored(2).scope():
    steps = [_step(compiled=compiled) for compiled in ("nothing", "encoder")]
  expected, got = (_loss_of_steps(step, strategy=mirrored(2)) for step in steps)
  assert got == pytest.approx(expected, rel=1e-5)


def test_fully_compiled_step_is_refused_on_several_replicas(mirrored):
  with mirrored(2).scope(), pytest.raises(UserError, match="or one replica"):
    _step(compiled="step")


def test_compiled_encoder_with_collectives_is_refused(mirrored):
  options = {"normalization": "synchronized_batch", "compiled": "encoder"}
  with mirrored(2).scope(), pytest.raises(UserError, match="use 'nothing', or one"):
    _step(**options)
  _step(**options)


def test_float16_loss_scaling_keeps_small_gradients(mirrored):
  with mirrored(2).scope():
    step = _step(precision="mixed_float16")
  assert float(step.optimizer.loss_scale) > 1000
  # The initial scale is too large and is halved until the gradients are finite.
  losses = _loss_of_steps(step, num_steps=12, strategy=mirrored(2))
  assert losses[-1] < losses[0]


def test_overflowing_gradient_is_skipped_and_the_scale_shrinks():
  step = _step(precision="mixed_float16")
  before = [v.numpy() for v in step.trainable_variables]
  scale = float(step.optimizer.loss_scale)
  step.apply_update(
    Update([tf.fill(v.shape, np.inf) for v in step.trainable_variables])
  )
  assert float(step.optimizer.loss_scale) == scale / 2
  assert int(step.optimizer.iterations) == 1
  for variable, value in zip(step.trainable_variables, before):
    np.testing.assert_array_equal(variable.numpy(), value)


def _steep_zero(embeddings, gradient):
  """A loss of 0 with a given gradient at every loss scale."""

  @tf.custom_gradient
  def nought(embeddings):
    return tf.zeros([]), lambda _: tf.fill(embeddings.shape, gradient)

  return nought(embeddings)


class _SteepLoss(SupervisedContrastiveLoss):
  gradient = np.inf

  def __call__(self, anchors, candidates):
    terms = super().__call__(anchors, candidates)
    steep = _steep_zero(anchors.embeddings, self.gradient)
    return terms._replace(total=terms.total + steep)


@pytest.mark.parametrize(
  ("precision", "scale", "gradient", "is_finite"),
  [
    ("mixed_float16", 2.0, np.inf, True),  # A smaller scale may help.
    ("mixed_float16", 1.0, np.inf, False),
    ("mixed_float16", 1.0, 1.0, True),
    ("float32", None, np.inf, False),
    ("float32", None, 1e22, False),  # The square overflows in moments and norms.
    ("float32", None, 1e15, True),
  ],
)
def test_gradients_nonfinite_at_every_scale_make_no_update(
  precision, scale, gradient, is_finite
):
  step = _step(precision=precision)
  step.loss = _SteepLoss(temperature=0.2)
  step.loss.gradient = gradient
  if scale:
    step.optimizer._loss_scale._current_loss_scale.assign(scale)
  assert bool(step.compute_update(_batch(), OneReplica()).is_finite) == is_finite


def test_clipping_applies_to_the_gradients_of_all_replicas(mirrored):
  def moved(strategy):
    with strategy.scope():
      optimizer = tf.keras.optimizers.SGD(1.0, global_clipnorm=1e-2)
      step = _step(optimizer=optimizer)
    before = [v.numpy() for v in step.trainable_variables]
    _loss_of_steps(step, num_steps=1, strategy=strategy)
    steps = [old - v.numpy() for old, v in zip(before, step.trainable_variables)]
    return np.concatenate([each.ravel() for each in steps])

  clipped = moved(mirrored(2))
  assert np.linalg.norm(clipped) == pytest.approx(1e-2, rel=1e-3)
  np.testing.assert_allclose(clipped, moved(mirrored(1)), rtol=1e-3, atol=1e-6)


def test_evaluation_uses_the_averages():
  step = _step(averaging_decay=0.9)
  initial = step.trainable_variables[0].numpy()
  _loss_of_steps(step)
  trained = step.trainable_variables[0].numpy()
  with step.weights_for_evaluation():
    averaged = step.trainable_variables[0].numpy()
  assert 0 < np.abs(averaged - initial).max() < np.abs(trained - initial).max()
  np.testing.assert_array_equal(step.trainable_variables[0].numpy(), trained)


def test_averages_are_equal_on_two_replicas(mirrored):
  averages = []
  for number in (1, 2):
    with mirrored(number).scope():
      step = _step(averaging_decay=0.9)
    _loss_of_steps(step, strategy=mirrored(number))
    with step.weights_for_evaluation():
      averages.append(step.trainable_variables[0].numpy())
  np.testing.assert_allclose(*averages, rtol=1e-4, atol=1e-6)


def test_micro_batches_with_batch_normalization_are_warned_of(caplog):
  _step(normalization="batch", num_micro_batches=2)
  assert "mean and variance of each micro-batch" in caplog.text


def test_micro_batches_with_synchronized_normalization_are_refused():
  with pytest.raises(UserError, match="exclude each other"):
    _step(normalization="synchronized_batch", num_micro_batches=2)


def test_nondeterministic_layer_is_refused():
  backbone = Perceptron(hidden_units=())
  backbone.noise = tf.keras.layers.GaussianNoise(0.1)
  with pytest.raises(UserError, match="GaussianNoise would draw other numbers"):
    gradients.check_splittable_encoder(Encoder(backbone=backbone, embedding_size=2))


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
  with pytest.raises(UserError, match="replica batch of 12 examples; try 4"):
    _step(num_micro_batches=5)(_batch(), OneReplica())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"compiled": "all"}, "is none of"),
    ({"averaging_decay": 0.0}, "must be between 0 and 1"),
    ({"precision": "float16"}, "must be one of float32"),
    ({"normalization": "layer"}, "must be one of none"),
    (
      {
        "precision": "mixed_float16",
        "optimizer": MultiOptimizer(
          backbone=tf.keras.optimizers.SGD(0.1), head=tf.keras.optimizers.SGD(0.1)
        ),
      },
      "per_part can't scale the loss",
    ),
  ],
)
def test_invalid_options_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    _step(**options)


def test_gradient_magnitude_is_measured_before_cancellation():
  step, batch = _step(), _batch()
  weights = step.trainable_variables
  with tf.GradientTape() as tape:
    embeddings = step.encoder(batch.inputs, training=True)
    tape.watch(embeddings)
    loss = SupervisedContrastiveLoss(temperature=0.2)(batch.labels, embeddings)
  slopes = tape.gradient(loss, embeddings)
  squares = [np.zeros(weight.shape) for weight in weights]
  for row in range(len(batch.labels)):
    with tf.GradientTape() as tape:
      embedding = step.encoder(batch.inputs[row : row + 1], training=True)
      product = tf.reduce_sum(embedding * slopes[row])
    for total, gradient in zip(squares, tape.gradient(product, weights)):
      total += np.square(tf.convert_to_tensor(gradient).numpy())
  sizes = [np.sqrt(total).max() for total in squares]
  scales = parity.gradient_scales(_step, batch)
  assert all(0.3 * n < scale < 3 * n for n, scale in zip(sizes, scales))


_NUM_REPLICAS, _NUM_GATHERED = 2, 24 * 6  # Embeddings of the global batch.


def _graph_and_step(strategy, objective, num_micro_batches):
  make_step = _maker(
    LOSSES[
      "SupervisedContrastiveLoss-learned"
    ],  # Its terms are computed without a loop.
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
  """Returns the sizes of the all-reduces and how often each size occurs."""
  operations = [each for each in graph.get_operations() if "Reduce" in each.type]
  sums = [each for each in operations if each.type.startswith("Collective")]
  sizes = collections.Counter(each.outputs[0].shape.num_elements() for each in sums)
  return {size: number / _NUM_REPLICAS for size, number in sizes.items()}


def _num_weights_and_more(step):
  """Returns the number of weights and of the three values reduced with them.

  Those are a flag for nonfinite gradients and the two sums of the active fraction.
  """
  return sum(v.shape.num_elements() for v in step.trainable_variables) + 3


@pytest.mark.parametrize("num_micro_batches", [1, 3, 12])
def test_gradients_are_reduced_once_per_step_with_any_micro_batches(
  mirrored, num_micro_batches
):
  graph, step = _graph_and_step(mirrored(2), "gathered", num_micro_batches)
  num_sent = _num_weights_and_more(step)
  # Count; gradient of the gathered embeddings; gradients of the weights.
  assert _sizes_of_sums(graph) == {1: 1, _NUM_GATHERED: 1, num_sent: 1}
  operations = [each.type for each in graph.get_operations()]
  # The text includes functions and loops, which must have no collectives.
  num_outside = sum(each.startswith("Collective") for each in operations)
  assert str(graph.as_graph_def()).count('op: "Collective') == num_outside > 0
  has_loop = any(each.endswith("While") for each in operations)
  assert has_loop == (num_micro_batches > 1)


def test_without_a_gather_only_gradients_are_reduced(mirrored):
  graph, step = _graph_and_step(mirrored(2), "alone", 3)
  num_sent = _num_weights_and_more(step)
  assert _sizes_of_sums(graph) == {num_sent: 1}


def _step_of_tpu_limits(precision):
  return TrainStep(
    encoder=Encoder(
      backbone=Perceptron(hidden_units=(4,)), embedding_size=2, precision=precision
    ),
    loss=BatchHardTripletLoss(margin=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
  )


def test_loss_scaling_is_refused_on_a_tpu_naming_its_binding():
  with pytest.raises(UserError, match=r"Encoder\.precision='mixed_float16'"):
    checks.check_tpu_limits(_step_of_tpu_limits("mixed_float16"))


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_supported_steps_are_accepted_on_a_tpu(precision):
  assert checks.check_tpu_limits(_step_of_tpu_limits(precision)) is None


def test_unsupported_steps_are_accepted_without_a_tpu():
  assert checks.check_tpu_limits_if_on_tpu(_step_of_tpu_limits("mixed_float16")) is None


def test_call_stack_from_step_to_loss_terms_is_shallow(monkeypatch):
  frames, folder = [], os.path.dirname(trainer.__file__)
  anchor_terms = BatchAllTripletLoss.anchor_terms

  def record(self, *arguments):
    stack = traceback.extract_stack()
    frames.append([each.filename for each in stack if each.filename.startswith(folder)])
    return anchor_terms(self, *arguments)

  monkeypatch.setattr(BatchAllTripletLoss, "anchor_terms", record)
  step = _step()
  step.loss = BatchAllTripletLoss(margin=0.2, rows_per_tile=4)
  step.compute_update(_batch(), OneReplica())
  assert max(map(len, frames)) <= 12
  assert max(len({*each}) for each in frames) <= 8
