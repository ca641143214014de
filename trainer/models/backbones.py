"""Backbones: networks from inputs to features, before pooling.

Shapes: B examples, H × W pixels, C channels, h × w positions, F features.
"""

from __future__ import annotations

import collections
import difflib
import sys
import types
import zipfile
from collections.abc import Sequence
from typing import Any, Optional

import gin
import h5py
import numpy as np
import tensorflow as tf

from trainer.errors import UserError, check_choice
from trainer.models.encoder import precision_of
from trainer.models.layers import Dropout, SynchronizedBatchNormalization

_NORMALIZATIONS = {
  "none": lambda: tf.keras.layers.Activation("linear"),
  "batch": tf.keras.layers.BatchNormalization,
  "synchronized_batch": SynchronizedBatchNormalization,
}
# Of images in [0, 1], red, green and blue, for Keras' published weights.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
# Prefixes in a file of a whole model that are not weights of its layers.
_NO_WEIGHTS = ("optimizer", "metrics/", "keras_api/", "save_counter", "_CHECKPOINTABLE")
_NUM_NAMED = 3


@gin.register
class ConvNet(tf.keras.layers.Layer):
  """Blocks of convolution, ReLU and 2 × 2 max pooling: the small network of omoindrot.

  Args:
    filters: number of filters of each block, e.g. (32, 64).
    kernel_size: width of the convolutions, pixels.
    normalization: after each convolution: "none"; "batch", over the replica's batch;
      "synchronized_batch", over the batch of all replicas.
  """

  def __init__(
    self, *, filters: Sequence[int], kernel_size: int = 3, normalization: str = "none"
  ):
    super().__init__()
    check_choice("ConvNet.normalization", normalization, _NORMALIZATIONS)
    if not filters or min(filters) < 1:
      raise UserError(
        f"ConvNet.filters={filters!r} must have a number of at least 1 per block."
      )
    self._convolutions = [
      tf.keras.layers.Conv2D(num, kernel_size, padding="same", activation="relu")
      for num in filters
    ]
    self._norms = [_NORMALIZATIONS[normalization]() for _ in filters]
    self._shrink = tf.keras.layers.MaxPool2D(2, padding="same")

  def call(self, images, training=None):
    """Maps [B, H, W, C] float to [B, H / 2^blocks, W / 2^blocks, F] float."""
    features = images
    for convolution, norm in zip(self._convolutions, self._norms):
      features = self._shrink(norm(convolution(features), training=training))
    return features


@gin.register
class Perceptron(tf.keras.layers.Layer):
  """Dense layers with ReLU, for vector inputs.

  Args:
    hidden_units: number of units of each layer; () returns the inputs unchanged.
    dropout_rate: fraction of units dropped in training, after each layer.
  """

  def __init__(self, *, hidden_units: Sequence[int], dropout_rate: float = 0.0):
    super().__init__()
    self._dense = [
      tf.keras.layers.Dense(num, activation="relu") for num in hidden_units
    ]
    self._dropouts = [Dropout(dropout_rate) for _ in hidden_units]

  def call(self, vectors, training=None):
    """Maps [B, anything] float to [B, F] float."""
    features = tf.reshape(
      vectors, [vectors.shape[0] or -1, vectors.shape[1:].num_elements()]
    )
    for dense, dropout in zip(self._dense, self._dropouts):
      features = dropout(dense(features), training=training)
    return features


def _modules() -> dict[str, types.ModuleType]:
  """Returns the module with `preprocess_input` for each network name.

  It is the module that defines the network. The public module of MobileNetV3 has no
  network, and those of others are aliases.
  """
  makers = {
    name: value
    for name, value in vars(tf.keras.applications).items()
    if name[0].isupper() and callable(value)
  }
  modules = {name: sys.modules[make.__module__] for name, make in makers.items()}
  return {k: m for k, m in modules.items() if hasattr(m, "preprocess_input")}


