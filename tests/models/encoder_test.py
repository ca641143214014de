"""Encoders: inputs, outputs and refusals."""

from __future__ import annotations

import types

import numpy as np
import pytest
import tensorflow as tf

from trainer.cli import train
from trainer.errors import UserError
from trainer.models.backbones import ConvNet, KerasApplication, Perceptron
from trainer.models.encoder import POOLINGS, Encoder, GeneralizedMean
from trainer.models.layers import example_scope


def _images(num_images, size, channels):
  rng = np.random.default_rng(8)
  return tf.constant(rng.random((num_images, size, size, channels)), tf.float32)


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_convnet_returns_unit_embeddings_with_every_pooling(pooling):
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


def test_perceptron_accepts_vectors():
  encoder = Encoder(backbone=Perceptron(hidden_units=(7,)), embedding_size=2)
  assert encoder(tf.ones([4, 11])).shape == (4, 2)


def test_dropout_applies_only_in_training():
  backbone = Perceptron(hidden_units=(50,), dropout_rate=0.5)
  inputs = tf.ones([1, 4])
  np.testing.assert_array_equal(backbone(inputs), backbone(inputs))
  assert np.any(backbone(inputs, training=True) != backbone(inputs, training=True))


@pytest.mark.parametrize("power", [1.0, 3.0, 8.0])
def test_generalized_mean_has_the_gradients_of_its_definition(power):
  rng = np.random.default_rng(5)
  # Similar features: the two logarithms of the chain rule nearly cancel.
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


def test_generalized_mean_near_zero_does_not_underflow():
  pooling = GeneralizedMean(initial_power=8.0)
  features = tf.Variable(tf.fill([1, 2, 2, 1], 1e-5))  # 1e-5^8 underflows in float32.
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


def test_keras_application_scales_images_as_in_its_training():
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
    (lambda: KerasApplication(name="ResNet50", weights="no.h5"), "does not exist"),
    (lambda: ConvNet(filters=()), "at least 1 per block"),
    (lambda: Encoder(backbone=ConvNet(filters=(4,)), embedding_size=0), "at least 1"),
    (
      lambda: Encoder(backbone=ConvNet(filters=(4,)), embedding_size=1, pooling="sum"),
      "must be one of average",
    ),
  ],
)
def test_invalid_encoders_are_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_frozen_keras_application_is_not_trained():
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


class _LazyNorm(tf.keras.layers.Layer):
  """Creates its layers in `build`, like custom layers of users."""

  def build(self, input_shape):
    self.norm = tf.keras.layers.BatchNormalization()
    super().build(input_shape)

  def call(self, inputs, training=None):
    return self.norm(inputs, training=training)


def test_frozen_layers_created_lazily_are_not_trained():
  encoder = Encoder(backbone=_LazyNorm(), embedding_size=2, is_backbone_frozen=True)
  encoder.create_variables((8, 8, 3))
  before = [variable.numpy() for variable in encoder.variables]
  encoder(_images(2, 8, 3), training=True)
  for variable, value in zip(encoder.variables, before):
    np.testing.assert_array_equal(variable.numpy(), value)


def _model(*outputs, inputs=None):
  inputs = tf.keras.Input([8, 8, 1]) if inputs is None else inputs
  features = tf.keras.layers.Conv2D(4, 3, name="first")(inputs)
  second = tf.keras.layers.Conv2D(5, 5, name="second")(inputs)
  named = {"first": features, "second": second}
  made = [named[name] for name in outputs]
  return tf.keras.Model(inputs, made if len(made) > 1 else made[0])


class _Returning(tf.keras.layers.Layer):
  """Returns a function of its inputs."""

  def __init__(self, make):
    super().__init__()
    self._make = make

  def call(self, inputs, training=None):
    return self._make(inputs)


def test_frozen_layers_of_a_backbone_stay_frozen():
  backbone = _model("first")
  backbone.get_layer("first").trainable = False
  encoder = Encoder(backbone=backbone, embedding_size=2, pooling="average")
  encoder.create_variables((8, 8, 1))
  assert [v.name for v in encoder.backbone_variables] == []
  assert len(encoder.trainable_variables) == 2


