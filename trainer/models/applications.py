"""Any image network of `tf.keras.applications` as a backbone."""

from __future__ import annotations

import difflib
import types
from typing import Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.models.dropout import Dropout
from trainer.models.precision import precision_of
from trainer.models.synchronized_norm import SynchronizedBatchNormalization


def _modules() -> dict[str, types.ModuleType]:
  """Each network's name, with the module that has its `preprocess_input`."""
  modules = [
    module
    for module in vars(tf.keras.applications).values()
    if isinstance(module, types.ModuleType) and hasattr(module, "preprocess_input")
  ]
  return {
    name: module
    for module in modules
    for name in vars(module)
    if name[0].isupper() and callable(getattr(module, name))
  }


@gin.register
class KerasApplication(tf.keras.layers.Layer):
  """A network of `tf.keras.applications` without its classifier.

  Images in [0, 1] are scaled as the network was trained to have them.

  Args:
    name: e.g. "MobileNetV2", "ResNet50", "EfficientNetB0".
    weights: path of a weights file of that network without its top; None for random
      weights. Nothing is downloaded.
    is_batch_norm_synchronized: whether batch normalisation is over the batch of all
      replicas.

  Raises:
    UserError: the name is unknown, or the file is missing or doesn't fit.
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
        f"KerasApplication.name={name!r} is not in tf.keras.applications; "
        f"did you mean {nearest[0]!r}?"
      )
    if weights is not None and not tf.io.gfile.exists(weights):
      raise UserError(f"KerasApplication.weights={weights!r} is not there.")
    self._application_name = name
    self._module = modules[name]
    self._weights_file = weights
    self._is_synchronized = is_batch_norm_synchronized

  def build(self, input_shape):
    """Builds the network for [B, H, W, C] images, and loads its weights."""
    make_network = getattr(self._module, self._application_name)
    with precision_of(self):
      network = make_network(
        include_top=False, weights=None, input_shape=tuple(input_shape[1:])
      )
      self._network = tf.keras.models.clone_model(
        network, clone_function=self._clone_layer
      )
    if self._weights_file is not None:
      self._load_weights()
    # A backbone is frozen before these layers are there, and they would not know of it.
    self._network.trainable = self.trainable
    super().build(input_shape)

  def _clone_layer(self, layer):
    """Ours for Keras' layers that replicas or micro-batches would compute otherwise."""
    config = layer.get_config()
    if isinstance(layer, tf.keras.layers.Dropout):
      return Dropout(layer.rate, layer.noise_shape, name=layer.name)
    is_norm = isinstance(layer, tf.keras.layers.BatchNormalization)
    if is_norm and self._is_synchronized:
      return SynchronizedBatchNormalization(**config)
    return layer.__class__.from_config(config)

  def _load_weights(self):
    try:
      self._network.load_weights(self._weights_file)
    except (ValueError, OSError) as error:
      reason = str(error).splitlines()[0]
      raise UserError(
        f"{self._weights_file} does not fit {self._application_name} without its top: "
        f"{reason}"
      ) from error

  def call(self, images, training=None):
    """[B, H, W, C] float in [0, 1] to [B, h, w, F] float."""
    scaled = self._module.preprocess_input(images * 255.0)
    return self._network(scaled, training=training)
