"""Forward pass of a replica's batch, whole or in micro-batches, and the loss scale.

Shapes: B examples on a replica, M micro-batches, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import tensorflow as tf
from absl import logging

from trainer.errors import UserError
from trainer.models.layers import batch_norms, has_synchronized_batch_norm
from trainer.runtime import tensorflow_private


def with_loss_scale(optimizer: Any, encoder: tf.keras.Model) -> Any:
  """Returns the optimizer, with a dynamic loss scale if the encoder is mixed_float16.

  Raises:
    UserError: a loss scale is needed, and the optimizer does not support it.
  """
  if getattr(encoder, "precision", None) != "mixed_float16":
    return optimizer
  if not isinstance(optimizer, tf.keras.optimizers.Optimizer):
    raise UserError(
      f"{optimizer.name} can't scale the loss of mixed_float16; use mixed_bfloat16, or "
      "one of adam, adamw, lamb and sgd."
    )
  return tf.keras.mixed_precision.LossScaleOptimizer(optimizer)


def has_loss_scale(optimizer: Any) -> bool:
  """Returns whether an optimizer scales the loss."""
  return hasattr(optimizer, "get_scaled_loss")


def scale_loss(optimizer: Any, loss: tf.Tensor) -> tf.Tensor:
  """Returns the loss times the optimizer's scale, if it has one."""
  return optimizer.get_scaled_loss(loss) if has_loss_scale(optimizer) else loss


def unscale_gradients(
  optimizer: Any, gradients: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
  """Returns the gradients of the loss from those of `scale_loss`."""
  if not has_loss_scale(optimizer):
    return list(gradients)
  return optimizer.get_unscaled_gradients(gradients)


def check_splittable_encoder(encoder: tf.keras.Model) -> None:
  """Raises if a layer is not deterministic across passes; logs batch normalisation.

  Raises:
    UserError: a layer draws random numbers that cannot be drawn again, or communicates
      with other replicas.
  """
  for layer in encoder.submodules:
    if tensorflow_private.is_random_layer(layer):
      raise UserError(
        f"StepOptions.num_micro_batches embeds twice, and {type(layer).__name__} would "
        "draw other numbers the second time; use trainer.models.layers.Dropout."
      )
  if has_synchronized_batch_norm(encoder):
    raise UserError(
      "StepOptions.num_micro_batches and synchronised batch normalisation exclude each "
      "other: collectives do not work inside the loop over micro-batches."
    )
  norms = batch_norms(encoder)
  if norms:
    logging.warning(
      "%d batch normalisations take mean and variance of each micro-batch, not of the "
      "replica's batch, and their moving averages are updated twice a micro-batch: the "
      "result is not that of num_micro_batches=1.",
      len(norms),
    )


def check_micro_batch_size(num_micro_batches: int, replica_batch_size: int) -> None:
  """Raises if the batch cannot be divided into the micro-batches.

  Raises:
    UserError: the number of micro-batches does not divide the batch.
  """
  if num_micro_batches < 1 or replica_batch_size % num_micro_batches:
    divisors = [
      n for n in range(1, replica_batch_size + 1) if replica_batch_size % n == 0
    ]
    nearest = min(divisors, key=lambda n: abs(n - num_micro_batches))
    raise UserError(
      f"StepOptions.num_micro_batches={num_micro_batches} does not divide the replica "
      f"batch of {replica_batch_size} examples; try {nearest}."
    )


# Maps inputs [n, ...] and the index of the first of them to embeddings [n, D].
EncodeFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


class ForwardPass:
  """One forward pass over the whole batch, whose activations stay in memory.

  Attributes:
    embeddings: [B, D].

  Args:
    encode_fn: computes embeddings.
    inputs: [B, ...].
    variables: those to compute gradients for.
  """

  def __init__(
    self, encode_fn: EncodeFn, inputs: tf.Tensor, variables: Sequence[tf.Variable]
  ):
    self._variables = variables
    with tf.GradientTape() as self._tape:
      self.embeddings = encode_fn(inputs, tf.constant(0))

  def gradients(self, to_embeddings: tf.Tensor) -> list[tf.Tensor]:
    """Returns the gradient of a loss to each variable.

    Args:
      to_embeddings: [B, D], gradient of the loss to the embeddings.
    """
    return self._tape.gradient(
      self.embeddings,
      self._variables,
      output_gradients=to_embeddings,
      unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )


class MicroBatchedPass:
  """A forward pass in micro-batches, with the activations of B/M examples in memory.

  It embeds all micro-batches without keeping activations. `gradients` embeds each
  again and backpropagates its part of the gradient, for the same result. This takes
  one more forward pass.

  Source: Gao et al. 2021, https://arxiv.org/abs/2101.06983.

  Attributes:
    embeddings: [B, D].

  Args:
    encode_fn: computes embeddings; deterministic.
    inputs: [B, ...].
    variables: those to compute gradients for.
    num_micro_batches: M, a divisor of B.
  """

  def __init__(
    self,
    encode_fn: EncodeFn,
    inputs: tf.Tensor,
    variables: Sequence[tf.Variable],
    num_micro_batches: int,
  ):
    self._encode_fn = encode_fn
    self._variables = variables
    size = inputs.shape[0] // num_micro_batches
    self._parts = tf.reshape(inputs, [num_micro_batches, size, *inputs.shape[1:]])
    self._firsts = tf.range(num_micro_batches) * size
    in_parts = tf.map_fn(
      lambda part: encode_fn(*part),
      (self._parts, self._firsts),
      fn_output_signature=tf.float32,
      parallel_iterations=1,
    )
    self.embeddings = tf.reshape(in_parts, [inputs.shape[0], in_parts.shape[-1]])

  def gradients(self, to_embeddings: tf.Tensor) -> list[tf.Tensor]:
    """Returns the gradient of a loss to each variable; see `ForwardPass`."""
    num_parts, size = self._parts.shape[:2]
    upstream = tf.reshape(to_embeddings, [num_parts, size, to_embeddings.shape[-1]])
    return tf.foldl(
      self._add_gradients,
      (self._parts, self._firsts, upstream),
      initializer=[tf.zeros_like(variable) for variable in self._variables],
      parallel_iterations=1,
    )

  def _add_gradients(self, sums: list[tf.Tensor], part: tuple) -> list[tf.Tensor]:
    inputs, first, to_embeddings = part
    forward = ForwardPass(
      lambda inputs, _: self._encode_fn(inputs, first), inputs, self._variables
    )
    gradients = forward.gradients(to_embeddings)
    return [old + new for old, new in zip(sums, gradients)]
