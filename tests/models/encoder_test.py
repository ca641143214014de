"""Encoders: what they accept, what they give, what they refuse."""

from __future__ import annotations

import types

import numpy as np
import pytest
import tensorflow as tf

from trainer import train
from trainer.errors import UserError
from trainer.models.applications import KerasApplication
from trainer.models.backbones import ConvNet, Perceptron
from trainer.models.dropout import examples_at
from trainer.models.encoder import Encoder
from trainer.models.pooling import POOLINGS, GeneralizedMean


def _images(num_images, size, channels):
  rng = np.random.default_rng(8)
  return tf.constant(rng.random((num_images, size, size, channels)), tf.float32)


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_convnet_gives_unit_embeddings_with_every_pooling(pooling):
  encoder = Encoder(backbone=ConvNet(filters=(4, 6)), embedding_size=5, pooling=pooling)
  embeddings = encoder(_images(3, 9, 1))
  assert embeddings.shape == (3, 5)
  np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_without_normalization_lengths_differ():
  encoder = Encoder(
    backbone=ConvNet(filters=(4,)), embedding_size=5, is_normalized=False
  )
  norms = np.linalg.norm(encoder(_images(6, 8, 3)), axis=1)
  assert np.ptp(norms) > 1e-3


def test_perceptron_takes_vectors():
  encoder = Encoder(backbone=Perceptron(hidden_units=(7,)), embedding_size=2)
  assert encoder(tf.ones([4, 11])).shape == (4, 2)


def test_dropout_is_for_training_only():
  backbone = Perceptron(hidden_units=(50,), dropout_rate=0.5)
  inputs = tf.ones([1, 4])
  np.testing.assert_array_equal(backbone(inputs), backbone(inputs))
  assert np.any(backbone(inputs, training=True) != backbone(inputs, training=True))


@pytest.mark.parametrize("power", [1.0, 3.0, 8.0])
def test_the_gradients_of_the_generalized_mean_are_those_of_its_definition(power):
  rng = np.random.default_rng(5)
  # Features much alike: the two logarithms of the chain rule all but cancel.
  features = 4.0 + 0.1 * rng.normal(size=(3, 5, 5, 7))
  upstream = rng.normal(size=(3, 7))
  exact = [tf.Variable(features), tf.Variable(power, dtype=tf.float64)]
  with tf.GradientTape() as tape:
    mean = tf.reduce_mean(exact[0] ** exact[1], (1, 2)) ** (1.0 / exact[1])
    value = tf.reduce_sum(mean * upstream)
  wanted = tape.gradient(value, exact)
  pooling = GeneralizedMean(initial_power=power)
  inputs = tf.Variable(features, dtype=tf.float32)
  with tf.GradientTape() as tape:
    value = tf.reduce_sum(pooling(inputs) * tf.cast(upstream, tf.float32))
  got = tape.gradient(value, [inputs, pooling.power])
  for one, other in zip(got, wanted):
    error = np.abs(one.numpy() - other.numpy()).max() / np.abs(other.numpy()).max()
    assert error < 1e-5, error


def test_the_generalized_mean_of_features_near_zero_does_not_underflow():
  pooling = GeneralizedMean(initial_power=8.0)
  features = tf.Variable(tf.fill([1, 2, 2, 1], 1e-5))  # 1e-5^8 is no float32.
  with tf.GradientTape() as tape:
    value = pooling(features)
  to_features, to_power = tape.gradient(value, [features, pooling.power])
  np.testing.assert_allclose(value, [[1e-5]], rtol=1e-6)
  np.testing.assert_allclose(to_features, np.full((1, 2, 2, 1), 0.25), rtol=1e-6)
  np.testing.assert_allclose(to_power, 0, atol=1e-9)


def test_generalized_mean_of_power_one_is_the_average():
  features = _images(2, 4, 3)
  got = GeneralizedMean(initial_power=1.0)(features)
  np.testing.assert_allclose(got, np.mean(features, axis=(1, 2)), rtol=1e-5)


def test_keras_application_scales_images_as_it_was_trained():
  encoder = Encoder(
    backbone=KerasApplication(name="MobileNetV2"), embedding_size=8, pooling="average"
  )
  embeddings = encoder(_images(2, 32, 3))
  assert embeddings.shape == (2, 8)
  assert np.isfinite(embeddings).all()


def test_keras_application_loads_its_weights_from_a_file(tmp_path):
  network = tf.keras.applications.MobileNetV2(
    include_top=False, weights=None, input_shape=(32, 32, 3)
  )
  path = str(tmp_path / "weights.h5")
  network.save_weights(path)
  images = _images(2, 32, 3)
  got = KerasApplication(name="MobileNetV2", weights=path)(images)
  expected = network(images * 2 - 1)  # MobileNetV2 was trained on [-1, 1].
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_refused(tmp_path):
  other = tf.keras.Sequential([tf.keras.layers.Dense(2, input_shape=(3,))])
  path = str(tmp_path / "weights.h5")
  other.save_weights(path)
  with pytest.raises(UserError, match="does not fit MobileNetV2"):
    KerasApplication(name="MobileNetV2", weights=path)(_images(1, 32, 3))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: KerasApplication(name="MobilNetV2"), "did you mean 'MobileNetV2'"),
    (lambda: KerasApplication(name="ResNet50", weights="no.h5"), "is not there"),
    (lambda: ConvNet(filters=()), "needs one number"),
    (lambda: Encoder(backbone=ConvNet(filters=(4,)), embedding_size=0), "at least 1"),
    (
      lambda: Encoder(backbone=ConvNet(filters=(4,)), embedding_size=1, pooling="sum"),
      "choose from average",
    ),
  ],
)
def test_what_cannot_be_built_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_training_changes_nothing_in_a_frozen_keras_application():
  encoder = Encoder(
    backbone=KerasApplication(name="MobileNetV2"),
    embedding_size=4,
    pooling="average",
    is_backbone_frozen=True,
  )
  encoder.create_variables((32, 32, 3))
  before = [variable.numpy() for variable in encoder.variables]
  encoder(_images(2, 32, 3), training=True)
  assert len(encoder.trainable_variables) == 2
  for variable, value in zip(encoder.variables, before):
    np.testing.assert_array_equal(variable.numpy(), value)


def test_dropout_has_other_masks_with_another_seed():
  encoder = Encoder(
    backbone=Perceptron(hidden_units=(50,), dropout_rate=0.5), embedding_size=4
  )
  step = types.SimpleNamespace(
    encoder=encoder, create_variables=encoder.create_variables
  )
  dataset = types.SimpleNamespace(decoder=types.SimpleNamespace(shape=(6,)))
  options = {"dataset": dataset, "schedule_fn": None, "step": step, "loop": None}
  train.Parts(**options, seed=0).create_variables()
  weights = encoder.get_weights()

  def embeddings(seed):
    train.Parts(**options, seed=seed).create_variables()
    encoder.set_weights(weights)
    with examples_at(tf.constant(3), tf.constant(0)):
      return encoder(tf.ones([2, 6]), training=True).numpy()

  np.testing.assert_array_equal(embeddings(1), embeddings(1))
  assert np.any(embeddings(1) != embeddings(2))
  assert np.any(embeddings(1) != embeddings(2**31))
