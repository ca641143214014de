"""Cross-batch memory: embeddings of past steps as additional candidates of the loss.

Weights change slowly, so an embedding computed some steps ago is close to its current
value and costs no forward pass. A loss gets the negatives of a batch of tens of
thousands for the cost of their inner products.

Source: Wang et al. 2020, https://arxiv.org/abs/1912.06798.

Shapes: A anchors of a replica, G examples of the batch they are mined in, M entries of
the bank, N examples, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import gin
import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.errors import UserError
from trainer.losses.loss_terms import Candidates, MiningBatch, WeightedMean
from trainer.losses.metric_accumulators import weighted_mean

_NEVER = -1


class Entries(NamedTuple):
  """Embeddings with their labels, record numbers and steps.

  Attributes:
    embeddings: [N, D] float32, finite.
    labels: [N] int32.
    record_numbers: [N] int32, number of each example's record.
    steps: [N] int32, number of steps done when the example was embedded; −1 for an
      empty entry.
  """

  embeddings: tf.Tensor
  labels: tf.Tensor
  record_numbers: tf.Tensor
  steps: tf.Tensor


class ExtendedCandidates(NamedTuple):
  """The candidates of a batch and of the memory, for one step.

  Attributes:
    candidates: those of the batch first, then the entries, which have no gradient.
    new_entries: of the global batch, to be added after the step.
    statistics: of the memory, by metric name.
  """

  candidates: Candidates
  new_entries: Entries
  statistics: Mapping[str, WeightedMean]


@gin.register
class CrossBatchMemory(tf.Module):
  """The last M training examples, the newest first.

  Each replica keeps the whole bank and adds the same examples in the order of the
  global batch. Nothing is sent beyond what the loss gathers anyway; if each replica
  mines alone, the batch is sent once per step. Padding takes a place and is never a
  candidate.

  Args:
    size: M >= 1, in examples; a value above the size of the training set only adds
      older copies.
    warm_up_steps: number of first steps, >= 0, in which the bank is filled but not
      used, because weights change fast at first.

  Raises:
    UserError: an argument is too small.
  """

  def __init__(self, *, size: int, warm_up_steps: int):
    if size < 1 or warm_up_steps < 0:
      raise UserError(
        f"CrossBatchMemory.size={size} must be at least 1 and "
        f"warm_up_steps={warm_up_steps} at least 0; the paper has 1,000 of these."
      )
    super().__init__()
    self._size = size
    self._warm_up_steps = warm_up_steps
    self.contents: dict[str, tf.Variable] = {}

  def create_variables(self, embedding_size: int) -> None:
    """Creates an empty bank.

    Args:
      embedding_size: D.
    """
    numbers = tf.fill([self._size], _NEVER)
    empty = Entries(tf.zeros([self._size, embedding_size]), numbers, numbers, numbers)
    # Each replica writes its own equal copy: no communication is needed.
    self.contents = {
      field: tf.Variable(
        value,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
      )
      for field, value in empty._asdict().items()
    }

  @property
  def shape(self) -> list[int]:
    """Shape [M, D] of the embeddings."""
    return self.contents["embeddings"].shape.as_list()

  @property
  def entries(self) -> Entries:
    """Returns all M entries, the newest first."""
    return Entries(*map(tf.convert_to_tensor, self.contents.values()))

  def add(self, entries: Entries) -> None:
    """Adds entries at the front; the oldest ones are dropped.

    Args:
      entries: in the order of the global batch; the same on all replicas.
    """
    for variable, new in zip(self.contents.values(), entries):
      variable.assign(tf.concat([new, variable], 0)[: self._size])

  def extend(
    self,
    pairs: MiningBatch,
    record_numbers: tf.Tensor,
    step: tf.Tensor,
    collectives: Collectives,
  ) -> ExtendedCandidates:
    """Adds the entries to the candidates of a batch.

    Entries whose record is in the current batch are masked out. Each is an older copy
    of an anchor or of an existing candidate.

    Args:
      pairs: A anchors and G candidates: the global batch, or this replica's.
      record_numbers: [A] int32, of this replica's batch.
      step: [] int32, number of steps done.
      collectives: connect the replicas.

    Raises:
      UserError: examples have several labels, or positives are not defined by labels.
    """
    anchors, candidates, is_global = pairs
    if candidates.labels.dtype == tf.bool:
      raise UserError("CrossBatchMemory keeps one label of an example, not several.")
    if candidates.is_relevant is not None or candidates.is_compared is not None:
      raise UserError(
        "CrossBatchMemory defines positives by labels, and WithinGroups by groups; set "
        "TrainStep.cross_batch_memory = None, or "
        "TrainStep.objective_fn = @global_negatives."
      )
    gather = collectives.gather
    batch = Entries(
      tf.stop_gradient(tf.cast(candidates.embeddings, tf.float32)),
      candidates.labels,
      gather(record_numbers) if is_global else record_numbers,
      tf.where(candidates.is_valid, step, _NEVER),
    )
    old = self.entries
    copies = _Copies(batch.record_numbers, old)
    is_usable = tf.logical_and(old.steps > _NEVER, step >= self._warm_up_steps)
    drift = copies.drift(anchors.embeddings, record_numbers, anchors.weights > 0.0)
    return ExtendedCandidates(
      candidates._replace(
        labels=tf.concat([candidates.labels, old.labels], 0),
        is_valid=tf.concat([candidates.is_valid, is_usable & ~copies.is_copy], 0),
        fixed_embeddings=old.embeddings,
      ),
      batch if is_global else Entries(*map(gather, batch)),
      {**_fill_and_age(old, step), "bank/drift": drift},
    )


class _Copies:
  """The match between bank entries and examples of a batch with the same record.

  Attributes:
    is_copy: [M] bool, whether an entry's record is in the batch.

  Args:
    record_numbers: [G] int32, of the batch.
    entries: M of them, the newest first.
  """

  def __init__(self, record_numbers: tf.Tensor, entries: Entries):
    self._entries = entries
    self._sorted = tf.sort(record_numbers)
    places = self._places(entries.record_numbers)
    after = tf.searchsorted(self._sorted, entries.record_numbers, side="right")
    self.is_copy = tf.logical_and(entries.steps > _NEVER, places < after)
    # For each record of the batch, by its position, the index of its newest copy.
    num_entries, num_places = entries.labels.shape[0], record_numbers.shape[0] + 1
    numbers = tf.where(self.is_copy, tf.range(num_entries), num_entries)
    self._newest = tf.math.unsorted_segment_min(numbers, places, num_places)

  def drift(
    self, embeddings: tf.Tensor, record_numbers: tf.Tensor, is_real: tf.Tensor
  ) -> WeightedMean:
    """Computes the mean Euclidean distance of embeddings to their newest copies.

    Args:
      embeddings: [A, D] float, of examples of the batch.
      record_numbers: [A] int32.
      is_real: [A] bool, false for padding.
    """
    num_entries = self._entries.labels.shape[0]
    newest = tf.gather(self._newest, self._places(record_numbers))
    has_copy = tf.logical_and(newest < num_entries, is_real)
    copies = tf.gather(self._entries.embeddings, tf.minimum(newest, num_entries - 1))
    moves = tf.stop_gradient(tf.cast(embeddings, tf.float32)) - copies
    return weighted_mean(tf.norm(moves, axis=1), has_copy)

  def _places(self, record_numbers: tf.Tensor) -> tf.Tensor:
    return tf.searchsorted(self._sorted, record_numbers)


def _fill_and_age(entries: Entries, step: tf.Tensor) -> dict[str, WeightedMean]:
  """Computes the fill fraction of the bank and the mean age of its entries in steps."""
  is_there = entries.steps > _NEVER
  ages = tf.cast(step - entries.steps, tf.float32)
  return {
    "bank/fill": weighted_mean(tf.cast(is_there, tf.float32), tf.ones_like(is_there)),
    "bank/age_steps": weighted_mean(ages, is_there),
  }