@pytest.mark.parametrize("output", ["second", 1, "dict"])
def test_named_output_of_the_backbone_is_used(output):
  model = _model("first", "second")
  images = _images(3, 8, 1)
  backbone = model
  if output == "dict":
    backbone = _Returning(lambda inputs: dict(zip(("a", "dict"), model(inputs))))
  encoder = Encoder(
    backbone=backbone, embedding_size=2, pooling="average", backbone_output=output
  )
  got = encoder(images)
  alone = Encoder(
    backbone=_Returning(lambda inputs: model(inputs)[1]),
    embedding_size=2,
    pooling="average",
  )
  alone(images)
  alone.set_weights(encoder.get_weights()[-2:])
  np.testing.assert_array_equal(got, alone(images))


@pytest.mark.parametrize(
  ("backbone", "options", "message"),
  [
    (_Returning(lambda x: {"a": x, "b": x}), {}, "dict of 'a': .*, 'b': .* one tensor"),
    (_Returning(lambda x: [x, x]), {}, r"list of 0: \[B, 8, 8, 1\], 1: "),
    (_Returning(lambda x: []), {}, "list of nothing"),
    (_Returning(lambda x: {"a": x}), {"backbone_output": "c"}, "output='c': .* 'a'"),
    (
      _Returning(lambda x: x),
      {"backbone_output": "c"},
      "one output; remove the binding",
    ),
    (_Returning(lambda x: x[:, 0]), {"pooling": "max"}, "or set it to 'flatten'"),
    (_Returning(lambda x: x[:, 0, 0, 0]), {}, r"shape \[1\] for .* needs \[B, F\]"),
    (
      _Returning(lambda x: tf.concat([x, x], 0)),
      {},
      r"\[2, 8, 8, 1\] for a batch of 1",
    ),
    (_Returning(lambda x: tf.cast(x, tf.int32)), {}, "features of int32"),
    (_Returning(lambda x: tf.RaggedTensor.from_tensor(x)), {}, "of RaggedTensor"),
    (
      _model("first", inputs=tf.keras.Input([9, 9, 1])),
      {},
      r"takes inputs of \[9, 9, 1",
    ),
    (
      tf.keras.Sequential([tf.keras.Input([8, 8, 1], dtype="uint8")]),
      {},
      "takes uint8, but inputs are float32",
    ),
    (_model("first"), {"precision": "mixed_bfloat16"}, "already has its variables"),
    (ConvNet, {}, "not a Keras layer or model"),
  ],
)
def test_a_backbone_without_one_tensor_of_features_is_refused(
  backbone, options, message
):
  with pytest.raises(UserError, match=message):
    encoder = Encoder(backbone=backbone, embedding_size=2, **options)
    encoder.create_variables((8, 8, 1))


@pytest.mark.parametrize(("scale", "num_warnings"), [(1 / 255, 1), (255.0, 0)])
def test_model_that_scales_8_bit_pixels_is_warned_of(scale, num_warnings, caplog):
  layers = [tf.keras.Input([8, 8, 1]), tf.keras.layers.Rescaling(scale)]
  encoder = Encoder(backbone=tf.keras.Sequential(layers), embedding_size=2)
  encoder.create_variables((8, 8, 1))
  warned = [r for r in caplog.records if "images are in [0, 1]" in r.getMessage()]
  assert len(warned) == num_warnings


def test_dropout_masks_depend_on_the_seed():
  encoder = Encoder(
    backbone=Perceptron(hidden_units=(50,), dropout_rate=0.5), embedding_size=4
  )
  step = types.SimpleNamespace(
    encoder=encoder,
    loss=types.SimpleNamespace(tables=[]),
    create_variables=lambda shape, classes: encoder.create_variables(shape),
  )
  dataset = types.SimpleNamespace(decoder=types.SimpleNamespace(shape=(6,)))
  options = {"dataset": dataset, "sampler_fn": None, "step": step, "loop": None}
  train.TrainConfig(**options, seed=0).create_variables()
  weights = encoder.get_weights()

  def embeddings(seed):
    train.TrainConfig(**options, seed=seed).create_variables()
    encoder.set_weights(weights)
    with example_scope(tf.constant(3), tf.constant(0)):
      return encoder(tf.ones([2, 6]), training=True).numpy()

  np.testing.assert_array_equal(embeddings(1), embeddings(1))
  assert np.any(embeddings(1) != embeddings(2))
  assert np.any(embeddings(1) != embeddings(2**31))
