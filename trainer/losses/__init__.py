"""Losses with in-batch mining: pure functions of tensors, independent of strategies."""

from trainer.losses.adaptive_margins import AdaFaceLoss, DynamicMarginLoss
from trainer.losses.centre_losses import (
  ArcFaceLoss,
  CombinedMarginLoss,
  CosFaceLoss,
  NormFaceLoss,
)
from trainer.losses.class_centres import ClassCentres
from trainer.losses.composite_losses import JitteredLoss, SumOfLosses
from trainer.losses.curriculum import AdaptivePace, CurriculumTripletLoss, LinearPace
from trainer.losses.distances import pairwise_distances
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
  insightface_arcface,
  insightface_combined,
  insightface_cosface,
  omoindrot_batch_all,
  omoindrot_batch_hard,
  pml_arcface,
  pml_batch_all,
  pml_batch_hard,
  pml_cosface,
  pml_norm_face,
  pml_proxy_anchor,
  pml_semi_hard,
  pml_soft_triple,
  proxy_nca_plus_plus,
  tfa_semi_hard,
)
from trainer.losses.proxy_losses import ProxyAnchorLoss, SoftTripleLoss
from trainer.losses.softmax import (
  InfoNCELoss,
  LearnedTemperature,
  NPairsLoss,
  SoftNearestNeighbourLoss,
  SupervisedContrastiveLoss,
)
from trainer.losses.triplet import (
  BatchAllTripletLoss,
  BatchHardTripletLoss,
  DistanceWeightedNegatives,
  InsideMarginTripletLoss,
  SemiHardTripletLoss,
  TripletLoss,
)

__all__ = [
  "AdaFaceLoss",
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
  "DynamicMarginLoss",
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
  "ProxyAnchorLoss",
  "SemiHardTripletLoss",
  "SoftNearestNeighbourLoss",
  "SoftTripleLoss",
  "SumOfLosses",
  "SupervisedContrastiveLoss",
  "TripletLoss",
  "batch_all_triplet_loss",
  "batch_hard_triplet_loss",
  "hermans_batch_hard",
  "insightface_arcface",
  "insightface_combined",
  "insightface_cosface",
  "omoindrot_batch_all",
  "omoindrot_batch_hard",
  "pairwise_distances",
  "pml_arcface",
  "pml_batch_all",
  "pml_batch_hard",
  "pml_cosface",
  "pml_norm_face",
  "pml_proxy_anchor",
  "pml_semi_hard",
  "pml_soft_triple",
  "proxy_nca_plus_plus",
  "tfa_semi_hard",
]
