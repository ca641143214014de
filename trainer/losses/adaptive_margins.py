"""Losses against class centres whose margin differs between examples.

Shapes: N examples of the global batch, C classes.
"""

from __future__ import annotations

import math
from typing import Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.centre_losses import (
  ArcOptions,
  CentreExamples,
  ClassCentreLoss,
  CombinedMarginLoss,
)
from trainer.losses.centre_products import ClassFilter
from trainer.losses.class_centres import ClassCentres

# Of the authors' code: bounds of a norm, of cosines and angles, and the first moving
# mean and deviation.
_MIN_NORM, _MAX_NORM = 1e-3, 100.0
_EPSILON = 1e-3
_FIRST_MEAN, _FIRST_DEVIATION = 20.0, 100.0
_ARC = ArcOptions()


@gin.register
class AdaFaceLoss(ClassCentreLoss):
  """φ(c) = cos(θ − m·z) − m·(1 + z): harder examples count more if their norm is large.

  z = (‖x‖ − μ) / σ · h, clipped to −1…1 and without gradient, where μ and σ are moving
  mean and deviation of the norms. z = −1 is ArcFace, 0 is CosFace, 1 is a negative
  angle margin. They are state, which every replica updates from the global batch. The
  encoder must not scale its embeddings to norm 1.

  Source: Kim et al. 2022, https://arxiv.org/abs/2204.00964, and the authors' code,
  which clips angles to 0.001…π − 0.001 and sets the update rate.

  Args:
    centres: as in the base class.
    margin: m >= 0, in radians and as a cosine.
    concentration: h > 0.
    scale: as in the base class.
    update_rate: share of the batch in the new mean and deviation, in (0, 1].
    class_filter: as in the base class.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(
    self,
    *,
    centres: ClassCentres,
    margin: float = 0.4,
    concentration: float = 0.333,
    scale: float = 64.0,
    update_rate: float = 0.01,
    class_filter: Optional[ClassFilter] = None,
  ):
    super().__init__(centres=centres, scale=scale, class_filter=class_filter)
    if not (
      0 <= margin < math.pi and 0 < concentration < math.inf and 0 < update_rate <= 1
    ):
      raise UserError(
        f"AdaFaceLoss has margin={margin}, concentration={concentration} and "
        f"update_rate={update_rate}; needed are radians from 0 to π, a number above 0, "
        "and one in (0, 1]."
      )
    self._margin = margin
    self._concentration = concentration
    self._update_rate = update_rate
    self._mean, self._deviation = (
      # Each replica computes its own equal copy: no communication is needed.
      tf.Variable(
        value,
        trainable=False,
        name=name,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
      )
      for name, value in (
        ("norm_mean", _FIRST_MEAN),
        ("norm_deviation", _FIRST_DEVIATION),
      )
    )

  @property
  def needs_norms(self) -> bool:
    """Always: the norm of an embedding stands for the quality of its example."""
    return True

  def own_cosines(self, cosines: tf.Tensor, examples: CentreExamples) -> tf.Tensor:
    """Returns the cosines with margins by norm; see the base class."""
    norms = tf.clip_by_value(tf.stop_gradient(examples.norms), _MIN_NORM, _MAX_NORM)
    mean, deviation = self._updated(norms, examples.is_valid)
    z = self._concentration * (norms - mean) / (deviation + _EPSILON)
    z = tf.clip_by_value(z, -1.0, 1.0)
    angles = tf.acos(tf.clip_by_value(cosines, _EPSILON - 1.0, 1.0 - _EPSILON))
    moved = tf.clip_by_value(angles - self._margin * z, _EPSILON, math.pi - _EPSILON)
    return tf.cos(moved) - self._margin * (1.0 + z)

  def _updated(
    self, norms: tf.Tensor, is_valid: tf.Tensor
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """Updates mean and deviation, and returns them; unchanged without an example."""
    counts = tf.cast(is_valid, tf.float32)
    num = tf.reduce_sum(counts)
    mean = tf.reduce_sum(counts * norms) / tf.maximum(num, 1.0)
    squares = tf.reduce_sum(counts * (norms - mean) ** 2)
    deviation = tf.sqrt(squares / tf.maximum(num - 1.0, 1.0))
    rate = tf.where(num > 0.0, self._update_rate, 0.0)
    updated = []
    for variable, value in ((self._mean, mean), (self._deviation, deviation)):
      old = tf.convert_to_tensor(variable)
      updated.append(old + rate * (value - old))
      variable.assign(updated[-1])
    return updated[0], updated[1]


@gin.register
class DynamicMarginLoss(CombinedMarginLoss):
  """ArcFace with an angle margin for each class: m = factor · n^(−power) + offset.

  n is the number of training examples of the class, so that rare classes have the
  largest margins.

  Source: Ha et al. 2020, https://arxiv.org/abs/2010.05350 (Google Landmark Recognition
  2020), with several centres of a class. With the defaults a class of one example has
  the margin 0.5, and the largest classes approach 0.05.

  Args:
    centres: as in the base class.
    factor: a >= 0, in radians.
    power: λ >= 0.
    offset: b >= 0, in radians.
    scale: as in the base class.
    arc: as in the base class.
    class_filter: as in the base class.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(
    self,
    *,
    centres: ClassCentres,
    factor: float = 0.45,
    power: float = 0.25,
    offset: float = 0.05,
    scale: float = 64.0,
    arc: ArcOptions = _ARC,
    class_filter: Optional[ClassFilter] = None,
  ):
    are_valid = all(0 <= each < math.inf for each in (factor, power, offset))
    if not are_valid or not factor + offset < math.pi:
      raise UserError(
        f"DynamicMarginLoss has factor={factor}, power={power} and offset={offset}; "
        "needed are numbers of at least 0, and a sum of factor and offset below π."
      )
    super().__init__(
      centres=centres,
      scale=scale,
      arc=arc,
      class_filter=class_filter,
    )
    self._factor = factor
    self._power = power
    self._offset = offset

  def angle_margins(self, examples: CentreExamples) -> tf.Tensor:
    """Returns the margins of the examples' classes, [N] float32."""
    sizes = tf.maximum(self._centres.sizes_of(examples.labels), 1.0)
    return self._factor * sizes**-self._power + self._offset
