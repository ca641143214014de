"""Every public loss with its oracle: the rows that the conformance tests go through."""

from __future__ import annotations

import dataclasses
import functools
from typing import Callable

from tests.losses import oracles, pair_oracles
from trainer import losses


@dataclasses.dataclass(frozen=True)
class Row:
  """A loss and its definition.

  Attributes:
    name: of the test.
    make: the loss, with `rows_per_tile` for the streaming form.
    compare: oracle of what is compared.
    terms: oracle of an anchor's terms.
    reduction: what the sum is divided by, as in trainer/losses/anchorwise.py.
  """

  name: str
  make: Callable
  compare: Callable
  terms: Callable
  reduction: str


def _text(value):
  return str(value) if isinstance(value, (str, float)) else type(value).__name__


def _row(loss_class, compare, terms, reduction, /, **arguments):
  name = "-".join(
    [loss_class.__name__, *(_text(value) for value in arguments.values())]
  )

  @functools.cache  # Each new loss is compiled anew.
  def make(**more):
    return loss_class(**arguments, **more)

  return Row(name, make, compare, terms, reduction)


ROWS = [
  _row(
    losses.BatchAllTripletLoss,
    oracles.euclidean,
    oracles.batch_all(0.7),
    "mean_active",
    margin=0.7,
  ),
  _row(
    losses.BatchAllTripletLoss,
    oracles.squared_euclidean,
    oracles.batch_all(1.5),
    "mean_terms",
    margin=1.5,
    distance="squared_euclidean",
    reduction="mean_terms",
  ),
  _row(
    losses.BatchHardTripletLoss,
    oracles.euclidean,
    oracles.batch_hard(0.7),
    "mean_anchors",
    margin=0.7,
  ),
  _row(
    losses.BatchHardTripletLoss,
    oracles.cosine,
    oracles.batch_hard(0.3),
    "mean_active",
    margin=0.3,
    distance="cosine",
    reduction="mean_active",
  ),
  _row(
    losses.SemiHardTripletLoss,
    oracles.euclidean,
    oracles.semi_hard(0.7),
    "mean_terms",
    margin=0.7,
  ),
  _row(
    losses.InsideMarginTripletLoss,
    oracles.normalized_euclidean,
    oracles.inside_margin(0.4),
    "mean_active",
    margin=0.4,
    distance="normalized_euclidean",
  ),
  _row(
    losses.TripletLoss,
    oracles.euclidean,
    oracles.chosen(oracles.hinge(0.7), list, lambda p, pos, neg: neg),
    "mean_active",
    positives="all",
    negatives="all",
    margin=0.7,
    reduction="mean_active",
  ),
  _row(
    losses.TripletLoss,
    oracles.cosine,
    oracles.chosen(
      oracles.soft, lambda pos: [max(pos)], lambda p, pos, neg: [min(neg)]
    ),
    "mean_anchors",
    positives="hardest",
    negatives="hardest",
    margin="soft",
    reduction="mean_anchors",
    distance="cosine",
  ),
  _row(
    losses.TripletLoss,
    oracles.squared_euclidean,
    oracles.chosen(oracles.hinge(1.5), lambda pos: [min(pos)], lambda p, pos, neg: neg),
    "mean_terms",
    positives="easiest",
    negatives="all",
    margin=1.5,
    reduction="mean_terms",
    distance="squared_euclidean",
  ),
  _row(
    losses.TripletLoss,
    oracles.euclidean,
    oracles.chosen(
      oracles.hinge(0.7), list, lambda *d: [oracles.semi_hard_of_pair(*d)]
    ),
    "mean_active",
    positives="all",
    negatives="semi_hard_of_pair",
    margin=0.7,
    reduction="mean_active",
  ),
  _row(
    losses.TripletLoss,
    oracles.euclidean,
    oracles.chosen(
      oracles.hinge(0.7), list, lambda *d: [oracles.semi_hard_of_anchor(*d)]
    ),
    "mean_terms",
    positives="all",
    negatives="semi_hard_of_anchor",
    margin=0.7,
    reduction="mean_terms",
  ),
  _row(
    losses.TripletLoss,
    oracles.normalized_euclidean,
    oracles.distance_weighted(0.5, 5, 0.5, 1.4),
    "mean_terms",
    positives="all",
    negatives=losses.DistanceWeightedNegatives(num_dimensions=5),
    margin=0.5,
    reduction="mean_terms",
    distance="normalized_euclidean",
  ),
  _row(
    losses.ContrastiveLoss,
    oracles.euclidean,
    pair_oracles.contrastive(2.5),
    "mean_terms",
    margin=2.5,
  ),
  _row(
    losses.LiftedStructureLoss,
    oracles.euclidean,
    pair_oracles.lifted_structure(1.0),
    "mean_terms",
    margin=1.0,
  ),
  _row(
    losses.MultiSimilarityLoss,
    oracles.cosine_similarity,
    pair_oracles.multi_similarity(2, 10, 0.5, 0.1),
    "mean_anchors",
    negative_scale=10.0,
    threshold=0.5,
  ),
  _row(
    losses.CircleLoss,
    oracles.cosine_similarity,
    pair_oracles.circle(0.4, 8),
    "mean_terms",
    margin=0.4,
    scale=8.0,
  ),
  _row(
    losses.InfoNCELoss,
    oracles.cosine_similarity,
    pair_oracles.one_positive_softmax(0.5),
    "mean_terms",
    temperature=0.5,
  ),
  _row(
    losses.NPairsLoss,
    pair_oracles.inner_product,
    pair_oracles.one_positive_softmax(1),
    "mean_terms",
  ),
  _row(
    losses.SupervisedContrastiveLoss,
    oracles.cosine_similarity,
    pair_oracles.supervised_contrastive(0.5),
    "mean_terms",
    temperature=0.5,
  ),
  _row(
    losses.SoftNearestNeighbourLoss,
    oracles.squared_euclidean,
    pair_oracles.soft_nearest_neighbour(3),
    "mean_terms",
    temperature=3.0,
  ),
]
