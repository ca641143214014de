"""Gradients of a replica's share of the loss, with or without a gradient cache.

Shapes: B examples on a replica, M micro-batches, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable

import tensorflow as tf

from trainer.distribute.objective import Share

# From inputs [n, ...], and the number of the first of them, to embeddings [n, D].
EncodeFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
# From embeddings [B, D] to the share, and to what is derived: its loss, scaled.
ShareFn = Callable[[tf.Tensor], tuple[Share, tf.Tensor]]
Gradients = list[tf.Tensor]
_ZERO = tf.UnconnectedGradients.ZERO


def of_whole_batch(
  encode_fn: EncodeFn,
  share_fn: ShareFn,
  inputs: tf.Tensor,
  variables: Sequence[tf.Variable],
) -> tuple[Share, Gradients]:
  """One forward and one backward pass; all activations are in memory.

  Args:
    encode_fn: embeds.
    share_fn: mines and sums up.
    inputs: [B, ...].
    variables: to which gradients are wanted.
  """
  with tf.GradientTape() as tape:
    share, loss = share_fn(encode_fn(inputs, tf.constant(0)))
  return share, tape.gradient(loss, variables, unconnected_gradients=_ZERO)


def of_micro_batches(
  encode_fn: EncodeFn,
  share_fn: ShareFn,
  inputs: tf.Tensor,
  variables: Sequence[tf.Variable],
  num_micro_batches: int,
) -> tuple[Share, Gradients]:
  """The same with the activations of B/M examples in memory, for one more forward pass.

  Embeds all micro-batches and forgets their activations; takes the loss, and its
  gradient to the embeddings, over all; then embeds each micro-batch again, and sends
  its part of that gradient on to the weights.

  Source: Gao et al. 2021, https://arxiv.org/abs/2101.06983.

  Args:
    encode_fn: embeds; the same each time it is given the same.
    share_fn: mines and sums up.
    inputs: [B, ...].
    variables: to which gradients are wanted.
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
