"""Losses with the values of a reference implementation, and drop-in functions.

On a GPU call tf.config.experimental.enable_tensor_float_32_execution(False) first, as
training in this package does: with TensorFloat-32, distances are accurate to a
hundredth only.

The references of losses against class centres differ in three points. Whether the
gradient passes through the arc cosine: in insightface it does not, which is
"straight_through". How angles beyond π − m are treated: PyTorch Metric Learning
continues along a line, insightface does not treat them. What a class that is filtered
out keeps: in insightface, a logit of 0.

Shapes: B embeddings of one device, L labels, D dimensions.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Optional

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.centre_losses import (
  ArcFaceLoss,
  ArcOptions,
  CombinedMarginLoss,
  CosFaceLoss,
  NormFaceLoss,
)
from trainer.losses.centre_products import ClassFilter
from trainer.losses.class_centres import ClassCentres
from trainer.losses.keras_loss import InBatchLoss, mean_of_batch, terms_of_batch
from trainer.losses.labels import INTEGER
from trainer.losses.proxy_losses import ProxyAnchorLoss, SoftTripleLoss
from trainer.losses.triplet import (
  BatchAllTripletLoss,
  BatchHardTripletLoss,
  InsideMarginTripletLoss,
  SemiHardTripletLoss,
  TripletLoss,
)
from trainer.losses.triplet_sums import Margin, read_margin

_INSIGHTFACE_ARC = ArcOptions(beyond_pi="none", gradient="straight_through")


@gin.register
def omoindrot_batch_all(*, margin: float) -> BatchAllTripletLoss:
  """Returns `batch_all_triplet_loss` of omoindrot/tensorflow-triplet-loss."""
  return BatchAllTripletLoss(margin=margin)


@gin.register
def omoindrot_batch_hard(*, margin: float) -> BatchHardTripletLoss:
  """Returns `batch_hard_triplet_loss` of omoindrot/tensorflow-triplet-loss.

  TensorFlow Addons' loss of that name has the same values.
  """
  return BatchHardTripletLoss(margin=margin)


@gin.register
def tfa_semi_hard(*, margin: float = 1.0) -> SemiHardTripletLoss:
  """Returns TensorFlow Addons' `TripletSemiHardLoss`; 0, not NaN, without a pair."""
  return SemiHardTripletLoss(margin=margin)


@gin.register
def hermans_batch_hard() -> TripletLoss:
  """Returns batch hard with the soft margin, as Hermans et al. 2017.

  An anchor without a positive adds 0 but counts; their code uses d_ap = 0 for it.
  """
  return TripletLoss(
    positives="hardest", negatives="hardest", margin="soft", reduction="mean_anchors"
  )


@gin.register
def pml_batch_all(*, margin: float = 0.05) -> BatchAllTripletLoss:
  """Returns PyTorch Metric Learning's `TripletMarginLoss` without a miner."""
  return BatchAllTripletLoss(margin=margin, distance="normalized_euclidean")


@gin.register
def pml_batch_hard(*, margin: float = 0.05) -> TripletLoss:
  """Returns PyTorch Metric Learning's `TripletMarginLoss` with `BatchHardMiner`."""
  return TripletLoss(
    positives="hardest",
    negatives="hardest",
    margin=margin,
    reduction="mean_active",
    distance="normalized_euclidean",
  )


@gin.register
def pml_semi_hard(*, margin: float = 0.05) -> InsideMarginTripletLoss:
  """Returns PyTorch Metric Learning's `TripletMarginLoss` with a "semihard" miner."""
  return InsideMarginTripletLoss(margin=margin, distance="normalized_euclidean")


class LossAndFraction(NamedTuple):
  """Result of `batch_all_triplet_loss`; for Keras use `[0]`.

  Attributes:
    loss: [] float32.
    fraction_positive: [] float32.
  """

  loss: tf.Tensor
  fraction_positive: tf.Tensor


def _refuse_tensor(value: LossAndFraction, **_: Any) -> tf.Tensor:
  """Raises, because Keras would use the mean of the two as the loss."""
  del value
  raise UserError(
    "batch_all_triplet_loss returns the loss and a fraction; give Keras the first "
    "alone, batch_all_triplet_loss(...)[0], or use BatchAllTripletLoss(margin=0.2)."
  )