@gin.register
class KerasApplication(tf.keras.layers.Layer):
  """A network of `tf.keras.applications` without its classifier.

  Images in [0, 1] are scaled as the network expects. EfficientNet's published files
  hold standard deviations where its layer expects variances, and Keras corrects this
  only for `weights="imagenet"`. A file with these constants is treated as published and
  corrected; other constants are used unchanged.

  Args:
    name: e.g. "MobileNetV2", "ResNet50", "EfficientNetB0".
    weights: path of a weights file of that network without its top, in any format that
      Keras writes; None for random weights. Nothing is downloaded.
    is_batch_norm_synchronized: whether batch normalisation uses the batch of all
      replicas.

  Raises:
    UserError: the name is unknown; the file is missing, does not match or is not
      finite; or the network does not accept the images.
  """

  def __init__(
    self,
    *,
    name: str,
    weights: Optional[str] = None,
    is_batch_norm_synchronized: bool = False,
  ):
    super().__init__()
    modules = _modules()
    if name not in modules:
      nearest = difflib.get_close_matches(name, modules, n=1) or ["ResNet50"]
      raise UserError(
        f"KerasApplication.name={name!r} is not in tf.keras.applications; did you mean "
        f"{nearest[0]!r}?"
      )
    if weights is not None and not _exists(weights):
      raise UserError(f"KerasApplication.weights={weights!r} does not exist.")
    self._application_name = name
    self._module = modules[name]
    self._weights_file = weights
    self._is_synchronized = is_batch_norm_synchronized

  def build(self, input_shape):
    """Builds the network for [B, H, W, C] images, and loads its weights."""
    with precision_of(self):
      network = self._make_network(tuple(input_shape[1:]))
      self._network = tf.keras.models.clone_model(
        network, clone_function=self._clone_layer
      )
    if self._weights_file is not None:
      self._load_weights(network)
    # A backbone may be frozen before these layers exist, so pass the flag on.
    self._network.trainable = self.trainable
    super().build(input_shape)

  def _make_network(self, image_shape: Sequence[Optional[int]]) -> tf.keras.Model:
    """Creates Keras' own network, with random weights."""
    reason = ""
    if len(image_shape) != 3:
      reason = "it takes images of [height, width, channels]"
    try:
      if not reason:
        self._module.preprocess_input(tf.zeros([1, 1, 1, *image_shape[2:]]))
        return getattr(tf.keras.applications, self._application_name)(
          include_top=False, weights=None, input_shape=image_shape
        )
    except tf.errors.InvalidArgumentError:  # Its scaling has one constant per channel.
      reason = "it takes images of 3 channels; set ImageDecoder.channels = 3"
    except ValueError as error:
      reason = str(error).splitlines()[0]
    raise UserError(
      f"{self._application_name} can't take inputs of {list(image_shape)}: {reason}."
    )

  def _clone_layer(self, layer):
    """Replaces Keras layers that differ with replicas or micro-batches by ours."""
    config = layer.get_config()
    if isinstance(layer, tf.keras.layers.Dropout):
      return Dropout(layer.rate, layer.noise_shape, name=layer.name)
    is_norm = isinstance(layer, tf.keras.layers.BatchNormalization)
    if is_norm and self._is_synchronized:
      return SynchronizedBatchNormalization(**config)
    return layer.__class__.from_config(config)

  def _load_weights(self, network: tf.keras.Model) -> None:
    """Loads the file into Keras' own network, and copies the resulting weights."""
    path = str(self._weights_file)
    try:
      reason = _describe_mismatch(_stored_shapes(path), network)
      if not reason:
        status = network.load_weights(path)
        if status is not None:  # For a checkpoint, which may set only some.
          status.assert_existing_objects_matched().expect_partial()
    except (ValueError, OSError, AssertionError, KeyError, tf.errors.OpError) as error:
      reason = (str(error).splitlines() or [type(error).__name__])[0]
    if reason:
      raise UserError(
        f"{path} does not fit {self._application_name} without its top, for inputs of "
        f"{list(network.input_shape[1:])}: {reason}"
      )
    for weight in network.weights:
      if weight.dtype.is_floating and not np.isfinite(weight.numpy()).all():
        raise UserError(
          f"{path}: {weight.name} is not finite; download the file again."
        )
    self._network.set_weights(network.get_weights())
    for layer in self._network.layers:
      if isinstance(layer, tf.keras.layers.Normalization) and layer.weights:
        _correct_normalization(layer)

  def call(self, images, training=None):
    """Maps [B, H, W, C] float in [0, 1] to [B, h, w, F] float."""
    scaled = self._module.preprocess_input(images * 255.0)
    return self._network(scaled, training=training)


