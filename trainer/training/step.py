"""The training step: one update of the weights, the same under every strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import gin
import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.distribute.collectives import (
  Collectives,
  OneReplica,
  current_collectives,
)
from trainer.errors import UserError
from trainer.losses.class_centres import CentreRows, RowUpdate, TrainingClasses
from trainer.losses.cross_batch_memory import CrossBatchMemory, Entries
from trainer.losses.keras_loss import InBatchLoss
from trainer.losses.loss_terms import Anchors, MiningBatch, ReplicaLoss, WeightedMean
from trainer.losses.mining_statistics import MiningStatistics
from trainer.losses.objectives import ObjectiveFn
from trainer.models.layers import example_scope
from trainer.training import gradients as gradients_lib
from trainer.training.optimizers import AveragedWeights, MultiOptimizer
from trainer.training.options import StepOptions

_MINING_STATISTICS = MiningStatistics()
_OPTIONS = StepOptions()
_ACTIVE = "mining/active_fraction"


class Update(NamedTuple):
  """Values that a step applies; equal on all replicas but for the rows.

  Attributes:
    gradients: of the global loss, to each trainable variable.
    entries: of the global batch, for the cross-batch memory; None without one.
    rows: of each table of class centres, the update of this replica's rows.
    active: nonzero terms and all terms of the loss, for a curriculum.
  """

  gradients: list[tf.Tensor]
  entries: Optional[Entries] = None
  active: WeightedMean = WeightedMean(0.0, 0.0)
  rows: Sequence[RowUpdate] = ()


class StepResult(NamedTuple):
  """An update that has been computed but not applied.

  Attributes:
    update: values to apply.
    statistics: of this replica, to be summed over replicas and steps.
    is_finite: [] bool, whether embeddings, moving averages, loss, gradients and the
      gradients' squared norm are finite on all replicas; equal on all replicas.
  """

  update: Update
  statistics: Mapping[str, Any]
  is_finite: tf.Tensor


@gin.register
class TrainStep:
  """One training step on one replica: forward pass, loss, gradients, update.

  Args:
    encoder: model from inputs to embeddings.
    loss: loss of anchors against candidates. If it is a `tf.Module` with trainable
      variables (a temperature), they are trained too.
    objective_fn: mines across replicas or on each one.
    optimizer: Keras optimizer, `MultiOptimizer` or `LegacyOptimizerAdapter`.
    mining_statistics: logged in addition to the loss; None for none.
    cross_batch_memory: older embeddings as candidates; None for the batch alone.
    options: of the computation.

  Raises:
    UserError: the optimizer cannot scale the loss of mixed_float16.
  """

  def __init__(
    self,
    *,
    encoder: tf.keras.Model,
    loss: InBatchLoss,
    objective_fn: ObjectiveFn,
    optimizer: tf.keras.optimizers.Optimizer,
    mining_statistics: Optional[MiningStatistics] = _MINING_STATISTICS,
    cross_batch_memory: Optional[CrossBatchMemory] = None,
    options: StepOptions = _OPTIONS,
  ):
    self.encoder = encoder
    self.loss = loss
    self.cross_batch_memory = cross_batch_memory
    self._mining_statistics = mining_statistics
    self.objective_fn = objective_fn
    self.optimizer = gradients_lib.with_loss_scale(optimizer, encoder)
    self.options = options
    self.averages: Optional[AveragedWeights] = None
    parts = [loss, *getattr(loss, "submodules", ())]
    self._advancing = [part for part in parts if hasattr(part, "advance")]
    self.compute_update, self.apply_update = self._compute_update, self._apply_update
    if options.compiled == "step":
      self.compute_update = tf.function(
        self._compute_update, jit_compile=True, autograph=False
      )
      self.apply_update = tf.function(
        self._apply_update, jit_compile=True, autograph=False
      )
    self._encode_fn = self._encode
    if options.compiled == "encoder":
      self._encode_fn = tf.function(self._encode, jit_compile=True, autograph=False)
    # Weights of the encoder, then variables of the loss.
    self._variables: list[tf.Variable] = []
    self._num_weights = 0

  def create_variables(
    self,
    input_shape: Sequence[int],
    classes: Optional[TrainingClasses] = None,
  ) -> None:
    """Creates the variables of encoder, optimizer, averages and class centres.

    Args:
      input_shape: shape of one input.
      classes: of the training data; None to create no class centres.

    Raises:
      UserError: the encoder has variables from outside its strategy, it does not
        support micro-batches, or the step cannot be compiled for these replicas.
    """
    self.encoder.create_variables(input_shape)
    _check_scope(self.encoder)
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    self.options.check_compiled(self.encoder, num_replicas)
    if self.options.num_micro_batches != 1:
      gradients_lib.check_splittable_encoder(self.encoder)
    weights = self.encoder.trainable_variables
    self._num_weights = len(weights)
    self._variables = [*weights, *getattr(self.loss, "trainable_variables", ())]
    if isinstance(self.optimizer, MultiOptimizer):
      self.optimizer.divide(self.encoder.backbone_variables)
    self.optimizer.build(self._variables)
    if self.cross_batch_memory is not None:
      self.cross_batch_memory.create_variables(self.encoder.embedding_size)
    if classes is not None:
      for number, table in enumerate(self.loss.tables):
        table.create_variables(self.encoder.embedding_size, classes, number=number)
    if self.options.averaging_decay is not None:
      self.averages = AveragedWeights(weights, decay=self.options.averaging_decay)

  @property
  def forward_state(self) -> list[tf.Variable]:
    """Variables that a forward pass may write, such as moving averages.

    They include those of frozen layers, but no weights, frozen or trained.
    """
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    found = [*self.encoder.variables, *getattr(self.loss, "variables", ())]
    return [
      variable
      for variable in found
      if not variable.trainable and (num_replicas == 1 or _is_writable(variable))
    ]

  def read_forward_state(self) -> list[tf.Tensor]:
    """Returns copies of this replica's forward state; call it on each replica."""
    return [tf.identity(variable) for variable in self.forward_state]

  def write_forward_state(self, values: Sequence[tf.Tensor]) -> None:
    """Restores this replica's forward state; must be called on each replica.

    Args:
      values: from `read_forward_state`.
    """
    for variable, value in zip(self.forward_state, values):
      if _is_summed(variable):
        replica = current_collectives().replica_id
        value = tf.where(tf.equal(replica, 0), value, tf.zeros_like(value))
      variable.assign(value)

  @property
  def trainable_variables(self) -> list[tf.Variable]:
    """Variables that a step updates; the gradients are in the same order."""
    return self._variables

  def __call__(self, batch: Batch, collectives: Collectives) -> Mapping[str, Any]:
    """Updates the weights.

    Args:
      batch: this replica's part of the global batch.
      collectives: the other replicas.

    Returns:
      Statistics of this replica, to be summed over replicas and steps, including
      "train/loss".
    """
    result = self.compute_update(batch, collectives)
    self.apply_update(result.update)
    return result.statistics

  def _compute_update(self, batch: Batch, collectives: Collectives) -> StepResult:
    """Computes an update without applying it.

    Args:
      batch: this replica's part of the global batch.
      collectives: connect the replicas.
    """
    encoded = self._encoded(batch.inputs, collectives.replica_id)
    loss_variables = self._variables[self._num_weights :]
    with tf.GradientTape() as tape:
      tape.watch(encoded.embeddings)
      pairs, rows = self._compared(encoded.embeddings, batch, collectives)
      vectors = [each.vectors for each in rows]
      tape.watch(vectors)
      loss, entries = self._loss_of(pairs, rows, batch.record_numbers, collectives)
      scaled = gradients_lib.scale_loss(self.optimizer, loss.value)
    to_embeddings, to_loss, to_rows = tape.gradient(
      scaled,
      [encoded.embeddings, loss_variables, vectors],
      unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    local = [*encoded.gradients(to_embeddings), *to_loss]
    # The flags are summed with the gradients, without additional communication. An
    # overflow inside the network may show only in the moving averages.
    written = [each for each in self.forward_state if each.dtype.is_floating]
    to_rows = gradients_lib.unscale_gradients(self.optimizer, to_rows)
    norms = [tf.linalg.global_norm([each]) for each in to_rows]
    is_bad = ~_are_finite([loss.value, encoded.embeddings, *norms, *written])
    active = loss.statistics.get(_ACTIVE, WeightedMean(0.0, 0.0))
    flags = tf.stack([tf.cast(is_bad, tf.float32), active.total, active.count])
    flags, *gradients = collectives.sum([flags, *local])
    gradients = gradients_lib.unscale_gradients(self.optimizer, gradients)
    num_bad, *active_of_all = tf.unstack(flags)
    update = Update(
      gradients,
      entries,
      WeightedMean(*active_of_all),
      [
        RowUpdate(each.indices, gradient, each.own_rows)
        for each, gradient in zip(rows, to_rows)
      ],
    )
    is_finite = tf.equal(num_bad, 0.0) & self._is_applicable(gradients)
    return StepResult(update, loss.statistics, is_finite)

  def _is_applicable(self, gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns whether gradients leave weights and moments finite, [] bool.

    Optimizers square gradients, so the square of their global norm must be finite. An
    optimizer that scales the loss skips an update with infinite gradients and reduces
    the scale, until the scale is 1.
    """
    is_applicable = tf.math.is_finite(tf.linalg.global_norm(gradients))
    if gradients_lib.has_loss_scale(self.optimizer):
      is_applicable |= ~_are_finite(gradients) & (self.optimizer.loss_scale > 1.0)
    return is_applicable

  def _apply_update(self, update: Update) -> None:
    """Updates the weights, their averages, the cross-batch memory and a curriculum."""
    if self.cross_batch_memory is not None and update.entries is not None:
      self.cross_batch_memory.add(update.entries)
    self.optimizer.apply_gradients(
      zip(update.gradients, self._variables), skip_gradients_aggregation=True
    )
    if self.averages is not None:
      self.averages.update(self.optimizer.iterations)
    is_applied = None
    if update.rows and gradients_lib.has_loss_scale(self.optimizer):
      is_applied = _are_finite(update.gradients)  # Otherwise it skips the update too.
    for table, rows in zip(self.loss.tables, update.rows):
      table.update(rows, self.optimizer.iterations - 1, is_applied)
    for part in self._advancing:
      part.advance(tf.cast(self.optimizer.iterations, tf.int32), update.active)

  def _encoded(self, inputs: tf.Tensor, replica_id: Any) -> Any:
    """Embeds this replica's inputs, whole or in micro-batches."""
    num_examples = inputs.shape[0]
    step = tf.cast(self.optimizer.iterations, tf.int32)

    def encode(inputs: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
      return self._encode_fn(inputs, step, replica_id * num_examples + first)

    weights = self._variables[: self._num_weights]
    num_parts = self.options.num_micro_batches
    if num_parts == 1:
      return gradients_lib.ForwardPass(encode, inputs, weights)
    gradients_lib.check_micro_batch_size(num_parts, num_examples)
    return gradients_lib.MicroBatchedPass(encode, inputs, weights, num_parts)

  def _compared(
    self, embeddings: tf.Tensor, batch: Batch, collectives: Collectives
  ) -> tuple[MiningBatch, list[CentreRows]]:
    """Returns the examples and class centres that embeddings are compared with."""
    anchors = Anchors(embeddings, batch.labels, batch.weights)
    pairs = self.objective_fn(anchors, collectives)
    step = tf.cast(self.optimizer.iterations, tf.int32)
    labels = pairs.candidates.labels
    return pairs, [table.read(labels, step, collectives) for table in self.loss.tables]

  def _loss_of(
    self,
    pairs: MiningBatch,
    rows: Sequence[CentreRows],
    record_numbers: tf.Tensor,
    collectives: Collectives,
  ) -> tuple[ReplicaLoss, Optional[Entries]]:
    """Computes this replica's share of the loss, with all statistics of the step.

    Also returns the entries of the global batch for the cross-batch memory, if any.
    """
    step = tf.cast(self.optimizer.iterations, tf.int32)
    statistics: dict[str, Any] = {}
    if self._mining_statistics is not None:
      statistics.update(
        self._mining_statistics.at_step(
          step, self.loss, pairs.anchors, pairs.candidates
        )
      )
    entries = None
    if self.cross_batch_memory is not None:
      candidates, entries, of_memory = self.cross_batch_memory.extend(
        pairs, record_numbers, step, collectives
      )
      pairs = pairs._replace(candidates=candidates)
      statistics.update(of_memory)
    loss = self.loss.replica_loss(pairs, rows, collectives)
    # Losses are summed over replicas, so each replica counts as its part of one step.
    num_steps = tf.constant(1.0 / collectives.num_replicas)
    statistics["train/loss"] = WeightedMean(tf.stop_gradient(loss.value), num_steps)
    return ReplicaLoss(loss.value, {**loss.statistics, **statistics}), entries

  def weights_for_evaluation(self) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the encoder has its averaged weights, if any."""
    if self.averages is None:
      return contextlib.nullcontext()
    return self.averages.in_use()

  def zero_statistics(self, batch: Batch) -> Mapping[str, Any]:
    """Returns zeros in the structure of a step's statistics, as initial sums.

    Args:
      batch: specs or tensors of a replica batch.

    Returns:
      The structure that a step returns, every number 0.
    """
    num_examples = batch.labels.shape[0]
    embeddings = tf.TensorSpec([num_examples, self.encoder.embedding_size])
    specs = tf.nest.map_structure(lambda v: tf.TensorSpec(v.shape, v.dtype), batch)

    @tf.function(autograph=False)
    def statistics_of(embeddings, batch):
      alone = OneReplica()
      pairs, rows = self._compared(embeddings, batch, alone)
      return self._loss_of(pairs, rows, batch.record_numbers, alone)[0].statistics

    outputs = statistics_of.get_concrete_function(embeddings, specs).structured_outputs
    return tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), outputs)

  def embed_layerwise(self, batch: Batch, collectives: Collectives) -> None:
    """Embeds this replica's batch as a step does, without XLA compilation or loops.

    Args:
      batch: this replica's part of the global batch.
      collectives: the other replicas.
    """
    num_examples = batch.labels.shape[0]
    size = num_examples // self.options.num_micro_batches
    step = tf.cast(self.optimizer.iterations, tf.int32)
    for first in range(0, num_examples, size):
      place = collectives.replica_id * num_examples + first
      self._encode(batch.inputs[first : first + size], step, place)

  def _encode(self, inputs, step, first_example):
    with example_scope(step, first_example):
      return self.encoder(inputs, training=True)


def _are_finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
  """Returns whether every number of every tensor is finite, [] bool."""
  return tf.reduce_all([tf.reduce_all(tf.math.is_finite(each)) for each in tensors])


def _is_writable(variable: tf.Variable) -> bool:
  """Returns whether TensorFlow allows all replicas to write a variable in a step."""
  is_local = variable.synchronization == tf.VariableSynchronization.ON_READ
  return is_local or variable.aggregation != tf.VariableAggregation.NONE


def _is_summed(variable: tf.Variable) -> bool:
  """Returns whether a variable becomes the sum of the replicas' assignments."""
  is_local = variable.synchronization == tf.VariableSynchronization.ON_READ
  return not is_local and variable.aggregation == tf.VariableAggregation.SUM


def _check_scope(encoder: tf.keras.Model) -> None:
  extended = tf.distribute.get_strategy().extended
  for variable in encoder.variables:
    if not extended.variable_created_in_scope(variable):
      raise UserError(
        f"the variable {variable.name} was created before the run's seed and strategy "
        "were set, for example when a module was imported; create the model in the "
        "function that gin calls."
      )
