"""The encoder: backbone, pooling and embedding layer.

Shapes: B examples, H × W positions, F features, D dimensions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Union

import gin
import tensorflow as tf
from absl import logging

from trainer.errors import UserError, check_at_least, check_choice
from trainer.models.layers import Dropout
from trainer.runtime import tensorflow_private

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
# A smaller scale is for pixels in [0, 255]: 1 / 255, 1 / 127.5 or 1 / 128.
_LARGEST_PIXEL_SCALE = 0.01


def set_precision(layer: tf.keras.layers.Layer, precision: str) -> None:
  """Sets the compute type of a layer and its sublayers.

  Args:
    layer: its variables are float32, whether they exist or will be created.
    precision: one of `PRECISIONS`.

  Raises:
    UserError: variables exist, and cannot be read in another type.
  """
  layers = [
    each
    for each in [layer, *layer.submodules]
    if isinstance(each, tf.keras.layers.Layer)
  ]
  for each in layers:
    has_variables = tensorflow_private.has_own_variables(each)
    if has_variables and each.dtype_policy.name != precision != "float32":
      raise UserError(
        f"Encoder.precision={precision!r}: the backbone's layer {each.name!r} already "
        f"has its variables and computes in {each.dtype_policy.name}; build it with "
        f"dtype={precision!r}, or set 'float32'."
      )
  for each in layers:
    tensorflow_private.set_dtype_policy(each, precision)


@contextlib.contextmanager
def precision_of(layer: tf.keras.layers.Layer) -> Iterator[None]:
  """Makes layers that are created in this context compute in the type of a layer.

  Args:
    layer: its policy is used.
  """
  before = tf.keras.mixed_precision.global_policy()
  tf.keras.mixed_precision.set_global_policy(layer.dtype_policy)
  try:
    yield
  finally:
    tf.keras.mixed_precision.set_global_policy(before)


class GeneralizedMean(tf.keras.layers.Layer):
  """Generalised mean (GeM): (mean x^p)^(1/p) over the positions, with p learned.

  p = 1 is the average, p → ∞ the maximum. Features are clipped at `epsilon` first.

  Source: Radenović et al. 2018, https://arxiv.org/abs/1711.02512 (p starts at 3).
  """

  def __init__(self, *, initial_power: float = 3.0, epsilon: float = 1e-6):
    super().__init__()
    self._initial_power = initial_power
    self._epsilon = epsilon

  def build(self, input_shape):
    """Creates the power, a single one for all features."""
    self.power = self.add_weight(
      name="power",
      shape=(),
      initializer=tf.keras.initializers.Constant(self._initial_power),
    )
    super().build(input_shape)

  def call(self, features):
    """Maps [B, H, W, F] float to [B, F] float."""
    clipped = tf.maximum(features, self._epsilon)
    return _power_mean(clipped, tf.convert_to_tensor(self.power))


@tf.custom_gradient
def _power_mean(features: tf.Tensor, power: tf.Tensor):
  """Computes (mean x^p)^(1/p) of positive features over the positions.

  The derivative by p is y / p² · mean(u log u), where u = (x / y)^p has mean 1. It is
  computed as y / p² · mean(u log u - u + 1), in which no term is negative. The terms
  don't cancel, unlike the two logarithms of the chain rule, which cost up to three
  digits.

  Args:
    features: [B, H, W, F] float, above 0.
    power: [] float.

  Returns:
    [B, F] float.
  """
  largest = tf.reduce_max(features, axis=(1, 2), keepdims=True)  # x^p may underflow.
  of_largest = tf.reduce_mean((features / largest) ** power, axis=(1, 2), keepdims=True)
  mean = largest * of_largest ** (1.0 / power)

  def gradient(upstream):
    upstream = upstream[:, tf.newaxis, tf.newaxis, :]
    parts = features / mean
    logarithm = power * tf.math.log(parts)
    share = tf.exp(logarithm)
    num_positions = tf.reduce_prod(tf.shape(features)[1:3])
    to_features = upstream * share / (parts * tf.cast(num_positions, parts.dtype))
    bends = share * logarithm - tf.math.expm1(logarithm)
    by_power = mean * tf.reduce_mean(bends, axis=(1, 2), keepdims=True)
    return to_features, tf.reduce_sum(upstream * by_power) / power**2

  return tf.squeeze(mean, (1, 2)), gradient


POOLINGS = {
  "average": tf.keras.layers.GlobalAveragePooling2D,
  "flatten": tf.keras.layers.Flatten,
  "generalized_mean": GeneralizedMean,
  "max": tf.keras.layers.GlobalMaxPooling2D,
}


def make_pooling(name: str) -> tf.keras.layers.Layer:
  """Creates the pooling layer of that name.

  Args:
    name: a key of `POOLINGS`. "flatten" also accepts features that are vectors.

  Returns:
    A layer from [B, H, W, F] to [B, anything].

  Raises:
    UserError: the name is unknown.
  """
  check_choice("Encoder.pooling", name, sorted(POOLINGS))
  return POOLINGS[name]()


def check_features(features: Any, *, num_examples: Optional[int], pooling: str) -> None:
  """Checks that a backbone's features can be pooled.

  Args:
    features: output of the backbone.
    num_examples: B; None if it is not known yet.
    pooling: a key of `POOLINGS`.

  Raises:
    UserError: features are not a dense float tensor of B examples, or have the wrong
      rank.
  """
  needed = "[B, F] or more axes" if pooling == "flatten" else "[B, H, W, F]"
  is_dense = tf.is_tensor(features) and not isinstance(
    features, (tf.RaggedTensor, tf.SparseTensor)
  )
  if not is_dense or not features.dtype.is_floating:
    kind = features.dtype.name if is_dense else type(features).__name__
    raise UserError(
      f"the backbone returns features of {kind}; it must return a dense float tensor "
      f"of {needed}."
    )
  shape = features.shape
  if shape.rank is None:
    return
  is_rank_right = shape.rank >= 2 if pooling == "flatten" else shape.rank == 4
  counts = {num_examples, shape[0] if shape.rank else num_examples} - {None}
  if not is_rank_right or len(counts) > 1:
    raise UserError(
      f"the backbone returns features of shape {shape.as_list()} for a batch of "
      f"{num_examples or 'B'}; Encoder.pooling={pooling!r} needs {needed}"
      + ("." if pooling == "flatten" else ", or set it to 'flatten'.")
    )


@gin.register
class Encoder(tf.keras.Model):
  """A model from inputs to embeddings, which are compared by their distance.

  Args:
    backbone: layer or model from inputs to features, [B, H, W, F] or, for the pooling
      "flatten", [B, anything] float. Images are in [0, 1].
    embedding_size: D, dimensions of an embedding.
    pooling: how a feature map becomes a vector: "average", "flatten",
      "generalized_mean" or "max".
    is_normalized: whether embeddings are scaled to length 1. Without it, training with
      batch_all or batch_hard can collapse permanently: if all embeddings are equal, the
      gradient is 0.
    precision: of the backbone's computation: "float32", "mixed_bfloat16" or
      "mixed_float16". Weights, pooling, projection and loss stay in float32.
    is_backbone_frozen: whether only the head is trained; batch normalisation in the
      backbone then runs in inference mode. Layers that a backbone has frozen stay
      frozen in any case.
    backbone_output: selects the features among several outputs of the backbone: a key
      of a dict, the name of an output, or its index; None for a single output.

  Attributes:
    embedding_size: D.
    precision: as given.

  Raises:
    UserError: a size, the pooling or the precision is invalid, or the backbone takes
      other inputs or returns no such features.
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
        f"Encoder.backbone={backbone!r} is not a Keras layer or model; in gin write "
        "@Name() with its parentheses."
      )
    check_at_least("Encoder.embedding_size", embedding_size, 1)
    check_choice("Encoder.precision", precision, PRECISIONS)
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
    self.is_normalized = is_normalized

  def call(self, inputs, training=None):
    """Maps [B, ...] float32 inputs to [B, D] float32 embeddings."""
    features = self._features(self._backbone(inputs, training=training))
    check_features(features, num_examples=inputs.shape[0], pooling=self._pooling_name)
    features = tf.cast(features, tf.float32)
    embeddings = self._projection(self._pooling(features))
    if self.is_normalized:
      embeddings = tf.math.l2_normalize(embeddings, axis=-1)
    return embeddings

  def create_variables(self, input_shape: Sequence[int]) -> None:
    """Creates all variables by a pass over one blank input of [1, *input_shape]."""
    _check_inputs(self._backbone, input_shape)
    self(tf.zeros([1, *input_shape]), training=False)
    if self._is_backbone_frozen:
      # Layers that the backbone has just created are not frozen yet.
      self._backbone.trainable = False
    dropouts = [layer for layer in self.submodules if isinstance(layer, Dropout)]
    for number, dropout in enumerate(dropouts):
      dropout.number = number

  @property
  def backbone_variables(self) -> list[tf.Variable]:
    """Trainable variables before the pooling."""
    return list(self._backbone.trainable_variables)

  def _features(self, outputs: Any) -> Any:
    """Selects the features among the backbone's outputs."""
    wanted = self._backbone_output
    if not isinstance(outputs, (Mapping, Sequence)):
      if wanted is None:
        return outputs
      raise UserError(
        f"Encoder.backbone_output={wanted!r}: the backbone has one output; remove the "
        "binding."
      )
    named = _named_outputs(self._backbone, outputs)
    if wanted is None and len(outputs) == 1:
      return next(iter(named.values()))
    if wanted in named:
      return named[wanted]
    listed = list(named.items())[: len(outputs)]
    given = ", ".join(f"{name!r}: {_shape(each)}" for name, each in listed)
    raise UserError(
      f"Encoder.backbone_output={wanted!r}: the backbone returns a "
      f"{type(outputs).__name__} of {given or 'nothing'}, but one tensor of [B, H, W, "
      "F] or [B, F] is needed; set it to one of these names."
    )


