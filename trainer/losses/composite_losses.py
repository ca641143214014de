"""Losses made of other losses: a weighted sum, and a loss of jittered embeddings.

Shapes: A anchors, C candidates, D dimensions.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import gin
import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.errors import UserError
from trainer.losses.class_centres import CentreRows, ClassCentres
from trainer.losses.distances import PairwiseMetric
from trainer.losses.keras_loss import InBatchLoss
from trainer.losses.loss_terms import (
  Anchors,
  Candidates,
  LossOutput,
  MiningBatch,
  ReplicaLoss,
  WeightedMean,
)

_ACTIVE = "mining/active_fraction"

_SEED = (20_260, 1_124)


@gin.register
class SumOfLosses(InBatchLoss):
  """Σ weight · loss, such as ArcFace + batch hard on one batch.

  Each loss is divided by its own count before the sum. Its value without weight is
  logged as `train/loss/NAME` and its statistics as `…/NAME`, where NAME is the class of
  the loss; a second loss of the same class is NAME_2. A curriculum among the losses is
  paced by its own active fraction. Mining statistics are those of the first loss with a
  margin of pairs, or of the first loss.

  Args:
    losses: losses of this package, at least one.
    weights: of each, at least 0; None for 1.

  Raises:
    UserError: the losses are none, nested or of another package, or share class
      centres; the weights are not as many, negative, or all 0; several losses are
      paced.
  """

  def __init__(
    self,
    *,
    losses: Sequence[InBatchLoss],
    weights: Optional[Sequence[float]] = None,
  ):
    losses = list(losses)
    weights = [1.0] * len(losses) if weights is None else list(weights)
    _check_losses(losses)
    _check_weights(weights, len(losses))
    super().__init__()
    self._losses = losses
    self._weights = weights
    self._names = _distinct_names(losses)
    paced = [number for number, loss in enumerate(losses) if _is_paced(loss)]
    if len(paced) > 1:
      raise UserError(
        f"SumOfLosses has {len(paced)} losses with a curriculum; give a pace to one."
      )
    self._active_number = paced[0] if paced else 0

  @property
  def needs_positives(self) -> bool:
    """Whether one of the losses needs several examples of a class."""
    return any(loss.needs_positives for loss in self._losses)

  @property
  def needs_norms(self) -> bool:
    """Whether one of the losses needs embeddings of different norms."""
    return any(loss.needs_norms for loss in self._losses)

  @property
  def comparison(self) -> PairwiseMetric:
    """That of the loss which mining statistics analyse."""
    return self._mined.comparison

  @property
  def margin(self) -> Optional[float]:
    """That of the loss which mining statistics analyse."""
    return self._mined.margin

  @property
  def _mined(self) -> Any:
    with_margin = [loss for loss in self._losses if loss.margin is not None]
    return (with_margin or self._losses)[0]

  @property
  def tables(self) -> list[ClassCentres]:
    """Tables of all losses."""
    return [table for loss in self._losses for table in loss.tables]

  def replica_loss(
    self, pairs: MiningBatch, rows: Sequence[CentreRows], collectives: Collectives
  ) -> ReplicaLoss:
    """Computes this replica's share of the sum; see the base class."""
    rows = list(rows)
    values: list[tf.Tensor] = []
    statistics: dict[str, Any] = {}
    # Values are summed over replicas, so each replica counts as its part of one step.
    num_steps = tf.constant(1.0 / collectives.num_replicas)
    for loss, name in zip(self._losses, self._names):
      num_tables = len(loss.tables)
      own_rows, rows = rows[:num_tables], rows[num_tables:]
      value, found = loss.replica_loss(pairs, own_rows, collectives)
      values.append(value)
      statistics[f"train/loss/{name}"] = WeightedMean(
        tf.stop_gradient(value), num_steps
      )
      statistics.update(_renamed(found, name))
    active = statistics.get(f"{_ACTIVE}/{self._names[self._active_number]}")
    if active is not None:
      statistics[_ACTIVE] = active
    total = tf.add_n([weight * each for weight, each in zip(self._weights, values)])
    return ReplicaLoss(total, statistics)

  def terms(self, anchors: Anchors, candidates: Candidates) -> LossOutput:
    """Raises, because a sum of losses is no total divided by one count.

    Raises:
      UserError: always.
    """
    raise UserError(
      "SumOfLosses has several losses, each with its own count; give it to "
      "TrainStep.loss, and put JitteredLoss around its parts, not around the sum."
    )

  def check_is_complete(self) -> None:
    """Raises, because only training in this package adds losses.

    Raises:
      UserError: always.
    """
    raise UserError(
      "SumOfLosses is for a training by `TrainStep`; in Keras add the losses in a "
      "function of labels and embeddings."
    )


