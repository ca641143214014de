"""Losses mined inside the batch: pure functions of tensors, without a strategy."""

from trainer.losses.distances import pairwise_distances
from trainer.losses.drop_in import batch_all_triplet_loss, batch_hard_triplet_loss
from trainer.losses.selection import DistanceWeightedNegatives
from trainer.losses.triplet import BatchAllTripletLoss, BatchHardTripletLoss
from trainer.losses.triplet_choices import (
  InsideMarginTripletLoss,
  SemiHardTripletLoss,
  TripletLoss,
)

__all__ = [
  "BatchAllTripletLoss",
  "BatchHardTripletLoss",
  "DistanceWeightedNegatives",
  "InsideMarginTripletLoss",
  "SemiHardTripletLoss",
  "TripletLoss",
  "batch_all_triplet_loss",
  "batch_hard_triplet_loss",
  "pairwise_distances",
]
