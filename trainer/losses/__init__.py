"""Losses mined inside the batch: pure functions of tensors, without a strategy."""

from trainer.losses.distances import pairwise_distances
from trainer.losses.drop_in import batch_all_triplet_loss, batch_hard_triplet_loss
from trainer.losses.triplet import BatchAllTripletLoss, BatchHardTripletLoss

__all__ = [
  "BatchAllTripletLoss",
  "BatchHardTripletLoss",
  "batch_all_triplet_loss",
  "batch_hard_triplet_loss",
  "pairwise_distances",
]
