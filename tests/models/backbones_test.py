"""Networks of `tf.keras.applications`, against Keras with the same weights file."""

from __future__ import annotations

import contextlib
import sys
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer.errors import UserError
from trainer.models.backbones import KerasApplication

_MEAN = np.array([0.485, 0.456, 0.406])
_DEVIATION = np.array([0.229, 0.224, 0.225])


def _images(num_channels=3, num_images=2, size=32):
  rng = np.random.default_rng(8)
  return tf.constant(rng.random((num_images, size, size, num_channels)), tf.float32)


def _network(name, weights=None, num_channels=3, **options):
  """Returns the network of Keras; "imagenet" without the download of its weights."""
  make = getattr(tf.keras.applications, name)
  root = make.__module__.split(".applications")[0]
  downloads = sys.modules[f"{root}.utils.data_utils"]
  with contextlib.ExitStack() as patched:
    patched.enter_context(mock.patch.object(downloads, "get_file"))
    patched.enter_context(mock.patch.object(tf.keras.Model, "load_weights"))
    options = {"include_top": False, **options}
    return make(weights=weights, input_shape=(32, 32, num_channels), **options)


def _with_distinct_weights(network):
  """Assigns weights whose features change with any reordering or rescaling."""
  rng = np.random.default_rng(3)
  for weight in network.weights:
    if len(weight.shape) == 1:
      weight.assign(rng.uniform(0.5, 1.5, weight.shape))
  return network


def _normalizations(layer):
  return [
    each
    for each in layer.submodules
    if isinstance(each, tf.keras.layers.Normalization) and each.weights
  ]


def _saved(network, path):
  network.save_weights(str(path))
  return str(path)


@pytest.mark.parametrize(
  "name",
  thorough_except(
    ["EfficientNetB0", "VGG16"],
    ["EfficientNetB0", "MobileNetV3Small", "RegNetX002", "VGG16"],
  ),
)
def test_features_equal_keras_with_the_published_file(name, tmp_path):
  network = _with_distinct_weights(_network(name, weights="imagenet"))
  for layer in _normalizations(network):  # The values in EfficientNet's files.
    layer.set_weights([_MEAN, _DEVIATION, np.int64(0)])
    layer.finalize_state()
  path = _saved(network, tmp_path / "weights.h5")
  module = sys.modules[getattr(tf.keras.applications, name).__module__]
  wanted = network(module.preprocess_input(_images() * 255.0), training=False)
  got = KerasApplication(name=name, weights=path)(_images(), training=False)
  assert np.ptp(wanted) > 1e-2
  np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.thorough
