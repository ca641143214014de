"""Batch normalisation over all replicas: its moments, and training with it."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer.data.pipeline import Batch
from trainer.distribute.collectives import current_collectives
from trainer.losses import SupervisedContrastiveLoss
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet, KerasApplication
from trainer.models.encoder import Encoder
from trainer.models.layers import SynchronizedBatchNormalization
from trainer.training import parity
from trainer.training.step import TrainStep

_NUM_CLASSES, _NUM_SAMPLES, _SHAPE = 4, 6, (16, 16, 1)


def _normalized(strategy, values, layer_class=SynchronizedBatchNormalization):
  """Returns the layer, and its outputs for rows divided among replicas."""
  with strategy.scope():
    layer = layer_class(momentum=0.0, epsilon=1e-9, synchronized=True)
    layer.build(values.shape)
  num_rows = len(values) // strategy.num_replicas_in_sync

  @tf.function
  def run():
    def on_replica():
      first = current_collectives().replica_id * num_rows
      rows = tf.constant(values)[first : first + num_rows]
      return layer(tf.ensure_shape(rows, [num_rows, *values.shape[1:]]), training=True)

    return strategy.run(on_replica)

  parts = strategy.experimental_local_results(run())
  return np.concatenate([part.numpy() for part in parts]), layer


def _far_from_zero(shape):
  # Next to 100², float32 cannot represent a variance of 0.01².
  return np.random.default_rng(0).normal(100.0, 0.01, shape).astype(np.float32)


def test_keras_batch_norm_loses_the_variance_far_from_zero(mirrored):
  values = _far_from_zero((8, 5))
  exact = values.astype(np.float64).var(0)
  _, layer = _normalized(mirrored(2), values, tf.keras.layers.BatchNormalization)
  assert np.abs(layer.moving_variance.numpy() / exact - 1).min() > 0.1


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 5), (8, 3, 4, 5)])
def test_moments_over_all_replicas_are_exact_far_from_zero(
  mirrored, num_replicas, shape
):
  values = _far_from_zero(shape)
  axes = tuple(range(len(shape) - 1))
  exact = values.astype(np.float64)
  got, layer = _normalized(mirrored(num_replicas), values)
  expected = (exact - exact.mean(axes)) / exact.std(axes)
  np.testing.assert_allclose(got, expected, atol=0.02)
  np.testing.assert_allclose(layer.moving_mean.numpy(), exact.mean(axes), rtol=1e-6)
  np.testing.assert_allclose(layer.moving_variance.numpy(), exact.var(axes), rtol=0.01)


def _batches():
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(_NUM_CLASSES, dtype=np.int32), _NUM_SAMPLES)
  centres = rng.random((_NUM_CLASSES, *_SHAPE))
  for _ in range(3):
    images = centres[labels] + rng.random((len(labels), *_SHAPE))
    weights = np.ones(len(labels), np.float32)
    yield Batch(images.astype(np.float32), labels, weights, labels)


def _make_step(normalization="synchronized_batch"):
  tf.keras.utils.set_random_seed(1)
  step = TrainStep(
    encoder=Encoder(
      backbone=ConvNet(filters=(4, 6), normalization=normalization), embedding_size=5
    ),
    loss=SupervisedContrastiveLoss(temperature=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
    mining_statistics=None,
  )
  step.create_variables(_SHAPE)
  return step


@pytest.mark.parity
@pytest.mark.parametrize("num_replicas", thorough_except([2], [2, 4]))
def test_replicas_with_synchronized_batch_norm_train_like_one(mirrored, num_replicas):
  wanted = parity.expected(_make_step, list(_batches()), 1)
  got = parity.trained(mirrored(num_replicas), _make_step, list(_batches()))
  found = parity.errors(got, wanted)
  assert parity.is_equal(found), parity.table([("synchronised", found)])


def test_replicas_with_local_batch_norm_train_differently(mirrored):
  steps = [lambda: _make_step("batch"), list(_batches())]
  wanted = parity.expected(*steps, 1)
  got = parity.trained(mirrored(2), *steps)
  assert parity.errors(got, wanted)["gradients"] > 1e-3


def test_keras_application_uses_it_on_request():
  backbone = KerasApplication(name="MobileNetV2", is_batch_norm_synchronized=True)
  backbone(tf.zeros([1, 32, 32, 3]))
  norms = [
    layer
    for layer in backbone.submodules
    if isinstance(layer, tf.keras.layers.BatchNormalization)
  ]
  assert norms and {type(each) for each in norms} == {SynchronizedBatchNormalization}