def _named_outputs(backbone: tf.keras.layers.Layer, outputs: Any) -> dict[Any, Any]:
  """Returns several outputs by key, by index and, if the model has names, by name."""
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
  """Compares the inputs with those for which a Keras model was built.

  Args:
    backbone: any layer; only functional and sequential models define their inputs.
    input_shape: shape of one input.

  Raises:
    UserError: the model takes different inputs.
  """
  inputs = getattr(backbone, "inputs", None)
  if not inputs:
    return
  needed = [each.shape[1:] for each in inputs]
  if len(inputs) > 1 or not needed[0].is_compatible_with(list(input_shape)):
    raise UserError(
      f"the backbone {backbone.name!r} takes inputs of "
      f"{' and '.join(str(list(shape)) for shape in needed)}, but the decoder returns "
      f"{list(input_shape)}; change the decoder or the backbone."
    )
  if not inputs[0].dtype.is_floating:
    raise UserError(
      f"the backbone {backbone.name!r} takes {inputs[0].dtype.name}, but inputs are "
      "float32 (images in [0, 1]); build it for float32."
    )
  layers = backbone.layers
  first = next(
    (x for x in layers if not isinstance(x, tf.keras.layers.InputLayer)), None
  )
  if not isinstance(first, tf.keras.layers.Rescaling):
    return
  if tf.reduce_max(tf.abs(first.scale)) < _LARGEST_PIXEL_SCALE:
    logging.warning(
      "The backbone %r scales its inputs by %s as if they were in [0, 255], but "
      "images are in [0, 1]: add Rescaling(255.0) before it.",
      backbone.name,
      first.scale,
    )
