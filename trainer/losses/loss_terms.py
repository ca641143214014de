"""Inputs and outputs of a loss: anchors, candidates, pair masks and sums.

Shapes: A anchors (this replica's), T anchors of a tile, C candidates, of which F are
fixed, N entries of the table, D dimensions, L labels per example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.errors import UserError


class Anchors(NamedTuple):
  """The examples of this replica, from which distances are computed.

  Attributes:
    embeddings: [A, D] float.
    labels: [A] int32, or [A, L] bool for several labels per example.
    weights: [A] float32 >= 0; 0 for a padding row.
  """

  embeddings: tf.Tensor
  labels: tf.Tensor
  weights: tf.Tensor


class Candidates(NamedTuple):
  """The examples to which distances are computed, including the anchors.

  Attributes:
    embeddings: [C − F, D] float, of the first candidates.
    labels: [C] int32, or [C, L] bool.
    is_valid: [C] bool; false for a padding row.
    positions: [A] int32, index of each anchor among the candidates.
    is_relevant: [A, C] bool, which candidates are positives of which anchor; None to
      compare labels.
    fixed_embeddings: [F, D] float, of the last candidates, which have no gradient and
      are not anchors: the entries of a cross-batch memory. Finite even if not valid.
      None if there are none.
    is_compared: [A, C] bool, which candidates count for which anchor; None for all.
  """

  embeddings: tf.Tensor
  labels: tf.Tensor
  is_valid: tf.Tensor
  positions: tf.Tensor
  is_relevant: Optional[tf.Tensor] = None
  fixed_embeddings: Optional[tf.Tensor] = None
  is_compared: Optional[tf.Tensor] = None

  def of_anchors(self, numbers: tf.Tensor) -> Candidates:
    """Returns the candidates for the anchors with the given indices, [n] int32."""
    return self._replace(
      positions=tf.gather(self.positions, numbers),
      is_relevant=_rows(self.is_relevant, numbers),
      is_compared=_rows(self.is_compared, numbers),
    )


class WeightedMean(NamedTuple):
  """A statistic that is summed over steps and replicas; its value is total / count.

  Attributes:
    total: [] float32.
    count: [] float32.
  """

  total: tf.Tensor
  count: tf.Tensor


class LossOutput(NamedTuple):
  """This replica's part of a loss; the loss is Σ total / Σ count over all replicas.

  Attributes:
    total: [] float32, differentiable.
    count: [] float32, without gradient.
    statistics: by metric name, each a `WeightedMean` or another structure of sums over
      steps and replicas; see `trainer.losses.metric_accumulators`.
  """

  total: tf.Tensor
  count: tf.Tensor
  statistics: Mapping[str, Any]


class ReplicaLoss(NamedTuple):
  """A replica's share of the loss.

  Attributes:
    value: [] float32, differentiable; the loss is its sum over replicas.
    statistics: of this replica's anchors, to be summed over replicas and steps.
  """

  value: tf.Tensor
  statistics: Mapping[str, Any]


class MiningBatch(NamedTuple):
  """The anchors of a replica, and the candidates that they are compared with.

  Attributes:
    anchors: B of them.
    candidates: of the global batch, or of this replica.
    is_global: whether the loss is divided by the count of all replicas: L = Σ_r total_r
      / Σ_r count_r. Otherwise it is the mean of the replicas' losses: L = 1/R Σ_r
      total_r / count_r.
  """

  anchors: Anchors
  candidates: Candidates
  is_global: bool

  def replica_loss(self, output: LossOutput, collectives: Collectives) -> ReplicaLoss:
    """Computes this replica's share of the loss; 0 if the count is 0.

    Args:
      output: the sums over these anchors.
      collectives: sum over the replicas.
    """
    count = tf.stop_gradient(output.count)
    if self.is_global:
      count = collectives.sum(count)
    else:
      count = count * collectives.num_replicas
    value = tf.math.divide_no_nan(output.total, count)
    return ReplicaLoss(value, output.statistics)


LossFn = Callable[[Anchors, Candidates], LossOutput]


def _rows(pairs: Optional[tf.Tensor], numbers: tf.Tensor) -> Optional[tf.Tensor]:
  return None if pairs is None else tf.gather(pairs, numbers)


class PositiveLists(NamedTuple):
  """The positives of each anchor, as runs of a table of columns.

  Attributes:
    table: [N] int32, candidate indices; an anchor's positives are a contiguous run.
    starts: [A] int32, start of each anchor's run.
    sizes: [A] int32, number of positives of each anchor.
    skipped: [A] int32, position of the anchor itself in its run; -1 if it is not there.
  """

  table: tf.Tensor
  starts: tf.Tensor
  sizes: tf.Tensor
  skipped: tf.Tensor

  def rows(self, numbers: tf.Tensor) -> PositiveLists:
    """Returns the lists of the anchors with the given indices, [T]."""
    return PositiveLists(self.table, *(tf.gather(each, numbers) for each in self[1:]))

  def places(self, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the k-th positive of each anchor.

    Args:
      k: [] int32.

    Returns:
      [A, 2] int32, row and column; and [A] bool, false if an anchor has no k-th
      positive and its column is undefined.
    """
    places = self.starts + k
    is_after = tf.logical_and(self.skipped >= 0, places >= self.skipped)
    places = tf.minimum(
      places + tf.cast(is_after, tf.int32), tf.shape(self.table)[0] - 1
    )
    columns = tf.gather(self.table, tf.maximum(places, 0))
    return tf.stack([tf.range(tf.shape(columns)[0]), columns], 1), k < self.sizes