# Precedes the conversion of tuples, which has priority 100.
tf.register_tensor_conversion_function(LossAndFraction, _refuse_tensor, priority=50)


@tf.autograph.experimental.do_not_convert
def batch_all_triplet_loss(
  labels: tf.Tensor,
  embeddings: tf.Tensor,
  margin: Margin,
  squared: bool = False,
  *,
  label_encoding: str = INTEGER,
) -> LossAndFraction:
  """Computes the mean of max(d_ap − d_an + margin, 0) over triplets above 0.

  Args:
    labels: [B] or [B, 1], integers, whole floats or strings; [B, L] with another
      encoding.
    embeddings: [B, D] float.
    margin: above 0, in the distances' units; a variable is read at each call and has no
      gradient.
    squared: whether to use squared instead of Euclidean distances.
    label_encoding: "integer", "one_hot", or "multi_hot" for several labels per example,
      where examples with a common label are positives.

  Returns:
    [] float32 loss, and [] float32 fraction of the valid triplets that are above 0;
    both 0 if there is none.

  Raises:
    UserError: the margin is not above 0; labels are not one per embedding, or not in
      the encoding; embeddings are not [B, D].
  """
  loss = _loss(BatchAllTripletLoss, margin, squared)
  terms = terms_of_batch(loss, labels, embeddings, label_encoding=label_encoding)
  active = terms.statistics["mining/active_fraction"]
  return LossAndFraction(
    tf.math.divide_no_nan(terms.total, terms.count),
    tf.math.divide_no_nan(active.total, active.count),
  )


@tf.autograph.experimental.do_not_convert
def batch_hard_triplet_loss(
  labels: tf.Tensor,
  embeddings: tf.Tensor,
  margin: Margin,
  squared: bool = False,
  *,
  label_encoding: str = INTEGER,
) -> tf.Tensor:
  """Computes the mean over anchors of max(hardest d_ap − hardest d_an + margin, 0).

  An anchor without a positive counts with d_ap = 0. The loss of a batch of one class is
  the margin, with gradient 0.

  Args:
    labels: [B] or [B, 1], integers, whole floats or strings; [B, L] with another
      encoding.
    embeddings: [B, D] float.
    margin: above 0, in the distances' units; a variable is read at each call and has no
      gradient.
    squared: whether to use squared instead of Euclidean distances.
    label_encoding: "integer", "one_hot", or "multi_hot" for several labels per example,
      where examples with a common label are positives.

  Returns:
    [] float32.

  Raises:
    UserError: the margin is not above 0; labels are not one per embedding, or not in
      the encoding; embeddings are not [B, D].
  """
  loss = _loss(BatchHardTripletLoss, margin, squared)
  return mean_of_batch(loss, labels, embeddings, label_encoding=label_encoding)


def _loss(loss_class: type, margin: Margin, squared: bool) -> InBatchLoss:
  """Returns the loss, cached if possible, because each new one is compiled again."""
  margin = read_margin(margin)
  distance = "squared_euclidean" if squared else "euclidean"
  if isinstance(margin, float):
    return _kept_loss(loss_class, margin, distance)
  if isinstance(margin, tf.Variable):
    return _kept_loss_of_variable(loss_class, margin.ref(), distance)
  return loss_class(margin=margin, distance=distance)


@functools.lru_cache(maxsize=64)
def _kept_loss(loss_class: type, margin: float, distance: str) -> InBatchLoss:
  return loss_class(margin=margin, distance=distance)


@functools.lru_cache(maxsize=64)
def _kept_loss_of_variable(loss_class: type, margin: Any, distance: str) -> InBatchLoss:
  return loss_class(margin=margin.deref(), distance=distance)


@gin.register
def insightface_arcface(
  *, centres: ClassCentres, margin: float = 0.5, scale: float = 64.0
) -> ArcFaceLoss:
  """Returns `ArcFace` of insightface's PyTorch package."""
  return ArcFaceLoss(centres=centres, margin=margin, scale=scale, arc=_INSIGHTFACE_ARC)