def test_published_efficientnet_normalizes_its_images(tmp_path):
  network = _network("EfficientNetB0")
  [layer] = _normalizations(network)
  layer.set_weights([_MEAN, _DEVIATION, np.int64(0)])
  path = _saved(network, tmp_path / "weights.h5")
  backbone = KerasApplication(name="EfficientNetB0", weights=path)
  backbone(_images())
  [layer] = _normalizations(backbone)
  wanted = (_images().numpy().astype(np.float64) - _MEAN) / _DEVIATION
  np.testing.assert_allclose(layer(_images()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean, variance", [(0.0, 1.0), (_MEAN, _DEVIATION**2)])
@pytest.mark.thorough
def test_efficientnet_with_custom_constants_keeps_them(mean, variance, tmp_path):
  network = _with_distinct_weights(_network("EfficientNetB0"))
  [layer] = _normalizations(network)
  layer.set_weights([mean + np.zeros(3), variance + np.zeros(3), np.int64(0)])
  layer.finalize_state()
  path = _saved(network, tmp_path / "weights.h5")
  got = KerasApplication(name="EfficientNetB0", weights=path)(_images(), training=False)
  wanted = network(_images() * 255.0, training=False)
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_every_exported_network_of_keras_is_available():
  names = [name for name in vars(tf.keras.applications) if name[0].isupper()]
  assert {"MobileNetV3Large", "MobileNetV3Small", "ResNet50"} <= set(names)
  for name in names:
    assert KerasApplication(name=name).name.startswith("keras_application")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A trained network, saved in all formats of Keras."""
  folder = tmp_path_factory.mktemp("files")
  network = _with_distinct_weights(_network("MobileNet"))
  network.compile("adam", "mse")
  network.train_on_batch(_images(), np.zeros((2, 1, 1, 1024)))  # Optimizer state.
  for name in ("w.h5", "w.weights.h5", "checkpoint"):
    network.save_weights(str(folder / name))
  for name in ("model.keras", "model.h5", "folder"):
    network.save(str(folder / name))
  return folder, network(_images() * 2 - 1, training=False)


@pytest.mark.parametrize(
  ("file", "is_synchronized"),
  [
    pytest.param("w.h5", False, marks=pytest.mark.thorough),
    pytest.param("w.weights.h5", False, marks=pytest.mark.thorough),
    ("w.weights.h5", True),
    pytest.param("checkpoint", True, marks=pytest.mark.thorough),
    pytest.param("model.keras", False, marks=pytest.mark.thorough),
    pytest.param("model.h5", False, marks=pytest.mark.thorough),
    ("folder", False),
  ],
)
def test_every_weights_format_of_keras_gives_the_same_features(
  file, is_synchronized, files
):
  folder, wanted = files
  backbone = KerasApplication(
    name="MobileNet",
    weights=str(folder / file),
    is_batch_norm_synchronized=is_synchronized,
  )
  got = backbone(_images(), training=False)
  np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


_LEFT_OVER = (
  *("w.h5", {"include_top": True, "classes": 7}),
  r"has .*\[7\].* in addition.*without",
)
_UNSET = (
  *("checkpoint", {"alpha": 0.25}),
  r"lacks conv1/kernel:0 \[3, 3, 3, 32\].*more",
)


@pytest.mark.parametrize(
  ("file", "options", "message"),
  thorough_except(
    [_LEFT_OVER, _UNSET],
    [
      _LEFT_OVER,
      ("checkpoint", {"include_top": True, "classes": 7}, r"has .*\[7\].* in addition"),
      ("w.weights.h5", {"alpha": 0.25}, r"lacks conv1/kernel:0 .* and \d+ more"),
      _UNSET,
      ("w.h5", {"num_channels": 1}, r"lacks conv1/kernel:0 \[3, 3, 3, 32\] and it has"),
    ],
  ),
)
def test_missing_and_unused_weights_are_named(file, options, message, tmp_path):
  path = _saved(_network("MobileNet", **options), tmp_path / file)
  with pytest.raises(UserError, match=message):
    KerasApplication(name="MobileNet", weights=path)(_images())


def test_nonfinite_weights_are_refused(tmp_path):
  network = _network("MobileNet")
  network.weights[5].assign(np.full(network.weights[5].shape, np.nan))
  path = _saved(network, tmp_path / "w.h5")
  with pytest.raises(UserError, match="is not finite; download the file again"):
    KerasApplication(name="MobileNet", weights=path)(_images())


@pytest.mark.parametrize(
  "content",
  thorough_except([b"no weights"], [b"", b"no weights", b"PK\x05\x06" + bytes(18)]),
)
def test_invalid_weights_file_is_refused_in_one_line(content, tmp_path):
  for name in ("w.h5", "w.keras", "w"):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not fit MobileNet") as refused:
      KerasApplication(name="MobileNet", weights=str(path))(_images())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
  ("name", "inputs", "message"),
  [
    ("VGG16", _images(num_channels=1), "set ImageDecoder.channels = 3"),
    ("DenseNet121", _images(num_channels=4), "set ImageDecoder.channels = 3"),
    ("InceptionV3", _images(), "must be at least 75x75"),
    ("MobileNet", tf.ones([2, 11]), "can't take inputs of"),
  ],
)
def test_unsupported_input_shapes_are_refused(name, inputs, message):
  with pytest.raises(UserError, match=message):
    KerasApplication(name=name)(inputs)


def test_network_with_uniform_channel_scaling_accepts_grey_images(tmp_path):
  network = _with_distinct_weights(_network("MobileNet", num_channels=1))
  path = _saved(network, tmp_path / "w.h5")
  images = _images(num_channels=1)
  got = KerasApplication(name="MobileNet", weights=path)(images, training=False)
  wanted = network(images * 2 - 1, training=False)
  np.testing.assert_allclose(got, wanted, rtol=1e-5)
