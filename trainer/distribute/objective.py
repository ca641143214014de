"""Where a batch is mined: across all replicas, or on each one by itself.

An objective function turns a replica's embeddings into its share of the loss. Shares
add up: the loss is their sum over the replicas, and since gradients are summed over
replicas too, they are the gradients of that loss.

Shapes: B examples on each replica, D dimensions, R replicas.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Protocol

import gin
import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.losses.mining_statistics import MinedLoss
from trainer.losses.terms import Anchors, Candidates, LossFn


class Share(NamedTuple):
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


ObjectiveFn = Callable[[LossFn, Anchors, Collectives], Share]


@gin.register
def across_replicas(loss: LossFn, anchors: Anchors, collectives: Collectives) -> Share:
  """Local anchors against the candidates of all replicas.

  L = Σ_r total_r / Σ_r count_r. The value, and every gradient, is that of one
  replica with the whole batch; the work of a replica is B × R·B distances.

  Args:
    loss: gives total and count for the anchors.
    anchors: this replica's embeddings [B, D], labels [B] and weights [B].
    collectives: how the replicas gather and sum.

  Returns:
    Share: total_r / Σ_r count_r; 0 where the global count is 0.
  """
  num_local = anchors.labels.shape[0]
  gather = collectives.gather
  candidates = Candidates(
    embeddings=gather(anchors.embeddings),
    labels=gather(anchors.labels),
    is_valid=gather(anchors.weights) > 0,
    positions=collectives.replica_id * num_local + tf.range(num_local),
  )
  terms = loss(anchors, candidates)
  count = collectives.sum(tf.stop_gradient(terms.count))
  return Share(tf.math.divide_no_nan(terms.total, count), terms.statistics)


@gin.register
def per_replica(loss: LossFn, anchors: Anchors, collectives: Collectives) -> Share:
  """Each replica's anchors against its own batch; nothing is gathered.

  L = 1/R Σ_r total_r / count_r, the mean of the replicas' losses. It depends on R:
  the same global batch on more replicas has fewer negatives for each anchor.

  Args:
    loss: gives total and count for the anchors.
    anchors: this replica's embeddings [B, D], labels [B] and weights [B].
    collectives: how many replicas there are.

  Returns:
    Share: total_r / count_r / R; 0 where the count is 0.
  """
  candidates = Candidates(
    embeddings=anchors.embeddings,
    labels=anchors.labels,
    is_valid=anchors.weights > 0,
    positions=tf.range(anchors.labels.shape[0]),
  )
  terms = loss(anchors, candidates)
  count = tf.stop_gradient(terms.count) * collectives.num_replicas
  return Share(tf.math.divide_no_nan(terms.total, count), terms.statistics)


def mines_across_replicas(objective_fn: ObjectiveFn) -> bool:
  """Whether it is `across_replicas`, also as gin hands it out."""
  return inspect.unwrap(objective_fn) is across_replicas