def lists_of_classes(anchors: Anchors, candidates: Candidates) -> PositiveLists:
  """Builds the lists of integer labels, by one sort of [C].

  Candidates are sorted by class, padding last in each: a class is a run of the table.

  Args:
    anchors: A of them.
    candidates: C of them.
  """
  order = _valid_first(candidates.is_valid)
  order = tf.gather(order, tf.argsort(tf.gather(candidates.labels, order), stable=True))
  labels = tf.gather(candidates.labels, order)
  starts = tf.searchsorted(labels, anchors.labels)
  ends = tf.searchsorted(labels, anchors.labels, side="right")
  is_valid = tf.cast(tf.gather(candidates.is_valid, order), tf.int32)
  num_valid = tf.concat([[0], tf.cumsum(is_valid)], 0)
  num_of_class = tf.gather(num_valid, ends) - tf.gather(num_valid, starts)
  is_own_valid = tf.gather(candidates.is_valid, candidates.positions)
  return PositiveLists(
    table=order,
    starts=starts,
    sizes=num_of_class - tf.cast(is_own_valid, tf.int32),
    skipped=tf.gather(_inverse(order), candidates.positions),
  )


def _valid_first(is_valid: tf.Tensor) -> tf.Tensor:
  """Returns [C] int32, an order of candidates with padding last, without a sort."""
  ones = tf.cast(is_valid, tf.int32)
  num_before, num_valid = tf.cumsum(ones, exclusive=True), tf.reduce_sum(ones)
  numbers = tf.range(tf.shape(ones)[0])
  return _inverse(tf.where(is_valid, num_before, num_valid + numbers - num_before))


def _inverse(order: tf.Tensor) -> tf.Tensor:
  """Returns [C] int32, the position of each number in an order [C]."""
  size = tf.shape(order)
  return tf.scatter_nd(order[:, None], tf.range(size[0]), size)


def lists_of_pairs(is_positive: tf.Tensor) -> PositiveLists:
  """Builds the lists of any relevance, by a sort of each row.

  Args:
    is_positive: [A, C] bool.
  """
  counts = tf.cast(is_positive, tf.int32)
  columns = tf.argsort(counts, direction="DESCENDING", stable=True)
  num_anchors, num_candidates = tf.unstack(tf.shape(is_positive))
  return PositiveLists(
    table=tf.reshape(columns, [-1]),
    starts=num_candidates * tf.range(num_anchors),
    sizes=tf.reduce_sum(counts, 1),
    skipped=tf.fill([num_anchors], -1),
  )


class PairMasks(NamedTuple):
  """Masks of positive and negative pairs; an anchor itself and padding are in neither.

  Attributes:
    is_positive: [A, C] bool.
    is_negative: [A, C] bool.
    lists: positives of each anchor, for losses that process them one by one.
  """

  is_positive: tf.Tensor
  is_negative: tf.Tensor
  lists: Optional[PositiveLists] = None

  @property
  def is_either(self) -> tf.Tensor:
    """[A, C] bool, whether a pair is positive or negative."""
    return tf.logical_or(self.is_positive, self.is_negative)

  @property
  def has_both(self) -> tf.Tensor:
    """[A] bool, whether an anchor has a positive and a negative."""
    return tf.logical_and(
      tf.reduce_any(self.is_positive, 1), tf.reduce_any(self.is_negative, 1)
    )


