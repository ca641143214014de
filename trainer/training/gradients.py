"""Gradients of a replica's loss: loss scale, micro-batches, gradient cache.

Shapes: B examples on a replica, M micro-batches, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import tensorflow as tf
from absl import logging

from trainer.errors import UserError
from trainer.losses.objectives import ReplicaLoss
from trainer.models.batch_norm import batch_norms, has_synchronized
from trainer.runtime import tensorflow_private

_ZERO = tf.UnconnectedGradients.ZERO


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
        "draw other numbers the second time; use trainer.models.dropout.Dropout."
      )
  if has_synchronized(encoder):
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
# Maps embeddings [B, D] to the share, and to the scaled loss that is differentiated.
ReplicaLossFn = Callable[[tf.Tensor], tuple[ReplicaLoss, tf.Tensor]]
Gradients = list[tf.Tensor]


def whole_batch_gradients(
  encode_fn: EncodeFn,
  share_fn: ReplicaLossFn,
  inputs: tf.Tensor,
  variables: Sequence[tf.Variable],
) -> tuple[ReplicaLoss, Gradients]:
  """Computes gradients by one forward and one backward pass over the whole batch.

  Memory holds all activations.

  Args:
    encode_fn: computes embeddings.
    share_fn: computes the share of the loss.
    inputs: [B, ...].
    variables: those to compute gradients for.
  """
  with tf.GradientTape() as tape:
    share, loss = share_fn(encode_fn(inputs, tf.constant(0)))
  return share, tape.gradient(loss, variables, unconnected_gradients=_ZERO)


def micro_batch_gradients(
  encode_fn: EncodeFn,
  share_fn: ReplicaLossFn,
  inputs: tf.Tensor,
  variables: Sequence[tf.Variable],
  num_micro_batches: int,
) -> tuple[ReplicaLoss, Gradients]:
  """Computes the same gradients with the activations of B/M examples in memory.

  It embeds all micro-batches without keeping activations, then computes the loss and
  its gradient to all embeddings. It embeds each micro-batch again and backpropagates
  its part of that gradient to the weights. This takes one more forward pass.

  Source: Gao et al. 2021, https://arxiv.org/abs/2101.06983.

  Args:
    encode_fn: computes embeddings; deterministic.
    share_fn: computes the share of the loss.
    inputs: [B, ...].
    variables: those to compute gradients for.
    num_micro_batches: M, a divisor of B.
  """
  size = inputs.shape[0] // num_micro_batches
  parts = tf.reshape(inputs, [num_micro_batches, size, *inputs.shape[1:]])
  firsts = tf.range(num_micro_batches) * size
  in_parts = tf.map_fn(
    lambda part: encode_fn(*part),
    (parts, firsts),
    fn_output_signature=tf.float32,
    parallel_iterations=1,
  )
  with tf.GradientTape() as tape:
    embeddings = tf.reshape(in_parts, [inputs.shape[0], in_parts.shape[-1]])
    tape.watch(embeddings)
    share, loss = share_fn(embeddings)
  to_embeddings, *direct = tape.gradient(
    loss, [embeddings, *variables], unconnected_gradients=_ZERO
  )
  cached = tf.reshape(to_embeddings, in_parts.shape)

  def add_gradients(sums, part):
    inputs, first, upstream = part
    with tf.GradientTape() as tape:
      embeddings = encode_fn(inputs, first)
    gradients = tape.gradient(
      embeddings, variables, output_gradients=upstream, unconnected_gradients=_ZERO
    )
    return [old + new for old, new in zip(sums, gradients)]

  gradients = tf.foldl(
    add_gradients, (parts, firsts, cached), initializer=direct, parallel_iterations=1
  )
  return share, gradients
