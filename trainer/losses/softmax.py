"""Losses that classify positives among candidates by a softmax.

s is a similarity, τ the temperature.

Shapes: T anchors of a tile, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.distances import (
  PairwiseMetric,
  cosine_similarity,
  inner_product,
  squared_euclidean,
)
from trainer.losses.keras_loss import KerasSerializable
from trainer.losses.loss_terms import PairMasks
from trainer.losses.tiled_loss import (
  MIN_PAIRS_TO_COMPILE,
  AnchorTerms,
  TiledPairLoss,
  is_accelerated,
)

# Used as log 0: finite, so that gradients through it are 0 and not NaN.
LOG_ZERO = -1e30
# Smaller batches are not compiled, and each loop step would cost as much as a pass.
_MIN_PAIRS_OF_LISTS = MIN_PAIRS_TO_COMPILE
# Log of the smallest positive normal float32.
_LOG_OF_LEAST = math.log(2.0**-126)


def log_sum_exp(values: tf.Tensor, is_member: tf.Tensor) -> tf.Tensor:
  """Computes log Σ exp(value) over members, [T]; `LOG_ZERO` if there are none.

  Args:
    values: [T, C] float32.
    is_member: [T, C] bool.
  """
  masked = tf.where(is_member, values, LOG_ZERO)
  largest = tf.stop_gradient(tf.reduce_max(masked, 1, keepdims=True))
  # This avoids a pass of its own. NaN counts as a member.
  has_member = ~(largest[:, 0] <= LOG_ZERO)
  shares = tf.where(is_member, tf.exp(masked - largest), 0.0)
  total = tf.where(has_member, tf.reduce_sum(shares, 1), 1.0)
  return tf.where(has_member, tf.math.log(total) + largest[:, 0], LOG_ZERO)


def num_members(is_member: tf.Tensor) -> tf.Tensor:
  """Counts the members of each anchor, [T] float32."""
  return tf.reduce_sum(tf.cast(is_member, tf.float32), 1)


@gin.register
class LearnedTemperature(KerasSerializable, tf.Module):
  """A trained temperature, kept above 0 as the exponential of a variable.

  Args:
    initial: initial value, above 0.

  Raises:
    UserError: the initial value is not above 0.
  """

  def __init__(self, *, initial: float):
    check_temperature(initial)
    super().__init__()
    self._logarithm = tf.Variable(math.log(initial), name="log_temperature")

  def get_config(self) -> dict[str, Any]:
    """Returns the current temperature as the initial value of a copy."""
    return {"initial": float(self())}

  def __call__(self) -> tf.Tensor:
    """Returns the temperature, [] float32."""
    return tf.exp(self._logarithm)


Temperature = Union[float, LearnedTemperature]


def check_temperature(temperature: float) -> None:
  """Raises if a temperature is not above 0.

  Raises:
    UserError: the temperature is not above 0.
  """
  if not temperature > 0:
    raise UserError(
      f"temperature={temperature} is not above 0; give a temperature such as 0.1."
    )


def temperature_value(temperature: Temperature) -> tf.Tensor:
  """Returns the temperature, [] float32."""
  if isinstance(temperature, LearnedTemperature):
    return temperature()
  return tf.constant(temperature, tf.float32)


class _SoftmaxLoss(TiledPairLoss):
  """Base of the losses with a temperature."""

  def __init__(
    self,
    *,
    temperature: Temperature,
    comparison: PairwiseMetric,
    rows_per_tile: Optional[int],
  ):
    if not isinstance(temperature, LearnedTemperature):
      check_temperature(temperature)
    super().__init__(
      comparison=comparison, reduction="mean_terms", rows_per_tile=rows_per_tile
    )
    self._temperature = temperature

  def check_is_complete(self) -> None:
    """Checks that the temperature is a number: Keras trains only a model's variables.

    Raises:
      UserError: the temperature is learned.
    """
    if isinstance(self._temperature, LearnedTemperature):
      raise UserError(
        f"{type(self).__name__} has a LearnedTemperature, which `TrainStep` trains and "
        "Keras does not; give a number, such as temperature=0.1."
      )

  def parameters(self) -> list[tf.Tensor]:
    """Returns the temperature if learned; else its gradient would be a wasted pass."""
    is_learned = isinstance(self._temperature, LearnedTemperature)
    return [temperature_value(self._temperature)] if is_learned else []

  def _temperature_of(self, parameters: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the temperature inside a tile."""
    return parameters[0] if parameters else temperature_value(self._temperature)