def _correct_normalization(layer: tf.keras.layers.Normalization) -> None:
  """Converts the standard deviations in Keras' published files to variances.

  They become weights of the layer, so that a checkpoint contains them. Source: the
  layer that `weights="imagenet"` adds,
  https://github.com/tensorflow/tensorflow/issues/49930.
  """
  mean, variance, count = layer.get_weights()
  constants = np.array([mean, variance], np.float32)
  published = np.array([_IMAGENET_MEAN, _IMAGENET_DEVIATION], np.float32)
  # Enough digits for a layer that computes in bfloat16.
  if constants.shape == published.shape and np.allclose(
    constants, published, rtol=5e-3
  ):
    layer.set_weights([mean, constants[1] * published[1], count])
  layer.finalize_state()


def _exists(path: str) -> bool:
  """Returns whether a file, folder or checkpoint of this name exists."""
  return tf.io.gfile.exists(path) or tf.io.gfile.exists(f"{path}.index")


def _stored_shapes(path: str) -> list[tuple[str, tuple[int, ...]]]:
  """Returns name and shape of each weight in a file of any format that Keras writes."""
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as file:
      return _shapes_in_hdf5(file)
  if path.endswith((".h5", ".hdf5", ".keras")):
    return _shapes_in_hdf5(path)
  folder = f"{path}/variables/variables"  # For a SavedModel.
  is_saved_model = tf.io.gfile.exists(f"{folder}.index")
  reader = tf.train.load_checkpoint(folder if is_saved_model else path)
  shapes = reader.get_variable_to_shape_map()
  return [
    (name.split("/.ATTRIBUTES")[0], tuple(shape))
    for name, shape in sorted(shapes.items())
    if not name.startswith(_NO_WEIGHTS) and ".OPTIMIZER_SLOT" not in name
  ]


def _shapes_in_hdf5(file: Any) -> list[tuple[str, tuple[int, ...]]]:
  found = []

  def visit(name, node):
    if isinstance(node, h5py.Dataset) and not name.startswith(_NO_WEIGHTS):
      found.append((name, node.shape))

  with h5py.File(file, "r") as opened:
    opened.visititems(visit)
  return found


def _describe_mismatch(
  stored: Sequence[tuple[str, tuple[int, ...]]], network: tf.keras.Model
) -> str:
  """Describes the weights that a file lacks and those in excess; empty if none."""
  needed = [(weight.name, tuple(weight.shape)) for weight in network.weights]
  unset, surplus = _surplus(needed, stored), _surplus(stored, needed)
  reasons = [f"it lacks {_format_weights(unset)}"] if unset else []
  if surplus:
    reasons.append(f"it has {_format_weights(surplus)} in addition")
  if not reasons:
    return ""
  return f"{' and '.join(reasons)}; use the file of the same network without its top."


def _surplus(shapes, others) -> list[tuple[str, tuple[int, ...]]]:
  """Returns those whose shape occurs less often among the others."""
  remaining = collections.Counter(shape for _, shape in others)
  surplus = []
  for name, shape in shapes:
    remaining[shape] -= 1
    if remaining[shape] < 0:
      surplus.append((name, shape))
  return surplus


def _format_weights(weights: Sequence[tuple[str, tuple[int, ...]]]) -> str:
  """Lists the first weights by name, and the number of further ones."""
  texts = [f"{name} {list(shape)}" for name, shape in weights[:_NUM_NAMED]]
  more = len(weights) - len(texts)
  return ", ".join(texts) + (f" and {more} more" if more else "")
