"""Losses with in-batch mining: pure functions of tensors, independent of strategies."""

from trainer.losses.centre_losses import (
  ArcFaceLoss,
  CombinedMarginLoss,
  CosFaceLoss,
  NormFaceLoss,
)
from trainer.losses.class_centres import ClassCentres
from trainer.losses.curriculum import AdaptivePace, CurriculumTripletLoss, LinearPace
from trainer.losses.distances import pairwise_distances
from trainer.losses.jitter import JitteredLoss
from trainer.losses.keras_loss import KerasLoss
from trainer.losses.mining_statistics import MiningStatistics
from trainer.losses.pairs import (
  CircleLoss,
  ContrastiveLoss,
  LiftedStructureLoss,
  MultiSimilarityLoss,
)
from trainer.losses.presets import (
  batch_all_triplet_loss,
  batch_hard_triplet_loss,
  hermans_batch_hard,
  omoindrot_batch_all,
  omoindrot_batch_hard,
  pml_batch_all,
  pml_batch_hard,
  pml_semi_hard,
  tfa_semi_hard,
)
from trainer.losses.selection import DistanceWeightedNegatives
from trainer.losses.softmax import (
  InfoNCELoss,
  LearnedTemperature,
  NPairsLoss,
  SoftNearestNeighbourLoss,
  SupervisedContrastiveLoss,
)
from trainer.losses.sum_of_losses import SumOfLosses
from trainer.losses.triplet import (
  BatchAllTripletLoss,
  BatchHardTripletLoss,
  InsideMarginTripletLoss,
  SemiHardTripletLoss,
  TripletLoss,
)

__all__ = [
  "AdaptivePace",
  "ArcFaceLoss",
  "BatchAllTripletLoss",
  "BatchHardTripletLoss",
  "CircleLoss",
  "ClassCentres",
  "CombinedMarginLoss",
  "ContrastiveLoss",
  "CosFaceLoss",
  "CurriculumTripletLoss",
  "DistanceWeightedNegatives",
  "InfoNCELoss",
  "InsideMarginTripletLoss",
  "JitteredLoss",
  "KerasLoss",
  "LearnedTemperature",
  "LiftedStructureLoss",
  "LinearPace",
  "MiningStatistics",
  "MultiSimilarityLoss",
  "NPairsLoss",
  "NormFaceLoss",
  "SemiHardTripletLoss",
  "SoftNearestNeighbourLoss",
  "SumOfLosses",
  "SupervisedContrastiveLoss",
  "TripletLoss",
  "batch_all_triplet_loss",
  "batch_hard_triplet_loss",
  "hermans_batch_hard",
  "omoindrot_batch_all",
  "omoindrot_batch_hard",
  "pairwise_distances",
  "pml_batch_all",
  "pml_batch_hard",
  "pml_semi_hard",
  "tfa_semi_hard",
]
