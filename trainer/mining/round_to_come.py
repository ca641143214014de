"""What a schedule must know of a round, and a round that is not mined yet.

Shapes: N records, L classes of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Optional, Protocol

import numpy as np

from trainer.data.records import RecordIndex
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


def round_to_come(miner: Optional[Miner], index: RecordIndex) -> RoundToCome:
  """A round with all arrays that a miner gives, for checks before there is one.

  Args:
    miner: None where another process mines, from which anything may come.
    index: of the records. Each is an anchor: no round has more.

  Returns:
    Arrays that take no memory.
  """
  num_records, num_classes = index.num_records, index.num_classes
  shapes: dict[str, tuple[int, ...]] = {}
  if miner is None or miner.examples is not None:
    lists = (num_records, 1)
    shapes.update(anchors=(num_records,), positives=lists, negatives=lists)
  if miner is None or miner.num_class_neighbours:
    shapes["class_neighbours"] = (num_classes, 1)
  nothing = np.int32(-1)
  return RoundToCome(
    0, {name: np.broadcast_to(nothing, shape) for name, shape in shapes.items()}
  )