@gin.register
class InfoNCELoss(_SoftmaxLoss):
  """The mean over positive pairs of −log(e^{s_ap/τ} / (e^{s_ap/τ} + Σ_n e^{s_an/τ})).

  s is the cosine similarity. A pair is contrasted with the anchor's negatives only, not
  with its other positives. With two views per example this is NT-Xent.

  Args:
    temperature: τ above 0, or `LearnedTemperature`.
    rows_per_tile: anchors at a time; None to choose by size.

  Source: van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; Chen et al. 2020,
  https://arxiv.org/abs/2002.05709.
  """

  uses_lists = True

  def __init__(self, *, temperature: Temperature, rows_per_tile: Optional[int] = None):
    super().__init__(
      temperature=temperature,
      comparison=cosine_similarity,
      rows_per_tile=rows_per_tile,
    )

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one term per positive pair; see the base class."""
    logits = compared / self._temperature_of(parameters)
    return positives_against_negatives(logits, pairs)


@gin.register
class NPairsLoss(TiledPairLoss):
  """The mean over positive pairs of log(1 + Σ_n e^{⟨a, n⟩ − ⟨a, p⟩}).

  The L2 penalty of the embeddings in the paper is left to the model.

  Args:
    rows_per_tile: anchors at a time; None to choose by size.

  Source: Sohn 2016, Improved Deep Metric Learning with Multi-class N-pair Loss
  Objective (NIPS).
  """

  uses_lists = True

  def __init__(self, *, rows_per_tile: Optional[int] = None):
    super().__init__(
      comparison=inner_product, reduction="mean_terms", rows_per_tile=rows_per_tile
    )

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one term per positive pair; see the base class."""
    return positives_against_negatives(compared, pairs)