def _check_losses(losses: Sequence[Any]) -> None:
  for loss in losses:
    if not isinstance(loss, InBatchLoss) or isinstance(loss, SumOfLosses):
      raise UserError(
        f"SumOfLosses.losses has {loss!r}; give losses of this package, such as "
        "@ArcFaceLoss() and @BatchHardTripletLoss()."
      )
  if not losses:
    raise UserError("SumOfLosses.losses is empty; give at least one loss.")
  tables = [id(table) for loss in losses for table in loss.tables]
  if len(set(tables)) < len(tables):
    raise UserError(
      "SumOfLosses has losses that share their class centres; give each its own "
      "ClassCentres."
    )


def _check_weights(weights: Sequence[float], num_losses: int) -> None:
  are_valid = all(0 <= weight < math.inf for weight in weights)
  if len(weights) != num_losses or not are_valid or not any(weights):
    raise UserError(
      f"SumOfLosses.weights={list(weights)} for {num_losses} losses; give each a "
      "number of at least 0, and one above 0."
    )


def _distinct_names(losses: Sequence[InBatchLoss]) -> list[str]:
  """Returns the class of each loss, with a number if it is not the first of it."""
  seen: collections.Counter[str] = collections.Counter()
  names = []
  for loss in losses:
    name = type(loss).__name__
    seen[name] += 1
    names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
  return names


def _is_paced(loss: InBatchLoss) -> bool:
  parts = [loss, *loss.submodules]
  return any(getattr(part, "_pace", None) is not None for part in parts)


def _renamed(statistics: Mapping[str, Any], name: str) -> dict[str, Any]:
  return {f"{key}/{name}": value for key, value in statistics.items()}


@gin.register
class JitteredLoss(InBatchLoss):
  """A loss of embeddings that are each moved by a different small vector.

  If all embeddings are equal, every distance and its gradient are 0, so a loss of
  distances never leaves that state. Moved embeddings have gradient directions. An
  example's vector depends on its position in the global batch, so that any number of
  replicas gives the same loss. The cost is noise of this size in every distance.

  Args:
    loss: a loss of this package.
    scale: length of the vectors, in units of the embeddings; about 1 % of their norm.

  Raises:
    UserError: the scale is not above 0, or the loss has class centres.
  """

  def __init__(self, *, loss: Any, scale: float = 0.01):
    if not scale > 0:
      raise UserError(f"JitteredLoss.scale={scale} is not above 0; try 0.01.")
    if getattr(loss, "tables", None):
      raise UserError(
        "JitteredLoss moves embeddings that are compared with each other, and "
        f"{type(loss).__name__} has class centres; leave JitteredLoss out."
      )
    super().__init__()
    self._loss = loss
    self._scale = scale

  @property
  def needs_positives(self) -> bool:
    """That of the wrapped loss."""
    return self._loss.needs_positives

  @property
  def comparison(self) -> PairwiseMetric:
    """That of the wrapped loss."""
    return self._loss.comparison

  @property
  def margin(self) -> Optional[float]:
    """That of the wrapped loss."""
    return self._loss.margin

  def check_is_complete(self) -> None:
    """Checks the wrapped loss; see the base class."""
    if isinstance(self._loss, InBatchLoss):
      self._loss.check_is_complete()

  def terms(self, anchors: Anchors, candidates: Candidates) -> LossOutput:
    """Computes the loss of the moved embeddings, with gradients to the embeddings."""
    embeddings = tf.cast(candidates.embeddings, tf.float32)
    shape = tf.shape(embeddings)
    directions = tf.random.stateless_normal(shape, _SEED)
    lengths = tf.sqrt(tf.cast(shape[1], tf.float32))
    moves = tf.ensure_shape(self._scale * directions / lengths, embeddings.shape)
    own = tf.gather(moves, candidates.positions)
    return self._loss(
      anchors._replace(embeddings=tf.cast(anchors.embeddings, tf.float32) + own),
      candidates._replace(embeddings=embeddings + moves),
    )
