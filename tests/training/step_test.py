"""The step's options: precision, compilation, averages, micro-batches, clipping."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.distribute.collectives import OneReplica, current_collectives
from trainer.errors import UserError
from trainer.losses import SupervisedContrastiveLoss
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet, Perceptron
from trainer.models.encoder import Encoder
from trainer.training import gradients, parity
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
    _step(num_micro_batches=5).gradients(_batch(), OneReplica())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"compiled": "all"}, "is none of"),
    ({"averaging_decay": 0.0}, "must be between 0 and 1"),
    ({"precision": "float16"}, "choose from float32"),
    ({"normalization": "layer"}, "choose from none"),
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