def check_batch(anchors: Anchors, candidates: Candidates) -> None:
  """Raises at trace time if the shapes of a batch would broadcast incorrectly.

  Args:
    anchors: A of them.
    candidates: C of them.

  Raises:
    UserError: embeddings are not of rank 2; labels are neither [B] integer nor [B, L]
      bool, or not of one kind; weights, validity, positions or relevance have the wrong
      shape.
  """
  check_embeddings(anchors.embeddings)
  check_embeddings(candidates.embeddings)
  num_anchors, num_candidates = anchors.embeddings.shape[0], _num_embeddings(candidates)
  check_labels(anchors.labels, num_anchors)
  check_labels(candidates.labels, num_candidates)
  if anchors.labels.shape.rank != candidates.labels.shape.rank:
    raise UserError("anchors and candidates have labels of different kinds.")
  _check_shape("weights", anchors.weights, [num_anchors])
  _check_shape("is_valid", candidates.is_valid, [num_candidates])
  _check_shape("positions", candidates.positions, [num_anchors])
  for name in ("is_relevant", "is_compared"):
    if getattr(candidates, name) is not None:
      _check_shape(name, getattr(candidates, name), [num_anchors, num_candidates])


def _num_embeddings(candidates: Candidates) -> Optional[int]:
  num, fixed = candidates.embeddings.shape[0], candidates.fixed_embeddings
  return num if num is None or fixed is None else num + fixed.shape[0]


def _check_shape(name: str, tensor: tf.Tensor, shape: list[Optional[int]]) -> None:
  if not tensor.shape.is_compatible_with(shape):
    raise UserError(f"{name} have shape {tensor.shape}; needed is {tuple(shape)}.")


def check_embeddings(embeddings: tf.Tensor) -> None:
  """Raises at trace time if embeddings are not one vector per example.

  Raises:
    UserError: their rank is known and is not 2.
  """
  if embeddings.shape.rank not in (None, 2):
    raise UserError(
      f"embeddings have shape {tuple(embeddings.shape)}; needed is one vector for each "
      "example, shape (B, D): pool or flatten the other dimensions."
    )


def check_labels(labels: tf.Tensor, num_embeddings: Optional[int]) -> None:
  """Raises at trace time if labels would broadcast incorrectly.

  Raises:
    UserError: the labels are neither [B] integer nor [B, L] bool.
  """
  is_classes = labels.dtype.is_integer and labels.shape.rank == 1
  is_several = labels.dtype == tf.bool and labels.shape.rank == 2
  if not (is_classes or is_several):
    raise UserError(
      f"labels have shape {labels.shape} and type {labels.dtype.name}; needed is one "
      "integer for each embedding, shape (B,), or several labels as bool, shape "
      "(B, L)."
    )
  if num_embeddings is not None and labels.shape[0] not in (None, num_embeddings):
    raise UserError(
      f"{labels.shape[0]} labels were given for {num_embeddings} embeddings; "
      "give one label for each embedding."
    )


def positive_lists(anchors: Anchors, candidates: Candidates) -> Optional[PositiveLists]:
  """Builds the lists of positives by one sort of all labels.

  Args:
    anchors: A of them.
    candidates: C of them.

  Returns:
    None if an example has several labels or the pairs are given. Then every row must be
    sorted, which each tile does by `lists_of_pairs`.
  """
  is_given = candidates.is_relevant is not None or candidates.is_compared is not None
  if is_given or candidates.labels.dtype == tf.bool:
    return None
  return lists_of_classes(anchors, candidates)


def pair_masks(
  anchors: Anchors, candidates: Candidates, lists: Optional[PositiveLists] = None
) -> PairMasks:
  """Builds pair masks: positives share a label or are given, the rest are negatives.

  Only candidates that the anchor is compared with are in a mask; padding and the anchor
  itself are in neither.
  """
  is_self = tf.equal(
    candidates.positions[:, None], tf.range(tf.shape(candidates.is_valid)[0])[None, :]
  )
  is_eligible = tf.logical_and(candidates.is_valid[None, :], ~is_self)
  if candidates.is_compared is not None:
    is_eligible = tf.logical_and(is_eligible, candidates.is_compared)
  is_relevant = shares_label(anchors, candidates)
  return PairMasks(
    is_positive=tf.logical_and(is_relevant, is_eligible),
    is_negative=tf.logical_and(~is_relevant, is_eligible),
    lists=lists,
  )


def shares_label(anchors: Anchors, candidates: Candidates) -> tf.Tensor:
  """Returns [A, C] bool: the given relevance, or whether a pair has a common label."""
  if candidates.is_relevant is not None:
    return candidates.is_relevant
  if candidates.labels.dtype == tf.bool:
    # Counts of common labels are whole numbers, exact in float32 up to 2²⁴.
    common = tf.matmul(
      tf.cast(anchors.labels, tf.float32),
      tf.cast(candidates.labels, tf.float32),
      transpose_b=True,
    )
    return common > 0.5
  return tf.equal(anchors.labels[:, None], candidates.labels[None, :])