@gin.register
class SupervisedContrastiveLoss(_SoftmaxLoss):
  """The mean over anchors of −1/P Σ_p log(e^{s_ap/τ} / Σ_{k≠a} e^{s_ak/τ}).

  s is the cosine similarity. The mean is over anchors with a positive (L_out of the
  paper, without its factor of τ).

  Args:
    temperature: τ above 0, or `LearnedTemperature`.
    rows_per_tile: anchors at a time; None to choose by size.

  Source: Khosla et al. 2020, https://arxiv.org/abs/2004.11362.
  """

  def __init__(self, *, temperature: Temperature, rows_per_tile: Optional[int] = None):
    super().__init__(
      temperature=temperature,
      comparison=cosine_similarity,
      rows_per_tile=rows_per_tile,
    )

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one term per anchor; see the base class."""
    logits = compared / self._temperature_of(parameters)
    everyone = log_sum_exp(logits, pairs.is_either)
    own = tf.reduce_sum(tf.where(pairs.is_positive, logits, 0.0), 1)
    num_positives = num_members(pairs.is_positive)
    mean = tf.math.divide_no_nan(own, num_positives)
    return _of_anchors(everyone - mean, num_positives > 0.0)


@gin.register
class SoftNearestNeighbourLoss(_SoftmaxLoss):
  """The mean over anchors of −log(Σ_p e^{−d²_ap/τ} / Σ_{k≠a} e^{−d²_ak/τ}).

  d is the Euclidean distance, and the mean is over anchors with a positive.

  Args:
    temperature: τ above 0, or `LearnedTemperature`.
    rows_per_tile: anchors at a time; None to choose by size.

  Source: Frosst et al. 2019, https://arxiv.org/abs/1902.01889.
  """

  def __init__(self, *, temperature: Temperature, rows_per_tile: Optional[int] = None):
    super().__init__(
      temperature=temperature,
      comparison=squared_euclidean,
      rows_per_tile=rows_per_tile,
    )

  def anchor_terms(
    self, compared: tf.Tensor, pairs: PairMasks, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """Computes one term per anchor; see the base class."""
    logits = -compared / self._temperature_of(parameters)
    positive = log_sum_exp(logits, pairs.is_positive)
    negative = log_sum_exp(logits, pairs.is_negative)
    has_positive = num_members(pairs.is_positive) > 0.0
    return _of_anchors(tf.nn.softplus(negative - positive), has_positive)


def positives_against_negatives(logits: tf.Tensor, pairs: PairMasks) -> AnchorTerms:
  """Computes Σ_p log(1 + Σ_n exp(logit_n − logit_p)) of each anchor.

  Each positive has one term.

  Args:
    logits: [T, C] float32.
    pairs: masks of positives and negatives. With lists of the positives, a CPU loops
      over them in large batches, which saves passes over all pairs.
  """
  lists, num_pairs = pairs.lists, logits.shape.num_elements() or 0
  if lists is None or num_pairs < _MIN_PAIRS_OF_LISTS or is_accelerated():
    by, num_terms = _by_pairs, num_members(pairs.is_positive)
  else:
    by, num_terms = _by_lists, tf.cast(lists.sizes, tf.float32)

  @tf.custom_gradient
  def sums(logits: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], Callable]:
    negative = log_sum_exp(logits, pairs.is_negative)
    total, num_active, pull = by(logits, negative, pairs)

    def gradient(upstream: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
      # Each negative's share of all negatives, and a positive's share relative to them.
      ratios = tf.exp(logits - negative[:, None])
      of_positives = tf.where(pairs.is_positive, -1.0 / (1.0 + ratios), 0.0)
      slope = tf.where(pairs.is_negative, pull[:, None] * ratios, of_positives)
      return upstream[:, None] * slope

    return (total, num_active), gradient

  total, num_active = sums(logits)
  return AnchorTerms(total, num_active, num_terms)


def _by_pairs(
  logits: tf.Tensor, negative: tf.Tensor, pairs: PairMasks
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Returns sum of the terms, number above 0, and sum of their slopes, [T] each."""
  costs, is_active, slopes = _terms(negative[:, None] - logits, pairs.is_positive)
  total, pull = (tf.reduce_sum(each, 1) for each in (costs, slopes))
  return total, num_members(is_active), pull


def _by_lists(
  logits: tf.Tensor, negative: tf.Tensor, pairs: PairMasks
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Returns the same, looping over the k-th positive of all anchors."""
  lists = pairs.lists
  assert lists is not None

  def body(k, total, num_active, pull):  # type: ignore[no-untyped-def]
    places, is_positive = lists.places(k)
    excess = negative - tf.gather_nd(logits, places)
    costs, is_active, slopes = _terms(excess, is_positive)
    is_active = tf.cast(is_active, tf.float32)
    return k + 1, total + costs, num_active + is_active, pull + slopes

  zeros = tf.zeros_like(negative)
  _, *sums = tf.while_loop(
    lambda k, *_: k < tf.reduce_max(lists.sizes),
    body,
    (tf.constant(0), zeros, zeros, zeros),
  )
  return tuple(sums)


def _terms(
  excess: tf.Tensor, is_positive: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Returns term, whether it is above 0, and slope of positives; 0 for others."""
  costs = tf.where(is_positive, tf.nn.softplus(excess), 0.0)
  # Equals costs > 0, except for denormal ones, without an exponential per pair.
  is_active = tf.logical_and(is_positive, excess > _LOG_OF_LEAST)
  return costs, is_active, tf.where(is_positive, tf.nn.sigmoid(excess), 0.0)


def _of_anchors(costs: tf.Tensor, is_counted: tf.Tensor) -> AnchorTerms:
  costs = tf.where(is_counted, costs, 0.0)
  return AnchorTerms(
    costs, tf.cast(costs > 0.0, tf.float32), tf.cast(is_counted, tf.float32)
  )
