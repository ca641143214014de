"""Losses against class centres: softmax over cosines with a scale and a margin.

For an example of class y with cosines c_j to the centres, the loss is
−log(e^{s·φ(c_y)} / (e^{s·φ(c_y)} + Σ_{j≠y} e^{s·c_j})), the mean over the examples by
their weights. The losses differ in φ, the own cosine with a margin.

Shapes: N examples of the global batch, A of them on this replica, D dimensions, k
centres of a class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

import gin
import tensorflow as tf

from trainer.distribute.collectives import Collectives
from trainer.errors import UserError, check_choice
from trainer.losses import metric_accumulators
from trainer.losses.centre_products import ClassFilter, CosineOptions, centre_cosines
from trainer.losses.class_centres import CentreRows, ClassCentres
from trainer.losses.distances import cosine
from trainer.losses.keras_loss import InBatchLoss
from trainer.losses.loss_terms import (
  LossOutput,
  MiningBatch,
  ReplicaLoss,
  WeightedMean,
)

# Cosines are clipped here before the arc cosine, whose slope is infinite at 1. The
# distance to 1 is about the rounding of a float32 cosine.
_CLIP = 1e-7
_CHOICES = {
  "beyond_pi": ("linear", "none", "easy"),
  "gradient": ("exact", "straight_through"),
}


@gin.register
@dataclasses.dataclass(frozen=True)
class ArcOptions:
  """How a margin is added to the angle θ with the own centre.

  Attributes:
    beyond_pi: for θ > π − margin, where cos(θ + margin) would increase: "linear" for φ
      = c − m·sin m, which keeps φ decreasing; "none" for the formula; "easy" for φ = c
      wherever c <= 0. No effect if the angle is multiplied.
    gradient: "exact"; "straight_through" to take 1 for the derivative of φ.

  Raises:
    UserError: a choice is unknown.
  """

  beyond_pi: str = "linear"
  gradient: str = "exact"

  def __post_init__(self):
    for name, choices in _CHOICES.items():
      check_choice(f"ArcOptions.{name}", getattr(self, name), choices)


_ARC = ArcOptions()


class CentreExamples(NamedTuple):
  """The examples of the global batch.

  Attributes:
    unit: [N, D] float32 embeddings of norm 1; 0 for padding and embeddings of 0.
    norms: [N] float32, of the embeddings; 0 for padding.
    labels: [N] int32; negative for padding.
    is_valid: [N] bool; false for padding.
  """

  unit: tf.Tensor
  norms: tf.Tensor
  labels: tf.Tensor
  is_valid: tf.Tensor


class ClassCentreLoss(InBatchLoss):
  """Base of the losses that are a softmax over the cosines with class centres.

  Args:
    centres: the class centres.
    scale: s > 0.
    class_filter: leaves out other classes that are too near; None for none.

  Raises:
    UserError: the scale is not above 0.
  """

  needs_positives = False
  comparison = cosine
  margin = None

  def __init__(
    self,
    *,
    centres: ClassCentres,
    scale: float,
    class_filter: Optional[ClassFilter] = None,
  ):
    name = type(self).__name__
    if not 0 < scale < math.inf:
      raise UserError(f"{name}.scale={scale} is not above 0; give a scale such as 64.")
    super().__init__()
    self._centres = centres
    self._scale = scale
    self._options = CosineOptions(scale, class_filter)

  @property
  def tables(self) -> list[ClassCentres]:
    """Tables of which rows are read in each step."""
    return [self._centres]

  def own_cosines(self, cosines: tf.Tensor, examples: CentreExamples) -> tf.Tensor:
    """Returns φ of the cosines with the own classes, [N] float32.

    Args:
      cosines: [N] float32.
      examples: of the global batch.
    """
    raise NotImplementedError

  def replica_loss(
    self, pairs: MiningBatch, rows: Sequence[CentreRows], collectives: Collectives
  ) -> ReplicaLoss:
    """Computes this replica's share of the loss; see the base class.

    Raises:
      UserError: each replica mines alone, or examples have several labels.
    """
    examples = centre_examples(type(self).__name__, pairs)
    cosines = centre_cosines(examples.unit, rows[0], self._options, collectives)
    own_logits = self._scale * self.own_cosines(cosines.own, examples)
    terms = tf.nn.softplus(cosines.others - own_logits)
    positions, weights = pairs.candidates.positions, pairs.anchors.weights
    is_active = tf.gather(own_logits < cosines.others, positions)
    output = LossOutput(
      tf.reduce_sum(weights * tf.gather(terms, positions)),
      tf.reduce_sum(weights),
      {
        **centre_statistics(cosines.own, cosines.nearest_other, rows[0], pairs),
        "mining/active_fraction": metric_accumulators.weighted_mean(
          tf.cast(is_active, tf.float32), weights > 0.0
        ),
      },
    )
    return pairs.replica_loss(output, collectives)

  def get_config(self) -> dict[str, Any]:
    """Raises, because Keras cannot save class centres.

    Raises:
      UserError: always.
    """
    self.check_is_complete()
    return {}

  def check_is_complete(self) -> None:
    """Raises, because Keras does not train class centres.

    Raises:
      UserError: always.
    """
    raise UserError(
      f"{type(self).__name__} has class centres, which only a training by `TrainStep` "
      "reads and updates; in Keras use a loss of pairs, such as InfoNCELoss."
    )


def centre_examples(name: str, pairs: MiningBatch) -> CentreExamples:
  """Returns the examples of the global batch that are compared with class centres.

  Args:
    name: of the loss.
    pairs: of a step.

  Raises:
    UserError: each replica mines alone, examples have several labels, or not all are
      compared.
  """
  if not pairs.is_global:
    raise UserError(
      f"{name} has class centres that are shared by all replicas; set "
      "TrainStep.objective_fn = @global_negatives."
    )
  candidates = pairs.candidates
  if candidates.is_compared is not None:
    raise UserError(
      f"{name} compares all examples with class centres, and WithinGroups only the "
      "first of each group; set TrainStep.objective_fn = @global_negatives."
    )
  if candidates.labels.dtype == tf.bool:
    raise UserError(f"{name} supports one label of an example, not several.")
  # A cross-batch memory has further labels.
  num_examples = candidates.embeddings.shape[0]
  is_valid = candidates.is_valid[:num_examples]
  embeddings = tf.cast(candidates.embeddings, tf.float32)
  embeddings = tf.where(is_valid[:, None], embeddings, 0.0)
  squared = tf.reduce_sum(embeddings**2, 1)
  norms = tf.sqrt(tf.where(squared > 0.0, squared, 1.0))
  return CentreExamples(
    cosine.vectors_fn(embeddings),
    tf.where(squared > 0.0, norms, 0.0),
    candidates.labels[:num_examples],
    is_valid,
  )


def centre_statistics(
  own: tf.Tensor, nearest_other: tf.Tensor, rows: CentreRows, pairs: MiningBatch
) -> Mapping[str, Any]:
  """Computes the statistics of a loss against class centres.

  Args:
    own: [N] float32, cosines with the own class.
    nearest_other: [N] float32, largest cosine with another class; −∞ if there is none.
    rows: the centres that this replica has read.
    pairs: of the step.

  Returns:
    This replica's sums. Quantiles are of the global batch, and equal on all replicas.
  """
  own, nearest_other = tf.stop_gradient(own), tf.stop_gradient(nearest_other)
  is_valid = pairs.candidates.is_valid[: own.shape[0]]
  is_counted = pairs.anchors.weights > 0.0
  of_anchors = tf.gather(own, pairs.candidates.positions)
  nearest = tf.gather(nearest_other, pairs.candidates.positions)
  has_other = is_counted & (nearest > -float("inf"))
  is_correct = tf.cast(of_anchors > nearest, tf.float32)
  weighted_mean = metric_accumulators.weighted_mean
  return {
    "centres/own_cosine": metric_accumulators.moments(of_anchors, is_counted),
    **{
      f"centres/own_cosine_p{percent:02}": quantile
      for percent, quantile in _quantiles(own, is_valid).items()
    },
    "centres/nearest_other_cosine": weighted_mean(nearest, has_other),
    "centres/accuracy": weighted_mean(is_correct, has_other),
    "centres/norm": weighted_mean(_norms_of_own(rows), rows.columns >= 0),
    "centres/never_seen": rows.never_seen,
  }


def _quantiles(values: tf.Tensor, is_counted: tf.Tensor) -> dict[int, WeightedMean]:
  """Returns quantiles of the values [N] that count, by percent."""
  ordered = tf.sort(tf.where(is_counted, values, float("inf")))
  count = tf.reduce_sum(tf.cast(is_counted, tf.int32))
  has_any = (count > 0)[None]
  last = tf.cast(tf.maximum(count - 1, 0), tf.float32)
  return {
    percent: metric_accumulators.weighted_mean(
      tf.gather(ordered, [tf.cast(tf.round(last * percent / 100), tf.int32)]), has_any
    )
    for percent in metric_accumulators.QUANTILES
  }


def _norms_of_own(rows: CentreRows) -> tf.Tensor:
  """Returns the mean norm of the k centres of each example's class, [N].

  The value of classes of other replicas is that of another class.
  """
  k = rows.centres_per_class
  columns = tf.maximum(rows.columns, 0)[:, None] * k + tf.range(k)
  return tf.reduce_mean(tf.norm(tf.gather(rows.vectors, columns), axis=2), 1)


@gin.register
class NormFaceLoss(ClassCentreLoss):
  """φ(c) = c: a softmax over cosines, without a margin.

  Source: Wang et al. 2017, https://arxiv.org/abs/1704.06369.
  """

  def own_cosines(self, cosines: tf.Tensor, examples: CentreExamples) -> tf.Tensor:
    """Returns the cosines; see the base class."""
    return cosines


@gin.register
class CombinedMarginLoss(ClassCentreLoss):
  """φ(c) = cos(m₁·θ + m₂) − m₃ with θ = arccos c.

  CosFace is m₃ alone, ArcFace is m₂ alone, SphereFace is m₁ alone.

  Source: Deng et al. 2019, https://arxiv.org/abs/1801.07698; Wang et al. 2018,
  https://arxiv.org/abs/1801.09414.

  Args:
    centres: as in the base class.
    angle_factor: m₁ >= 1.
    angle_margin: m₂ >= 0, in radians.
    cosine_margin: m₃ >= 0.
    scale: as in the base class.
    arc: how the angle is treated beyond π, and its gradient.
    class_filter: as in the base class.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(
    self,
    *,
    centres: ClassCentres,
    angle_factor: float = 1.0,
    angle_margin: float = 0.0,
    cosine_margin: float = 0.0,
    scale: float = 64.0,
    arc: ArcOptions = _ARC,
    class_filter: Optional[ClassFilter] = None,
  ):
    super().__init__(
      centres=centres,
      scale=scale,
      class_filter=class_filter,
    )
    name = type(self).__name__
    is_valid = 1 <= angle_factor < math.inf and 0 <= cosine_margin < math.inf
    if not is_valid or not 0 <= angle_margin < math.pi:
      raise UserError(
        f"{name} has angle_factor={angle_factor}, angle_margin={angle_margin} and "
        f"cosine_margin={cosine_margin}; needed are at least 1, radians from 0 to π, "
        "and at least 0."
      )
    if angle_factor != 1 and arc.beyond_pi == "easy":
      raise UserError(
        f"{name} has angle_factor={angle_factor}, and ArcOptions.beyond_pi='easy' "
        "needs 1; set it to 'none'."
      )
    self._angle_factor = angle_factor
    self._angle_margin = angle_margin
    self._cosine_margin = cosine_margin
    self._arc = arc

  def angle_margins(self, examples: CentreExamples) -> Union[float, tf.Tensor]:
    """Returns m₂, [] or [N].

    Args:
      examples: of the global batch.
    """
    del examples
    return self._angle_margin

  def own_cosines(self, cosines: tf.Tensor, examples: CentreExamples) -> tf.Tensor:
    """Returns the cosines with the margins; see the base class."""
    margins = self.angle_margins(examples)
    if self._angle_factor == 1 and isinstance(margins, float) and margins == 0:
      return cosines - self._cosine_margin
    moved = self._with_angle_margins(cosines, tf.convert_to_tensor(margins))
    if self._arc.gradient == "straight_through":
      moved = cosines + tf.stop_gradient(moved - cosines)
    return moved - self._cosine_margin

  def _with_angle_margins(self, cosines: tf.Tensor, margins: tf.Tensor) -> tf.Tensor:
    angles = tf.acos(tf.clip_by_value(cosines, _CLIP - 1.0, 1.0 - _CLIP))
    moved = tf.cos(self._angle_factor * angles + margins)
    if self._angle_factor != 1 or self._arc.beyond_pi == "none":
      return moved
    if self._arc.beyond_pi == "easy":
      return tf.where(cosines > 0.0, moved, cosines)
    line = cosines - margins * tf.sin(margins)
    return tf.where(angles <= math.pi - margins, moved, line)


