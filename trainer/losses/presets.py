"""Losses with the values of a reference implementation, and drop-in functions.

On a GPU call tf.config.experimental.enable_tensor_float_32_execution(False) first, as
training in this package does: with TensorFloat-32, distances are accurate to a
hundredth only.

Shapes: B embeddings of one device, L labels, D dimensions.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.losses.keras_loss import InBatchLoss, mean_of_batch, terms_of_batch
from trainer.losses.labels import INTEGER
from trainer.losses.triplet import (
  BatchAllTripletLoss,
  BatchHardTripletLoss,
  InsideMarginTripletLoss,
  SemiHardTripletLoss,
  TripletLoss,
)
from trainer.losses.triplet_sums import Margin, read_margin


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
