"""Where a batch is mined: across all replicas, or on each one by itself.

An objective function turns a replica's embeddings into its share of the loss. Shares
add up: the loss is their sum over the replicas, and since gradients are summed over
replicas too, they are the gradients of that loss.

Shapes: B examples on each replica, D dimensions, R replicas.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Optional, Protocol

import gin
import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.errors import UserError
from trainer.losses.loss_terms import Anchors, Candidates, LossFn
from trainer.losses.mining_statistics import MinedLoss


class ReplicaLoss(NamedTuple):
  """A replica's share of the loss.

  Attributes:
    loss: [] float32, differentiable; the loss is its sum over replicas.
    statistics: what the loss tells of this replica's anchors, adding up.
  """

  loss: tf.Tensor
  statistics: Mapping[str, Any]


class Loss(MinedLoss, Protocol):
  """What a training asks of a loss.

  Attributes:
    needs_positives: whether a batch without two examples of a class has no loss.
  """

  needs_positives: bool


ObjectiveFn = Callable[[LossFn, Anchors, Collectives], ReplicaLoss]


@gin.register
def global_negatives(
  loss: LossFn, anchors: Anchors, collectives: Collectives
) -> ReplicaLoss:
  """Local anchors against the candidates of all replicas.

  L = Σ_r total_r / Σ_r count_r. The value, and every gradient, is that of one
  replica with the whole batch; the work of a replica is B × R·B distances.

  Args:
    loss: gives total and count for the anchors.
    anchors: this replica's embeddings [B, D], labels [B] and weights [B].
    collectives: how the replicas gather and sum.

  Returns:
    ReplicaLoss: total_r / Σ_r count_r; 0 where the global count is 0.
  """
  return _share(loss, anchors, _gathered(anchors, collectives), collectives)


@gin.register
def local_negatives(
  loss: LossFn, anchors: Anchors, collectives: Collectives
) -> ReplicaLoss:
  """Each replica's anchors against its own batch; nothing is gathered.

  L = 1/R Σ_r total_r / count_r, the mean of the replicas' losses. It depends on R:
  the same global batch on more replicas has fewer negatives for each anchor.

  Args:
    loss: gives total and count for the anchors.
    anchors: this replica's embeddings [B, D], labels [B] and weights [B].
    collectives: how many replicas there are.

  Returns:
    ReplicaLoss: total_r / count_r / R; 0 where the count is 0.
  """
  candidates = Candidates(
    embeddings=anchors.embeddings,
    labels=anchors.labels,
    is_valid=anchors.weights > 0,
    positions=tf.range(anchors.labels.shape[0]),
  )
  terms = loss(anchors, candidates)
  count = tf.stop_gradient(terms.count) * collectives.num_replicas
  return ReplicaLoss(tf.math.divide_no_nan(terms.total, count), terms.statistics)


@gin.register
class WithinGroups:
  """The first row of each group against the rest of its group, as a list says.

  For batches of triplets: a row is an anchor, what it is to be near, and what it is to
  be far from, whatever their labels are. Rows of other groups are not looked at.
  L = Σ_r total_r / Σ_r count_r: any number of replicas gives the same.

  Args:
    num_positives: p >= 1, how many rows after the anchor are its positives.
    num_negatives: n >= 1, how many after those are its negatives.

  Raises:
    UserError: a number is too small.
  """

  def __init__(self, *, num_positives: int = 1, num_negatives: int = 1):
    if num_positives < 1 or num_negatives < 1:
      raise UserError(
        f"WithinGroups.num_positives={num_positives} and num_negatives="
        f"{num_negatives} must be at least 1."
      )
    self._group = (num_positives, num_negatives)
    self._group_size = 1 + num_positives + num_negatives

  def check_groups(self, group: Optional[tuple[int, int]], sampler_name: str) -> None:
    """Checks that a batch has such groups.

    Args:
      group: positives and negatives of each row of a batch; None where rows are no
        groups.
      sampler_name: of the parameter that has the batches' sampler.

    Raises:
      UserError: it has not.
    """
    if group is None:
      raise UserError(
        f"WithinGroups needs batches of groups, and this {sampler_name} draws "
        "classes; set it to @TripletSampler (train) or @MinedTripletSampler "
        "(OfflineMining), or TrainStep.objective_fn to @global_negatives."
      )
    if group != self._group:
      raise UserError(
        "WithinGroups has {} positives and {} negatives a group, and the groups of {} "
        "have {} and {}; make them equal.".format(*self._group, sampler_name, *group)
      )

  def __call__(
    self, loss: LossFn, anchors: Anchors, collectives: Collectives
  ) -> ReplicaLoss:
    """The share of a replica.

    Args:
      loss: gives total and count for the anchors.
      anchors: this replica's embeddings [B, D], labels [B] and weights [B], of whole
        groups.
      collectives: how the replicas gather and sum.

    Returns:
      ReplicaLoss: total_r / Σ_r count_r; 0 where the global count is 0.
    """
    candidates = _gathered(anchors, collectives)
    groups, places = self._groups_and_places(tf.range(candidates.labels.shape[0]))
    own_groups, own_places = self._groups_and_places(candidates.positions)
    is_positive = tf.logical_and(places > 0, places <= self._group[0])
    is_own = tf.equal(own_groups[:, None], groups[None, :])
    return _share(
      loss,
      anchors._replace(weights=tf.where(own_places > 0, 0.0, anchors.weights)),
      candidates._replace(
        is_relevant=tf.logical_and(is_own, is_positive[None, :]), is_compared=is_own
      ),
      collectives,
    )

  def _groups_and_places(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Of rows of the global batch, [n]: which group, and which place in it."""
    return rows // self._group_size, rows % self._group_size


def _gathered(anchors: Anchors, collectives: Collectives) -> Candidates:
  """The global batch, of which the anchors are a part."""
  num_local = anchors.labels.shape[0]
  gather = collectives.gather
  return Candidates(
    embeddings=gather(anchors.embeddings),
    labels=gather(anchors.labels),
    is_valid=gather(anchors.weights) > 0,
    positions=collectives.replica_id * num_local + tf.range(num_local),
  )


def _share(
  loss: LossFn, anchors: Anchors, candidates: Candidates, collectives: Collectives
) -> ReplicaLoss:
  """Of a loss that is divided by the count of all replicas."""
  terms = loss(anchors, candidates)
  count = collectives.sum(tf.stop_gradient(terms.count))
  return ReplicaLoss(tf.math.divide_no_nan(terms.total, count), terms.statistics)


def mines_across_replicas(objective_fn: ObjectiveFn) -> bool:
  """Whether it gives what one replica would, also as gin hands it out."""
  if isinstance(objective_fn, WithinGroups):
    return True
  return inspect.unwrap(objective_fn) is global_negatives
