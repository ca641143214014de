"""The encoder: backbone, pooling, and the layer that makes embeddings.

Shapes: B examples, H × W positions, F features, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import gin
import tensorflow as tf
from absl import logging

from trainer.errors import UserError
from trainer.models.dropout import Dropout
from trainer.models.pooling import check_features, make_pooling
from trainer.models.precision import PRECISIONS, set_precision

# A scale below this one is for pixels in [0, 255]: 1 / 255, 1 / 127.5 or 1 / 128.
_LARGEST_PIXEL_SCALE = 0.01


@gin.register
class Encoder(tf.keras.Model):
  """Maps inputs to embeddings, to be compared by their distance.

  Args:
    backbone: layer or model from inputs to features, [B, H, W, F] or, for the pooling
      "flatten", [B, anything] float. Images come in [0, 1].
    embedding_size: D, dimensions of an embedding.
    pooling: how a feature map becomes a vector: "average", "flatten",
      "generalized_mean" or "max".
    is_normalized: whether embeddings are scaled to length 1. Without it a batch_all
      or batch_hard training can collapse for good: where all embeddings are equal the
      gradient is 0.
    precision: of the backbone's computation: "float32", "mixed_bfloat16" or
      "mixed_float16". Weights, pooling, projection and loss stay in float32.
    is_backbone_frozen: whether only the head is trained; then batch normalisation in
      the backbone is as in inference. What is frozen in a backbone stays so without it.
    backbone_output: which of several outputs of the backbone has the features: a key
      of a dict, the name of an output, or its number; None where there is one.

  Attributes:
    embedding_size: D.
    precision: as given.

  Raises:
    UserError: a size, the pooling or the precision is not possible, or the backbone
      takes other inputs or gives no such features.
  """

  def __init__(
    self,
    *,
    backbone: tf.keras.layers.Layer,
    embedding_size: int,
    pooling: str = "flatten",
    is_normalized: bool = True,
    precision: str = "float32",
    is_backbone_frozen: bool = False,
    backbone_output: Optional[Union[str, int]] = None,
  ):
    super().__init__(name="encoder")
    if not isinstance(backbone, tf.keras.layers.Layer):
      raise UserError(
        f"Encoder.backbone={backbone!r} is no Keras layer or model; in gin write "
        "@Name() with its parentheses."
      )
    if embedding_size < 1:
      raise UserError(f"Encoder.embedding_size={embedding_size} must be at least 1.")
    if precision not in PRECISIONS:
      raise UserError(
        f"Encoder.precision={precision!r} is unknown; choose from "
        f"{', '.join(PRECISIONS)}."
      )
    self.embedding_size = embedding_size
    self.precision = precision
    self._backbone = backbone
    self._is_backbone_frozen = is_backbone_frozen
    self._backbone_output = backbone_output
    if is_backbone_frozen:
      self._backbone.trainable = False
    set_precision(backbone, precision)
    self._pooling_name = pooling
    self._pooling = make_pooling(pooling)
    self._projection = tf.keras.layers.Dense(embedding_size, name="projection")
    self._is_normalized = is_normalized

  def call(self, inputs, training=None):
    """[B, ...] float32 inputs to [B, D] float32 embeddings."""
    features = self._features(self._backbone(inputs, training=training))
    check_features(features, num_examples=inputs.shape[0], pooling=self._pooling_name)
    features = tf.cast(features, tf.float32)
    embeddings = self._projection(self._pooling(features))
    if self._is_normalized:
      embeddings = tf.math.l2_normalize(embeddings, axis=-1)
    return embeddings

  def create_variables(self, input_shape: Sequence[int]) -> None:
    """Creates all variables by a pass over one blank input of [1, *input_shape]."""
    _check_inputs(self._backbone, input_shape)
    self(tf.zeros([1, *input_shape]), training=False)
    if self._is_backbone_frozen:
      # Layers that the backbone made just now do not know of it.
      self._backbone.trainable = False
    dropouts = [layer for layer in self.submodules if isinstance(layer, Dropout)]
    for number, dropout in enumerate(dropouts):
      dropout.number = number

  @property
  def backbone_variables(self) -> list[tf.Variable]:
    """Trainable variables before the pooling."""
    return list(self._backbone.trainable_variables)

  def _features(self, outputs: Any) -> Any:
    """The features among what the backbone gives."""
    wanted = self._backbone_output
    if not isinstance(outputs, (Mapping, Sequence)):
      if wanted is None:
        return outputs
      raise UserError(
        f"Encoder.backbone_output={wanted!r}: the backbone has one output; leave it "
        "out."
      )
    named = _named_outputs(self._backbone, outputs)
    if wanted is None and len(outputs) == 1:
      return next(iter(named.values()))
    if wanted in named:
      return named[wanted]
    listed = list(named.items())[: len(outputs)]
    given = ", ".join(f"{name!r}: {_shape(each)}" for name, each in listed)
    raise UserError(
      f"Encoder.backbone_output={wanted!r}: the backbone gives a "
      f"{type(outputs).__name__} of {given or 'nothing'}, and one tensor of [B, H, W, "
      "F] or [B, F] is needed; set it to one of these names."
    )


def _named_outputs(backbone: tf.keras.layers.Layer, outputs: Any) -> dict[Any, Any]:
  """Several outputs by key, by number and, where the model has names, by name."""
  if isinstance(outputs, Mapping):
    return dict(outputs)
  names = getattr(outputs, "_fields", None) or getattr(backbone, "output_names", None)
  numbered = dict(enumerate(outputs))
  if not names or len(names) != len(outputs):
    return numbered
  return {**dict(zip(names, outputs)), **numbered}


def _shape(output: Any) -> str:
  if not hasattr(output, "shape"):
    return type(output).__name__
  return f"[{', '.join(['B', *map(str, output.shape[1:])])}]"


def _check_inputs(
  backbone: tf.keras.layers.Layer, input_shape: Sequence[Optional[int]]
) -> None:
  """Compares the inputs with those of which a Keras model was made.

  Args:
    backbone: anything; only functional and sequential models say what they take.
    input_shape: shape of one input.

  Raises:
    UserError: the model takes something else.
  """
  inputs = getattr(backbone, "inputs", None)
  if not inputs:
    return
  needed = [each.shape[1:] for each in inputs]
  if len(inputs) > 1 or not needed[0].is_compatible_with(list(input_shape)):
    raise UserError(
      f"the backbone {backbone.name!r} takes inputs of "
      f"{' and '.join(str(list(shape)) for shape in needed)}, and those of the decoder "
      f"are {list(input_shape)}; change the decoder or the backbone."
    )
  if not inputs[0].dtype.is_floating:
    raise UserError(
      f"the backbone {backbone.name!r} takes {inputs[0].dtype.name}, and inputs are "
      "float32 (images in [0, 1]); build it for float32."
    )
  first = next((each for each in backbone.layers if not _is_input(each)), None)
  if isinstance(first, tf.keras.layers.Rescaling) and _is_small(first.scale):
    logging.warning(
      "The backbone %r scales its inputs by %s as if they were in [0, 255]; images "
      "come in [0, 1]: put Rescaling(255.0) before it.",
      backbone.name,
      first.scale,
    )


def _is_input(layer: tf.keras.layers.Layer) -> bool:
  return isinstance(layer, tf.keras.layers.InputLayer)


def _is_small(scale: Any) -> bool:
  return bool(tf.reduce_max(tf.abs(scale)) < _LARGEST_PIXEL_SCALE)
