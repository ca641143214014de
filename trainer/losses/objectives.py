"""Objectives: mining across all replicas, or on each replica alone.

An objective function returns the candidates that a replica's anchors are compared with.
The loss is the sum of the replicas' shares. Gradients are summed over replicas too, so
they are the gradients of that loss.

Shapes: B examples on each replica, D dimensions, R replicas.
"""

from __future__ import annotations

import inspect
from typing import Callable, Optional

import gin
import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.errors import UserError
from trainer.losses.loss_terms import Anchors, Candidates, MiningBatch

ObjectiveFn = Callable[[Anchors, Collectives], MiningBatch]


@gin.register
def global_negatives(anchors: Anchors, collectives: Collectives) -> MiningBatch:
  """Compares local anchors with the candidates of all replicas.

  The loss and every gradient equal those of one replica with the whole batch. Each
  replica computes B × R·B distances.

  Args:
    anchors: this replica's embeddings [B, D], labels [B] and weights [B].
    collectives: gather over the replicas.
  """
  return MiningBatch(anchors, _gathered(anchors, collectives), is_global=True)


@gin.register
def local_negatives(anchors: Anchors, collectives: Collectives) -> MiningBatch:
  """Compares each replica's anchors with its own batch; no gather.

  The loss depends on R: the same global batch on more replicas has fewer negatives for
  each anchor.

  Args:
    anchors: this replica's embeddings [B, D], labels [B] and weights [B].
    collectives: not used.
  """
  del collectives
  candidates = Candidates(
    embeddings=anchors.embeddings,
    labels=anchors.labels,
    is_valid=anchors.weights > 0,
    positions=tf.range(anchors.labels.shape[0]),
  )
  return MiningBatch(anchors, candidates, is_global=False)


@gin.register
class WithinGroups:
  """Objective that compares the first row of each group with the rest of its group.

  It is for batches of triplets: a group is an anchor, its positives and its negatives,
  whatever their labels are. Rows of other groups are ignored. Any number of replicas
  gives the same loss.

  Args:
    num_positives: p >= 1, number of positives after the anchor.
    num_negatives: n >= 1, number of negatives after the positives.

  Raises:
    UserError: an argument is too small.
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
    """Checks that batches consist of such groups.

    Args:
      group: number of positives and negatives per group of a batch; None if rows are
        not grouped.
      sampler_name: name of the parameter that has the batch sampler.

    Raises:
      UserError: the groups are different, or there are none.
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

  def __call__(self, anchors: Anchors, collectives: Collectives) -> MiningBatch:
    """Compares the first row of each group with the rest of its group.

    Args:
      anchors: this replica's embeddings [B, D], labels [B] and weights [B], in whole
        groups.
      collectives: gather over the replicas.
    """
    candidates = _gathered(anchors, collectives)
    groups, places = self._groups_and_places(tf.range(candidates.labels.shape[0]))
    own_groups, own_places = self._groups_and_places(candidates.positions)
    is_positive = tf.logical_and(places > 0, places <= self._group[0])
    is_own = tf.equal(own_groups[:, None], groups[None, :])
    return MiningBatch(
      anchors._replace(weights=tf.where(own_places > 0, 0.0, anchors.weights)),
      candidates._replace(
        is_relevant=tf.logical_and(is_own, is_positive[None, :]), is_compared=is_own
      ),
      is_global=True,
    )

  def _groups_and_places(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns group and position in it for rows of the global batch, [n]."""
    return rows // self._group_size, rows % self._group_size


def _gathered(anchors: Anchors, collectives: Collectives) -> Candidates:
  """Gathers the global batch, which includes the anchors."""
  num_local = anchors.labels.shape[0]
  gather = collectives.gather
  return Candidates(
    embeddings=gather(anchors.embeddings),
    labels=gather(anchors.labels),
    is_valid=gather(anchors.weights) > 0,
    positions=collectives.replica_id * num_local + tf.range(num_local),
  )


def mines_across_replicas(objective_fn: ObjectiveFn) -> bool:
  """Returns whether the objective mines across replicas, also if wrapped by gin."""
  if isinstance(objective_fn, WithinGroups):
    return True
  return inspect.unwrap(objective_fn) is global_negatives
