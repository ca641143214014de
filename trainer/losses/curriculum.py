"""A curriculum from all triplets to the hardest ones during training.

Shapes: T anchors of a tile, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Protocol, Union

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.keras_loss import KerasSerializable
from trainer.losses.loss_terms import (
  Anchors,
  Candidates,
  LossOutput,
  PairMasks,
  WeightedMean,
)
from trainer.losses.softmax import num_members
from trainer.losses.tiled_loss import AnchorTerms
from trainer.losses.triplet import BatchAllTripletLoss
from trainer.losses.triplet_sums import all_triplets, read_margin


class Pace(Protocol):
  """A function for the progress of a curriculum, from 0 at start to 1 at end."""

  def __call__(
    self, progress: tf.Tensor, step: tf.Tensor, active: WeightedMean
  ) -> tf.Tensor:
    """Returns the progress of the next step.

    Args:
      progress: [] float32, of the last step.
      step: [] int32, number of steps done.
      active: nonzero terms and all terms of the last step, over all replicas.
    """


@gin.register
class LinearPace(KerasSerializable):
  """Linear progress from 0 to 1.

  Args:
    first_step: progress is 0 up to this step, >= 0.
    last_step: progress is 1 from this step on; above first_step.

  Raises:
    UserError: the steps are not in that order.
  """

  def __init__(self, *, first_step: int, last_step: int):
    if not 0 <= first_step < last_step:
      raise UserError(
        f"LinearPace goes from first_step={first_step} to last_step={last_step}; the "
        "first must be at least 0, and below the last."
      )
    self._first_step = first_step
    self._last_step = last_step

  def __call__(
    self, progress: tf.Tensor, step: tf.Tensor, active: WeightedMean
  ) -> tf.Tensor:
    """Returns the progress, which depends on the step alone; see `Pace`."""
    del progress, active
    done = tf.cast(step - self._first_step, tf.float32)
    done /= self._last_step - self._first_step
    return tf.clip_by_value(done, 0.0, 1.0)


@gin.register
class AdaptivePace(KerasSerializable):
  """Raises the progress if too few terms are active, and lowers it if too many are.

  Few active terms are starvation: the pairs compared are learned, and harder pairs are
  more useful. If nearly all terms are active nothing is learned, as in a collapse,
  where all distances are equal. Easier pairs, which are more numerous, lead out of it.

  Args:
    lowest: fraction of active terms below which the progress increases.
    highest: fraction above which the progress decreases.
    change: change of the progress per step; its inverse is the number of steps from 0
      to 1.

  Raises:
    UserError: an argument is out of its range.
  """

  def __init__(
    self, *, lowest: float = 0.2, highest: float = 0.9, change: float = 0.002
  ):
    if not 0 <= lowest < highest <= 1 or not 0 < change <= 1:
      raise UserError(
        f"AdaptivePace needs 0 <= lowest < highest <= 1 and 0 < change <= 1, not "
        f"lowest={lowest}, highest={highest}, change={change}."
      )
    self._lowest = lowest
    self._highest = highest
    self._change = change

  def __call__(
    self, progress: tf.Tensor, step: tf.Tensor, active: WeightedMean
  ) -> tf.Tensor:
    """Returns the next progress; unchanged if there was no term. See `Pace`."""
    del step
    share = active.total / tf.maximum(active.count, 1.0)
    is_starving = tf.logical_and(active.count > 0.0, share < self._lowest)
    change = tf.where(is_starving, self._change, 0.0)
    change = tf.where(share > self._highest, -self._change, change)
    return tf.clip_by_value(progress + change, 0.0, 1.0)


# A constant, or the first and the last value.
ConstantOrRange = Union[float, Sequence[float]]


@gin.register
class CurriculumTripletLoss(BatchAllTripletLoss):
  """The mean of max(d_ap − d_an + margin, 0) over the harder triplets of each anchor.

  With hardness h, an anchor's positives count if their distance is at least max − (1 −
  h)(max − min) of the positives' distances. Its negatives count up to min + (1 − h)(max
  − min) of the negatives' distances. h = 0 is `BatchAllTripletLoss`. h = 1 has one
  triplet per anchor, the hardest, as `BatchHardTripletLoss` with the reduction of this
  loss.

  A pace sets the progress of hardness and margin. The progress is part of the
  checkpoint, and logged as `curriculum/hardness` and `curriculum/margin`.
  """

  def __init__(
    self,
    *,
    margin: ConstantOrRange,
    hardness: ConstantOrRange = (0.0, 1.0),
    pace: Optional[Pace] = None,
    distance: str = "euclidean",
    reduction: Optional[str] = None,
    rows_per_tile: Optional[int] = None,
  ):
    """Initializes the curriculum at its start.

    Args:
      margin: above 0, in the distance's units; a constant, or first and last value.
      hardness: h, from 0 to 1; a constant, or first and last value.
      pace: sets the progress; None if both are constant.
      distance: one of `trainer.losses.distances.DISTANCES`.
      reduction: as in `BatchAllTripletLoss`.
      rows_per_tile: anchors at a time; None to choose by size.

    Raises:
      UserError: an argument is out of its range, a range has no pace, or a pace has no
        range.
    """
    margins = tuple(_fixed(each) for each in _range_of("margin", margin))
    self._hardness = _range_of("hardness", hardness)
    if not all(0 <= each <= 1 for each in self._hardness):
      raise UserError(
        f"CurriculumTripletLoss.hardness={hardness} must be in 0 to 1: 0 for all "
        "triplets, 1 for the hardest."
      )
    is_fixed = len({*margins}) == len({*self._hardness}) == 1
    if is_fixed != (pace is None):
      raise UserError(
        f"CurriculumTripletLoss has margin={margin} and hardness={hardness}, with "
        + (
          "a pace, but both are constant; remove it."
          if is_fixed
          else "no pace; set one."
        )
      )
    super().__init__(
      margin=margins[0],
      distance=distance,
      reduction=reduction,
      rows_per_tile=rows_per_tile,
    )
    self._margin = margins
    self._pace = pace
    # Each replica computes its own equal copy: no communication is needed.
    self._progress = tf.Variable(
      0.0,
      trainable=False,
      name="progress",
      synchronization=tf.VariableSynchronization.ON_READ,
      aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )

  @property
  def margin(self) -> tf.Tensor:
    """Margin of this step, [] float32."""
    return self.parameters()[1]

  def parameters(self) -> list[tf.Tensor]:
    """Returns hardness and margin of this step, [] float32 each."""
    progress = tf.convert_to_tensor(self._progress)
    return [
      first + progress * (last - first)
      for first, last in (self._hardness, self._margin)
    ]

  def advance(self, step: tf.Tensor, active: WeightedMean) -> None:
    """Updates the progress; must be called on each replica after each step.

    Args:
      step: [] int32, number of steps done.
      active: nonzero terms and all terms of the global batch.
    """
    if self._pace is not None:
      progress = tf.convert_to_tensor(self._progress)
      self._progress.assign(self._pace(progress, step, active))

  def check_is_complete(self) -> None:
    """Checks that there is no pace, because only training in this package calls it.

    Raises:
      UserError: the loss has a pace.
    """
    if self._pace is not None:
      raise UserError(
        f"CurriculumTripletLoss has a pace, {type(self._pace).__name__}, which only a "
        "training by `TrainStep` calls after each step; give no pace, and one number "
        "each for margin and hardness."
      )

  def terms(self, anchors: Anchors, candidates: Candidates) -> LossOutput:
    """Computes this replica's sum, count and statistics; see the base class."""
    terms = super().terms(anchors, candidates)
    values = zip(("hardness", "margin"), self.parameters())
    found = {
      f"curriculum/{name}": WeightedMean(value, tf.ones([])) for name, value in values
    }
    return terms._replace(statistics={**terms.statistics, **found})

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes the harder triplets of each anchor; see the base class."""
    hardness, margin = map(tf.stop_gradient, parameters)
    is_positive = _highest(compared, pairs.is_positive, hardness)
    is_negative = _highest(-compared, pairs.is_negative, hardness)
    # The lists contain all positives: those that don't count get distance −∞.
    counted = tf.where(is_positive | ~pairs.is_positive, compared, -float("inf"))
    kept = PairMasks(is_positive, is_negative, pairs.lists)
    total, num_active = all_triplets(counted, kept, margin)
    return AnchorTerms(
      total, num_active, num_members(is_positive) * num_members(is_negative)
    )


def _highest(values: tf.Tensor, is_member: tf.Tensor, hardness: tf.Tensor) -> tf.Tensor:
  """Returns [T, C] bool, members within (1 − h)(max − min) of the row's highest."""
  infinity = float("inf")
  highest = tf.reduce_max(tf.where(is_member, values, -infinity), 1, keepdims=True)
  lowest = tf.reduce_min(tf.where(is_member, values, infinity), 1, keepdims=True)
  reach = (1.0 - hardness) * (highest - lowest)
  return tf.logical_and(is_member, highest - values <= reach)


def _fixed(margin: float) -> float:
  """Checks that a margin is a number and no variable: only a pace changes it."""
  margin = read_margin(margin)
  if not isinstance(margin, float):
    raise UserError(
      f"CurriculumTripletLoss.margin={margin} is not a number; give one, or two with a "
      "pace."
    )
  return margin


def _range_of(name: str, value: ConstantOrRange) -> tuple[float, float]:
  """Returns the first and the last value."""
  ends = tuple(value) if isinstance(value, Sequence) else (value, value)
  if len(ends) != 2:
    raise UserError(
      f"CurriculumTripletLoss.{name}={value} must be a number, or first and last value."
    )
  return ends
