"""Losses that classify positives among candidates by a softmax of similarities.

Shapes: T anchors of a tile, C candidates. s is a similarity, τ the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import gin
import tensorflow as tf

from trainer.losses.anchorwise import AnchorTerms, AnchorwiseLoss
from trainer.losses.distances import (
  Comparison,
  cosine_similarity,
  inner_product,
  squared_euclidean,
)
from trainer.losses.masked import log_sum_exp, num_members
from trainer.losses.relevance import Relevance
from trainer.losses.temperature import (
  LearnedTemperature,
  Temperature,
  check_temperature,
  value_of,
)

# Of the least positive float32 that is not denormal.
_LOG_OF_LEAST = math.log(2.0**-126)


class _SoftmaxLoss(AnchorwiseLoss):
  """Base of the losses with a temperature."""

  def __init__(
    self,
    *,
    temperature: Temperature,
    comparison: Comparison,
    rows_per_tile: Optional[int],
  ):
    if not isinstance(temperature, LearnedTemperature):
      check_temperature(temperature)
    super().__init__(
      comparison=comparison, reduction="mean_terms", rows_per_tile=rows_per_tile
    )
    self._temperature = temperature

  def parameters(self) -> list[tf.Tensor]:
    """The temperature."""
    return [value_of(self._temperature)]


@gin.register
class InfoNCELoss(_SoftmaxLoss):
  """The mean over positive pairs of −log(e^{s_ap/τ} / (e^{s_ap/τ} + Σ_n e^{s_an/τ})).

  s is the cosine similarity. A pair is told from the anchor's negatives alone, not
  from its other positives; with two views an example this is NT-Xent.

  Args:
    temperature: τ above 0, or `LearnedTemperature`.
    rows_per_tile: anchors at a time; None to choose by size.

  Source: van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; Chen et al. 2020,
  https://arxiv.org/abs/2002.05709.
  """

  def __init__(self, *, temperature: Temperature, rows_per_tile: Optional[int] = None):
    super().__init__(
      temperature=temperature,
      comparison=cosine_similarity,
      rows_per_tile=rows_per_tile,
    )

  def anchor_terms(
    self, compared: tf.Tensor, pairs: Relevance, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """One term a positive pair; see the base class."""
    (temperature,) = parameters
    return positives_against_negatives(compared / temperature, pairs)


@gin.register
class NPairsLoss(AnchorwiseLoss):
  """The mean over positive pairs of log(1 + Σ_n e^{⟨a, n⟩ − ⟨a, p⟩}).

  The paper adds an L2 penalty of the embeddings, which is left to the model here.

  Args:
    rows_per_tile: anchors at a time; None to choose by size.

  Source: Sohn 2016, Improved Deep Metric Learning with Multi-class N-pair Loss
  Objective (NIPS).
  """

  def __init__(self, *, rows_per_tile: Optional[int] = None):
    super().__init__(
      comparison=inner_product, reduction="mean_terms", rows_per_tile=rows_per_tile
    )

  def anchor_terms(
    self, compared: tf.Tensor, pairs: Relevance, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """One term a positive pair; see the base class."""
    return positives_against_negatives(compared, pairs)


@gin.register
class SupervisedContrastiveLoss(_SoftmaxLoss):
  """The mean over anchors of −1/P Σ_p log(e^{s_ap/τ} / Σ_{k≠a} e^{s_ak/τ}).

  s is the cosine similarity, and the mean is over anchors with a positive (L_out of
  the paper, without its factor of τ).

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
    self, compared: tf.Tensor, pairs: Relevance, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """One term an anchor; see the base class."""
    (temperature,) = parameters
    logits = compared / temperature
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
    self, compared: tf.Tensor, pairs: Relevance, parameters: Sequence[tf.Tensor]
  ) -> AnchorTerms:
    """One term an anchor; see the base class."""
    (temperature,) = parameters
    logits = -compared / temperature
    positive = log_sum_exp(logits, pairs.is_positive)
    negative = log_sum_exp(logits, pairs.is_negative)
    has_positive = num_members(pairs.is_positive) > 0.0
    return _of_anchors(tf.nn.softplus(negative - positive), has_positive)


def positives_against_negatives(logits: tf.Tensor, pairs: Relevance) -> AnchorTerms:
  """Σ_p log(1 + Σ_n exp(logit_n − logit_p)) of each anchor, a term for each positive.

  Args:
    logits: [T, C] float32.
    pairs: which are of positives and which of negatives.
  """
  excess = log_sum_exp(logits, pairs.is_negative)[:, None] - logits
  costs = tf.where(pairs.is_positive, tf.nn.softplus(excess), 0.0)
  # As costs > 0, but for denormal ones, without an exponential function of each pair.
  is_active = tf.logical_and(pairs.is_positive, excess > _LOG_OF_LEAST)
  return AnchorTerms(
    tf.reduce_sum(costs, 1), num_members(is_active), num_members(pairs.is_positive)
  )


def _of_anchors(costs: tf.Tensor, is_counted: tf.Tensor) -> AnchorTerms:
  costs = tf.where(is_counted, costs, 0.0)
  return AnchorTerms(
    costs, tf.cast(costs > 0.0, tf.float32), tf.cast(is_counted, tf.float32)
  )
