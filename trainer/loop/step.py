"""One update of the weights from one batch: the same function under every strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import gin
import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.distribute.collectives import Collectives, OneReplica
from trainer.distribute.objective import Loss, ObjectiveFn, Share
from trainer.losses.mining_statistics import MiningStatistics
from trainer.losses.terms import Anchors, Ratio

_MINING_STATISTICS = MiningStatistics()


@gin.register
class TrainStep:
  """Forward, loss, gradients, update, on one replica.

  Args:
    encoder: model from inputs to embeddings.
    loss: loss of anchors against candidates. If it is a `tf.Module` with trainable
      variables (a temperature), they are trained too.
    objective_fn: where the batch is mined.
    optimizer: Keras optimizer.
    mining_statistics: what is logged of the mining beside the loss; None for nothing.
  """

  def __init__(
    self,
    *,
    encoder: tf.keras.Model,
    loss: Loss,
    objective_fn: ObjectiveFn,
    optimizer: tf.keras.optimizers.Optimizer,
    mining_statistics: Optional[MiningStatistics] = _MINING_STATISTICS,
  ):
    self.encoder = encoder
    self.loss = loss
    self._observed_loss = (
      mining_statistics.observing(loss, lambda: self.optimizer.iterations)
      if mining_statistics
      else loss
    )
    self.optimizer = optimizer
    self._objective_fn = objective_fn
    self._variables: list[tf.Variable] = []

  def create_variables(self, input_shape: Sequence[int]) -> None:
    """Creates the variables of encoder and optimizer.

    Args:
      input_shape: shape of one input.
    """
    self.encoder.create_variables(input_shape)
    self._variables = [
      *self.encoder.trainable_variables,
      *getattr(self.loss, "trainable_variables", ()),
    ]
    self.optimizer.build(self._variables)

  def __call__(self, batch: Batch, collectives: Collectives) -> Mapping[str, Any]:
    """Updates the weights.

    Args:
      batch: this replica's part of the global batch.
      collectives: the other replicas.

    Returns:
      Statistics of this replica, which add up over replicas and steps; "train/loss"
      among them.
    """
    share, gradients = self.gradients(batch, collectives)
    self.optimizer.apply_gradients(
      zip(gradients, self._variables), skip_gradients_aggregation=True
    )
    return self._with_loss(share, collectives.num_replicas)

  def gradients(
    self, batch: Batch, collectives: Collectives
  ) -> tuple[Share, list[tf.Tensor]]:
    """The loss of the global batch, and its gradients, equal on all replicas.

    Args:
      batch: this replica's part of the global batch.
      collectives: the other replicas.

    Returns:
      This replica's share of the loss, and the gradient to each trainable variable.
    """
    with tf.GradientTape() as tape:
      embeddings = self.encoder(batch.inputs, training=True)
      anchors = Anchors(embeddings, batch.labels, batch.weights)
      share = self._objective_fn(self._observed_loss, anchors, collectives)
    local = tape.gradient(
      share.loss, self._variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    return share, collectives.sum(local)

  def zero_statistics(self, batch: Batch) -> Mapping[str, Any]:
    """Zeros in the structure that a step returns, to add up from.

    Args:
      batch: specs or tensors of a replica batch.

    Returns:
      What a step returns, every number 0.
    """
    num_examples = batch.labels.shape[0]
    embeddings = tf.TensorSpec([num_examples, self.encoder.embedding_size])
    labels = tf.TensorSpec(batch.labels.shape, batch.labels.dtype)

    @tf.function
    def loss_alone(embeddings, labels, weights):
      anchors = Anchors(embeddings, labels, weights)
      share = self._objective_fn(self._observed_loss, anchors, OneReplica())
      return self._with_loss(share, 1)

    outputs = loss_alone.get_concrete_function(
      embeddings, labels, tf.TensorSpec([num_examples])
    ).structured_outputs
    return tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), outputs)

  def _with_loss(self, share: Share, num_replicas: int) -> Mapping[str, Any]:
    # Losses add up over replicas, so each replica counts as its part of one step.
    loss = Ratio(tf.stop_gradient(share.loss), tf.constant(1.0 / num_replicas))
    return {"train/loss": loss, **share.statistics}