@gin.register
def insightface_cosface(
  *, centres: ClassCentres, margin: float = 0.4, scale: float = 64.0
) -> CosFaceLoss:
  """Returns `CosFace` of insightface's PyTorch package."""
  return CosFaceLoss(centres=centres, margin=margin, scale=scale)


@gin.register
def insightface_combined(
  *,
  centres: ClassCentres,
  angle_margin: float = 0.5,
  cosine_margin: float = 0.0,
  scale: float = 64.0,
  ignored_above: Optional[float] = None,
) -> CombinedMarginLoss:
  """Returns `CombinedMarginLoss` of insightface's PyTorch package.

  Args:
    centres: the class centres.
    angle_margin: its m2, in radians.
    cosine_margin: its m3. The reference ignores m2 if m3 is above 0.
    scale: its s.
    ignored_above: its `interclass_filtering_threshold`; None for its 0.

  Raises:
    UserError: both margins are above 0, or one is out of its range.
  """
  if angle_margin and cosine_margin:
    raise UserError(
      f"insightface_combined has angle_margin={angle_margin} and cosine_margin="
      f"{cosine_margin}; insightface uses one of them, so set the other to 0."
    )
  class_filter = None
  if ignored_above is not None:
    class_filter = ClassFilter(ignored_above, keeps_zero=True)
  return CombinedMarginLoss(
    centres=centres,
    angle_margin=angle_margin,
    cosine_margin=cosine_margin,
    scale=scale,
    arc=_INSIGHTFACE_ARC,
    class_filter=class_filter,
  )


@gin.register
def pml_arcface(
  *, centres: ClassCentres, margin_degrees: float = 28.6, scale: float = 64.0
) -> ArcFaceLoss:
  """Returns PyTorch Metric Learning's `ArcFaceLoss` or `SubCenterArcFaceLoss`."""
  return ArcFaceLoss(centres=centres, margin=math.radians(margin_degrees), scale=scale)


@gin.register
def pml_cosface(
  *, centres: ClassCentres, margin: float = 0.35, scale: float = 64.0
) -> CosFaceLoss:
  """Returns PyTorch Metric Learning's `CosFaceLoss`."""
  return CosFaceLoss(centres=centres, margin=margin, scale=scale)


@gin.register
def pml_norm_face(*, centres: ClassCentres, temperature: float = 0.05) -> NormFaceLoss:
  """Returns PyTorch Metric Learning's `NormalizedSoftmaxLoss`.

  Args:
    centres: the class centres.
    temperature: above 0.

  Raises:
    UserError: the temperature is not above 0.
  """
  _check_temperature("pml_norm_face", temperature)
  return NormFaceLoss(centres=centres, scale=1 / temperature)


@gin.register
def pml_proxy_anchor(
  *, centres: ClassCentres, margin: float = 0.1, alpha: float = 32.0
) -> ProxyAnchorLoss:
  """Returns PyTorch Metric Learning's `ProxyAnchorLoss`."""
  return ProxyAnchorLoss(centres=centres, scale=alpha, margin=margin)


@gin.register
def pml_soft_triple(*, centres: ClassCentres) -> SoftTripleLoss:
  """Returns PyTorch Metric Learning's `SoftTripleLoss`, which has no regulariser."""
  return SoftTripleLoss(centres=centres, regularization=0.0)


@gin.register
def proxy_nca_plus_plus(
  *, centres: ClassCentres, temperature: float = 1 / 9
) -> NormFaceLoss:
  """Returns Proxy-NCA++: a softmax over −d²/T of unit vectors, where d² = 2 − 2c.

  Source: Teh et al. 2020, https://arxiv.org/abs/2004.01113.

  Args:
    centres: the class centres, the paper's proxies.
    temperature: T > 0.

  Raises:
    UserError: the temperature is not above 0.
  """
  _check_temperature("proxy_nca_plus_plus", temperature)
  return NormFaceLoss(centres=centres, scale=2 / temperature)


def _check_temperature(name: str, temperature: float) -> None:
  if not 0 < temperature < math.inf:
    raise UserError(f"{name}.temperature={temperature} is not above 0; try 0.05.")
