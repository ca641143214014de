"""Every public loss with its oracle: the rows that the conformance tests go through."""

from __future__ import annotations

import dataclasses
from typing import Callable

from tests.losses import oracles
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


def _row(loss_class, compare, terms, reduction, /, **arguments):
  name = "-".join([loss_class.__name__, *map(str, arguments.values())])

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
]
