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
    mining_statistics=None,  # They take long to compile.
    options=StepOptions(**options),
  )
  step.create_variables((8, 8, 1))
  return step


def _loss_of_steps(step, num_steps=5, strategy=None):
  """The loss of each step, on one replica or those of a strategy."""

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
def test_compiled_steps_train_as_others(compiled):
  expected = _loss_of_steps(_step())
  assert _loss_of_steps(_step(compiled=compiled)) == pytest.approx(expected, rel=1e-5)
  assert expected[-1] < expected[0]


def test_an_encoder_is_compiled_on_several_replicas_too(mirrored):
  with mirrored(2).scope():
    steps = [_step(compiled=compiled) for compiled in ("nothing", "encoder")]
  expected, got = (_loss_of_steps(step, strategy=mirrored(2)) for step in steps)
  assert got == pytest.approx(expected, rel=1e-5)


def test_a_step_compiled_whole_is_refused_on_several_replicas(mirrored):
  with mirrored(2).scope(), pytest.raises(UserError, match="or one replica"):
    _step(compiled="step")


def test_a_compiled_encoder_in_which_replicas_speak_is_refused(mirrored):
  options = {"normalization": "synchronized_batch", "compiled": "encoder"}
  with mirrored(2).scope(), pytest.raises(UserError, match="use 'nothing', or one"):
    _step(**options)
  _step(**options)


def test_float16_scales_the_loss_so_that_small_gradients_are_not_lost(mirrored):
  with mirrored(2).scope():
    step = _step(precision="mixed_float16")
  assert float(step.optimizer.loss_scale) > 1000
  # The first scale is too large, and halved until the gradients are finite.
  losses = _loss_of_steps(step, num_steps=12, strategy=mirrored(2))
  assert losses[-1] < losses[0]


def test_a_gradient_that_overflows_is_left_out_and_the_scale_shrinks():
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
  """A loss of 0 whose gradient is given, however the loss is scaled."""

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
    ("float32", None, 1e22, False),  # Its square overflows in moments and in norms.
    ("float32", None, 1e15, True),
  ],
)
def test_gradients_that_no_scale_makes_finite_are_no_update(
  precision, scale, gradient, is_finite
):
  step = _step(precision=precision)
  step.loss = _SteepLoss(temperature=0.2)
  step.loss.gradient = gradient
  if scale:
    step.optimizer._loss_scale._current_loss_scale.assign(scale)
  assert bool(step.compute_update(_batch(), OneReplica()).is_finite) == is_finite


def test_clipping_is_of_the_gradients_of_all_replicas_together(mirrored):
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


def test_evaluation_has_the_averages():
  step = _step(averaging_decay=0.9)
  initial = step.trainable_variables[0].numpy()
  _loss_of_steps(step)
  trained = step.trainable_variables[0].numpy()
  with step.weights_for_evaluation():
    averaged = step.trainable_variables[0].numpy()
  assert 0 < np.abs(averaged - initial).max() < np.abs(trained - initial).max()
  np.testing.assert_array_equal(step.trainable_variables[0].numpy(), trained)


def test_averages_are_the_same_on_two_replicas(mirrored):
  averages = []
  for number in (1, 2):
    with mirrored(number).scope():
      step = _step(averaging_decay=0.9)
    _loss_of_steps(step, strategy=mirrored(number))
    with step.weights_for_evaluation():
      averages.append(step.trainable_variables[0].numpy())
  np.testing.assert_allclose(*averages, rtol=1e-4, atol=1e-6)


def test_micro_batches_say_what_batch_normalisation_makes_of_them(caplog):
  _step(normalization="batch", num_micro_batches=2)
  assert "mean and variance of each micro-batch" in caplog.text


def test_micro_batches_and_synchronised_normalisation_are_refused():
  with pytest.raises(UserError, match="exclude each other"):
    _step(normalization="synchronized_batch", num_micro_batches=2)


def test_a_layer_that_draws_other_numbers_the_second_time_is_refused():
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
def test_options_that_do_not_fit_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    _step(**options)


def test_a_gradient_is_as_large_as_its_examples_before_they_cancel():
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


def _step_of_tpu_limits(precision):
  return TrainStep(
    encoder=Encoder(
      backbone=Perceptron(hidden_units=(4,)), embedding_size=2, precision=precision
    ),
    loss=BatchHardTripletLoss(margin=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
  )


def test_a_scaled_loss_is_refused_on_a_tpu_by_the_binding_that_asks_for_it():
  with pytest.raises(UserError, match=r"Encoder\.precision='mixed_float16'"):
    checks.check_tpu_limits(_step_of_tpu_limits("mixed_float16"))


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_what_a_tpu_computes_is_not_refused(precision):
  assert checks.check_tpu_limits(_step_of_tpu_limits(precision)) is None


def test_nothing_is_refused_where_there_is_no_tpu():
  assert checks.check_tpu_limits_if_on_tpu(_step_of_tpu_limits("mixed_float16")) is None


def test_few_frames_lie_between_the_step_and_the_terms_of_an_anchor(monkeypatch):
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