@gin.register
class ArcFaceLoss(CombinedMarginLoss):
  """φ(c) = cos(θ + margin): `CombinedMarginLoss` with an angle margin alone.

  Source: Deng et al. 2019, https://arxiv.org/abs/1801.07698; with several centres of a
  class, Deng et al. 2020 (Sub-center ArcFace, ECCV).
  """

  def __init__(
    self,
    *,
    centres: ClassCentres,
    margin: float = 0.5,
    scale: float = 64.0,
    arc: ArcOptions = _ARC,
    class_filter: Optional[ClassFilter] = None,
  ):
    if not 0 <= margin < math.pi:
      raise UserError(
        f"{type(self).__name__}.margin={margin} is not an angle from 0 to π; give "
        "radians such as 0.5."
      )
    super().__init__(
      centres=centres,
      angle_margin=margin,
      scale=scale,
      arc=arc,
      class_filter=class_filter,
    )


@gin.register
class CosFaceLoss(CombinedMarginLoss):
  """φ(c) = c − margin: `CombinedMarginLoss` with a cosine margin alone.

  Source: Wang et al. 2018, https://arxiv.org/abs/1801.09414.
  """

  def __init__(
    self,
    *,
    centres: ClassCentres,
    margin: float = 0.35,
    scale: float = 64.0,
    class_filter: Optional[ClassFilter] = None,
  ):
    if not 0 <= margin < math.inf:
      raise UserError(
        f"{type(self).__name__}.margin={margin} must be at least 0, such as 0.35."
      )
    super().__init__(
      centres=centres,
      cosine_margin=margin,
      scale=scale,
      class_filter=class_filter,
    )
