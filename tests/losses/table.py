"""Every public loss with its oracle: the rows of the conformance tests."""

from __future__ import annotations

import dataclasses
import functools
from typing import Callable

import pytest

from tests.losses import oracles, pair_oracles
from tests.thorough import thorough_except
from trainer import losses


@dataclasses.dataclass(frozen=True)
class Row:
  """A loss and its definition.

  Attributes:
    name: of the test.
    make: the loss, with `rows_per_tile` for the streaming form, and with its constant
      times `unit`.
    compare: oracle of what is compared.
    terms_of: oracle of an anchor's terms, with its constant times the given unit.
    reduction: what the sum is divided by, as in trainer/losses/tiled_loss.py.
  """

  name: str
  make: Callable
  compare: Callable
  terms_of: Callable
  reduction: str

  @property
  def terms(self):
    """Oracle of the terms of an anchor."""
    return self.terms_of(1.0)

  def unit(self, norm):
    """Factor of the constant for embeddings of a norm."""
    return norm ** _DEGREES.get(self.compare, 0)


# Powers of the norm by which distances or similarities grow, if a constant must grow
# with them.
_DEGREES = {oracles.euclidean: 1, oracles.squared_euclidean: 2}
# Arguments in units of the distance or similarity.
_CONSTANTS = ("margin", "temperature")


def _text(value):
  return str(value) if isinstance(value, (str, float)) else type(value).__name__


def _row(loss_class, compare, terms_of, reduction, /, **arguments):
  name = "-".join(
    [loss_class.__name__, *(_text(value) for value in arguments.values())]
  )

  @functools.cache  # Avoids a new compilation.
  def make(unit=1.0, **more):
    scaled = {
      key: unit * value if key in _CONSTANTS and value != "soft" else value
      for key, value in arguments.items()
    }
    return loss_class(**scaled, **more)

  return Row(name, make, compare, terms_of, reduction)


def _all(positive, positives, negatives):
  return negatives


ROWS = [
  _row(
    losses.BatchAllTripletLoss,
    oracles.euclidean,
    lambda unit: oracles.batch_all(0.7 * unit),
    "mean_active",
    margin=0.7,
  ),
  _row(
    losses.BatchAllTripletLoss,
    oracles.squared_euclidean,
    lambda unit: oracles.batch_all(1.5 * unit),
    "mean_terms",
    margin=1.5,
    distance="squared_euclidean",
    reduction="mean_terms",
  ),
  _row(
    losses.CurriculumTripletLoss,
    oracles.euclidean,
    lambda unit: oracles.harder(0.7 * unit, 0.4),
    "mean_active",
    margin=0.7,
    hardness=0.4,
  ),
  _row(
    losses.CurriculumTripletLoss,
    oracles.cosine,
    lambda unit: oracles.harder(0.3, 1.0),
    "mean_terms",
    margin=0.3,
    hardness=1.0,
    distance="cosine",
    reduction="mean_terms",
  ),
  _row(
    losses.BatchHardTripletLoss,
    oracles.euclidean,
    lambda unit: oracles.batch_hard(0.7 * unit),
    "mean_anchors",
    margin=0.7,
  ),
  _row(
    losses.BatchHardTripletLoss,
    oracles.cosine,
    lambda unit: oracles.batch_hard(0.3),
    "mean_active",
    margin=0.3,
    distance="cosine",
    reduction="mean_active",
  ),
  _row(
    losses.SemiHardTripletLoss,
    oracles.euclidean,
    lambda unit: oracles.semi_hard(0.7 * unit),
    "mean_terms",
    margin=0.7,
  ),
  _row(
    losses.InsideMarginTripletLoss,
    oracles.normalized_euclidean,
    lambda unit: oracles.inside_margin(0.4),
    "mean_active",
    margin=0.4,
    distance="normalized_euclidean",
  ),
  _row(
    losses.TripletLoss,
    oracles.euclidean,
    lambda unit: oracles.chosen(oracles.hinge(0.7 * unit), list, _all),
    "mean_active",
    positives="all",
    negatives="all",
    margin=0.7,
    reduction="mean_active",
  ),
  _row(
    losses.TripletLoss,
    oracles.cosine,
    lambda unit: oracles.chosen(
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
    lambda unit: oracles.chosen(
      oracles.hinge(1.5 * unit), lambda pos: [min(pos)], _all
    ),
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
    lambda unit: oracles.chosen(
      oracles.hinge(0.7 * unit), list, lambda *d: [oracles.semi_hard_of_pair(*d)]
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
    lambda unit: oracles.chosen(
      oracles.hinge(0.7 * unit), list, lambda *d: [oracles.semi_hard_of_anchor(*d)]
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
    lambda unit: oracles.distance_weighted(0.5, 5, 0.5, 1.4),
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
    lambda unit: pair_oracles.contrastive(2.5 * unit),
    "mean_terms",
    margin=2.5,
  ),
  _row(
    losses.LiftedStructureLoss,
    oracles.euclidean,
    lambda unit: pair_oracles.lifted_structure(unit),
    "mean_terms",
    margin=1.0,
  ),
  _row(
    losses.MultiSimilarityLoss,
    oracles.cosine_similarity,
    lambda unit: pair_oracles.multi_similarity(2, 10, 0.5, 0.1),
    "mean_anchors",
    negative_scale=10.0,
    threshold=0.5,
  ),
  _row(
    losses.CircleLoss,
    oracles.cosine_similarity,
    lambda unit: pair_oracles.circle(0.4, 8),
    "mean_terms",
    margin=0.4,
    scale=8.0,
  ),
  _row(
    losses.InfoNCELoss,
    oracles.cosine_similarity,
    lambda unit: pair_oracles.one_positive_softmax(0.5),
    "mean_terms",
    temperature=0.5,
  ),
  _row(
    losses.NPairsLoss,
    pair_oracles.inner_product,
    lambda unit: pair_oracles.one_positive_softmax(1),
    "mean_terms",
  ),
  _row(
    losses.SupervisedContrastiveLoss,
    oracles.cosine_similarity,
    lambda unit: pair_oracles.supervised_contrastive(0.5),
    "mean_terms",
    temperature=0.5,
  ),
  _row(
    losses.SoftNearestNeighbourLoss,
    oracles.squared_euclidean,
    lambda unit: pair_oracles.soft_nearest_neighbour(3 * unit),
    "mean_terms",
    temperature=3.0,
  ),
]

FIRST_OF_EACH_CLASS = list({type(r.make()): r for r in reversed(ROWS)}.values())
_NAMES = [row.name for row in ROWS]
each_loss = pytest.mark.parametrize("row", ROWS, ids=_NAMES)
# Other arguments of the same class are thorough.
each_loss_class = pytest.mark.parametrize(
  "row", thorough_except(FIRST_OF_EACH_CLASS, ROWS), ids=_NAMES
)
