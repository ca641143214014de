"""Triplet losses that give the values of a reference; where they differ is stated."""

from __future__ import annotations

import gin

from trainer.losses.triplet import BatchAllTripletLoss, BatchHardTripletLoss
from trainer.losses.triplet_choices import (
  InsideMarginTripletLoss,
  SemiHardTripletLoss,
  TripletLoss,
)


@gin.register
def seed_batch_all(*, margin: float) -> BatchAllTripletLoss:
  """omoindrot/tensorflow-triplet-loss, `batch_all_triplet_loss`."""
  return BatchAllTripletLoss(margin=margin)


@gin.register
def seed_batch_hard(*, margin: float) -> BatchHardTripletLoss:
  """omoindrot/tensorflow-triplet-loss, `batch_hard_triplet_loss`; TFA's too."""
  return BatchHardTripletLoss(margin=margin)


@gin.register
def tfa_semi_hard(*, margin: float = 1.0) -> SemiHardTripletLoss:
  """TensorFlow Addons, `TripletSemiHardLoss`; 0 instead of NaN without a pair."""
  return SemiHardTripletLoss(margin=margin)


@gin.register
def hermans_batch_hard() -> TripletLoss:
  """Hermans et al. 2017, batch hard with the soft margin.

  An anchor without a positive adds 0 but counts; their code takes d_ap = 0 for it.
  """
  return TripletLoss(
    positives="hardest", negatives="hardest", margin="soft", reduction="mean_anchors"
  )


@gin.register
def pml_batch_all(*, margin: float = 0.05) -> BatchAllTripletLoss:
  """PyTorch Metric Learning, `TripletMarginLoss` without a miner."""
  return BatchAllTripletLoss(margin=margin, distance="normalized_euclidean")


@gin.register
def pml_batch_hard(*, margin: float = 0.05) -> TripletLoss:
  """PyTorch Metric Learning, `TripletMarginLoss` after `BatchHardMiner`."""
  return TripletLoss(
    positives="hardest",
    negatives="hardest",
    margin=margin,
    reduction="mean_active",
    distance="normalized_euclidean",
  )


@gin.register
def pml_semi_hard(*, margin: float = 0.05) -> InsideMarginTripletLoss:
  """PyTorch Metric Learning, `TripletMarginLoss` after a "semihard" miner."""
  return InsideMarginTripletLoss(margin=margin, distance="normalized_euclidean")
