"""One update of the weights from one batch: the same function under every strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import gin
import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.distribute.collectives import Collectives, OneReplica
from trainer.distribute.objective import Loss, ObjectiveFn, Share
from trainer.errors import UserError
from trainer.loop import gradients as gradients_lib
from trainer.loop import micro_batches
from trainer.loop.averages import AveragedWeights
from trainer.loop.per_part import PerPart
from trainer.loop.step_options import StepOptions
from trainer.losses.mining_statistics import MiningStatistics
from trainer.losses.terms import Anchors, Ratio
from trainer.models.batch_norms import batch_norms
from trainer.models.dropout import examples_at

_MINING_STATISTICS = MiningStatistics()
_OPTIONS = StepOptions()


class Proposal(NamedTuple):
  """An update that was computed and not yet made.

  Attributes:
    gradients: of the global loss, to each trainable variable; equal on all replicas.
    statistics: of this replica; they add up over replicas and steps.
    is_finite: [] bool, whether embeddings, loss and gradients of all replicas are
      finite; equal on all replicas.
  """

  gradients: list[tf.Tensor]
  statistics: Mapping[str, Any]
  is_finite: tf.Tensor


@gin.register
class TrainStep:
  """Forward, loss, gradients, update, on one replica.

  Args:
    encoder: model from inputs to embeddings.
    loss: loss of anchors against candidates. If it is a `tf.Module` with trainable
      variables (a temperature), they are trained too.
    objective_fn: where the batch is mined.
    optimizer: Keras optimizer, `PerPart` or `OlderOptimizer`.
    mining_statistics: what is logged of the mining beside the loss; None for nothing.
    options: how it is computed.

  Raises:
    UserError: the optimizer can't scale the loss of mixed_float16.
  """

  def __init__(
    self,
    *,
    encoder: tf.keras.Model,
    loss: Loss,
    objective_fn: ObjectiveFn,
    optimizer: tf.keras.optimizers.Optimizer,
    mining_statistics: Optional[MiningStatistics] = _MINING_STATISTICS,
    options: StepOptions = _OPTIONS,
  ):
    self.encoder = encoder
    self.loss = loss
    self._observed_loss = (
      mining_statistics.observing(loss, lambda: self.optimizer.iterations)
      if mining_statistics
      else loss
    )
    self.objective_fn = objective_fn
    self.optimizer = self._with_loss_scale(optimizer)
    self.options = options
    self.averages: Optional[AveragedWeights] = None
    self.propose, self.apply = self._propose, self._apply
    if options.compiled == "step":
      self.propose = tf.function(self._propose, jit_compile=True)
      self.apply = tf.function(self._apply, jit_compile=True)
    self._encode_fn = self._encode
    if options.compiled == "encoder":
      self._encode_fn = tf.function(self._encode, jit_compile=True)
    self._variables: list[tf.Variable] = []

  def create_variables(self, input_shape: Sequence[int]) -> None:
    """Creates the variables of encoder, optimizer and averages.

    Args:
      input_shape: shape of one input.

    Raises:
      UserError: the encoder can't be embedded in micro-batches, or the step not be
        compiled for these replicas.
    """
    self.encoder.create_variables(input_shape)
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    self.options.check_compiled(self.encoder, num_replicas)
    if self.options.num_micro_batches != 1:
      micro_batches.check_encoder(self.encoder)
    weights = self.encoder.trainable_variables
    self._variables = [*weights, *getattr(self.loss, "trainable_variables", ())]
    if isinstance(self.optimizer, PerPart):
      self.optimizer.divide(self.encoder.backbone_variables)
    self.optimizer.build(self._variables)
    if self.options.averaging_decay is not None:
      self.averages = AveragedWeights(weights, decay=self.options.averaging_decay)

  @property
  def forward_state(self) -> list[tf.Variable]:
    """What the forward pass itself changes: moving averages of batch normalisation."""
    norms = batch_norms(self.encoder)
    return [variable for norm in norms for variable in norm.non_trainable_variables]

  @property
  def trainable_variables(self) -> list[tf.Variable]:
    """What a step updates; the gradients are in the same order."""
    return self._variables

  def __call__(self, batch: Batch, collectives: Collectives) -> Mapping[str, Any]:
    """Updates the weights.

    Args:
      batch: this replica's part of the global batch.
      collectives: the other replicas.

    Returns:
      Statistics of this replica, which add up over replicas and steps; "train/loss"
      among them.
    """
    proposal = self.propose(batch, collectives)
    self.apply(proposal.gradients)
    return proposal.statistics

  def _propose(self, batch: Batch, collectives: Collectives) -> Proposal:
    """Computes an update, and does not make it.

    Args:
      batch: this replica's part of the global batch.
      collectives: the other replicas.
    """
    share, num_bad, gradients = self._checked_gradients(batch, collectives)
    is_finite = tf.equal(num_bad, 0.0)
    # An optimizer that scales the loss takes a smaller scale where gradients overflow.
    if not hasattr(self.optimizer, "get_scaled_loss"):
      is_finite &= _are_finite(gradients)
    statistics = self._with_loss(share, collectives.num_replicas)
    return Proposal(gradients, statistics, is_finite)

  def _apply(self, gradients: Sequence[tf.Tensor]) -> None:
    """Updates the weights, and their averages.

    Args:
      gradients: of the global loss, to each trainable variable.
    """
    self.optimizer.apply_gradients(
      zip(gradients, self._variables), skip_gradients_aggregation=True
    )
    if self.averages is not None:
      self.averages.update(self.optimizer.iterations)

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
    share, _, gradients = self._checked_gradients(batch, collectives)
    return share, gradients

  def _checked_gradients(
    self, batch: Batch, collectives: Collectives
  ) -> tuple[Share, tf.Tensor, list[tf.Tensor]]:
    """As `gradients`; between them, how many replicas got what isn't finite."""
    num_examples = batch.labels.shape[0]
    first_of_replica = collectives.replica_id * num_examples

    def encode(inputs, first):
      step = tf.cast(self.optimizer.iterations, tf.int32)
      return self._encode_fn(inputs, step, first_of_replica + first)

    seen: list[tf.Tensor] = []

    def share(embeddings):
      seen.append(embeddings)
      anchors = Anchors(embeddings, batch.labels, batch.weights)
      value = self.objective_fn(self._observed_loss, anchors, collectives)
      return value, self._scaled(value.loss)

    arguments = (encode, share, batch.inputs, self._variables)
    num_parts = self.options.num_micro_batches
    if num_parts == 1:
      value, local = gradients_lib.of_whole_batch(*arguments)
    else:
      micro_batches.check_size(num_parts, num_examples)
      value, local = gradients_lib.of_micro_batches(*arguments, num_parts)
    # One more number in the same sum: no replica need be asked again.
    is_bad = tf.cast(~_are_finite([value.loss, *seen]), tf.float32)
    num_bad, *gradients = collectives.sum([is_bad, *local])
    return value, num_bad, self._unscaled(gradients)

  def weights_for_evaluation(self) -> contextlib.AbstractContextManager[None]:
    """A block in which the encoder has its averaged weights, if it has any."""
    if self.averages is None:
      return contextlib.nullcontext()
    return self.averages.in_use()

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
      share = self.objective_fn(self._observed_loss, anchors, OneReplica())
      return self._with_loss(share, 1)

    outputs = loss_alone.get_concrete_function(
      embeddings, labels, tf.TensorSpec([num_examples])
    ).structured_outputs
    return tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), outputs)

  def _encode(self, inputs, step, first_example):
    with examples_at(step, first_example):
      return self.encoder(inputs, training=True)

  def _with_loss_scale(self, optimizer):
    if getattr(self.encoder, "precision", None) != "mixed_float16":
      return optimizer
    if not isinstance(optimizer, tf.keras.optimizers.Optimizer):
      raise UserError(
        f"{optimizer.name} can't scale the loss of mixed_float16; use mixed_bfloat16, "
        "or one of adam, adamw, lamb and sgd."
      )
    return tf.keras.mixed_precision.LossScaleOptimizer(optimizer)

  def _scaled(self, loss):
    scale = getattr(self.optimizer, "get_scaled_loss", None)
    return loss if scale is None else scale(loss)

  def _unscaled(self, gradients):
    unscale = getattr(self.optimizer, "get_unscaled_gradients", None)
    return gradients if unscale is None else unscale(gradients)

  def _with_loss(self, share: Share, num_replicas: int) -> Mapping[str, Any]:
    # Losses add up over replicas, so each replica counts as its part of one step.
    loss = Ratio(tf.stop_gradient(share.loss), tf.constant(1.0 / num_replicas))
    return {"train/loss": loss, **share.statistics}


def _are_finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
  """[] bool, whether every number of every tensor is finite."""
  return tf.reduce_all([tf.reduce_all(tf.math.is_finite(each)) for each in tensors])
