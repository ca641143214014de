"""What a schedule must know of a round, and a round that is not mined yet.

Shapes: N records that can be mined among, L classes of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Optional, Protocol

import numpy as np

from trainer.data.dataset import Dataset
from trainer.mining.miner import Miner


class Round(Protocol):
  """What a schedule is made of."""

  @property
  def step(self) -> int:
    """Number of steps its encoder was trained."""

  @property
  def arrays(self) -> Mapping[str, np.ndarray]:
    """By name, as `Mined` has them."""


class RoundToCome(NamedTuple):
  """As `Round`; of the first step, and nothing in it is meant to be drawn."""

  step: int
  arrays: Mapping[str, np.ndarray]


def round_to_come(miner: Optional[Miner], dataset: Dataset) -> RoundToCome:
  """A round as large as a miner's can be, for checks before there is one.

  Args:
    miner: None where another process mines, from which anything may come.
    dataset: its training classes are mined among. Each record is an anchor: no round
      has more.

  Returns:
    Arrays that take no memory.
  """
  num_classes = dataset.index.num_classes
  shapes: dict[str, tuple[int, ...]] = {}
  if miner is None or miner.examples is not None:
    num_anchors = _num_items(
      dataset, None if miner is None else miner.records_per_class
    )
    lists = (num_anchors, 1)
    shapes.update(anchors=(num_anchors,), positives=lists, negatives=lists)
  if miner is None or miner.num_class_neighbours:
    num_neighbours = num_classes if miner is None else miner.num_class_neighbours
    shapes["class_neighbours"] = (num_classes, num_neighbours)
  nothing = np.int32(-1)
  return RoundToCome(
    0, {name: np.broadcast_to(nothing, shape) for name, shape in shapes.items()}
  )


def _num_items(dataset: Dataset, records_per_class: Optional[int]) -> int:
  """N."""
  sizes = np.diff(dataset.index.member_table.starts)[dataset.train_classes]
  return int(
    sizes.sum()
    if records_per_class is None
    else sizes.clip(max=records_per_class).sum()
  )
