"""Sampling of classes: weights, and streams without repetition.

An epoch is a number of draws; every class has at least one of them. It contains each
draw once, in an order of its own. The draws of a class are numbered across all epochs,
and draw j of a class returns block j of its members. Each block is therefore drawn
once, whatever the weights.

Shapes: C classes to draw from, T draws per epoch, S steps, P classes per batch.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Protocol

import gin
import numpy as np

from trainer.data import permutation
from trainer.errors import UserError, check_at_least

# Draws per epoch of a class with K records, if draws are not whole passes over the
# records: fine enough that rounding changes a weight by 3 % at most.
_RESOLUTION = 16
_MAX_DRAWS_PER_EPOCH = 2**31 - 1

_DRAWS, _SUBSTITUTES = 1, 3
# Number of random draws before the next free class is taken.
_MAX_DRAWS = 64


class ClassWeights(Protocol):
  """Sets the number of draws of each class per epoch."""

  def draws_per_epoch(self, sizes: np.ndarray, samples_per_class: int) -> np.ndarray:
    """Returns [C] int64 ≥ 1, from the class sizes [C] and the samples per class."""


@gin.register
class SizeWeights:
  """Class weights proportional to a power of the class size, with a cap.

  With power 1 an epoch covers the records: a class of n records is drawn ⌈n / K⌉ times,
  so each of its records is drawn once (some twice if K doesn't divide n). Power 0.5
  gives the square root of the size, and power 0 equal weights.

  Args:
    power: 0 … 1.
    max_size: sizes are capped at this number of records; None for no cap.

  Raises:
    UserError: the power is not between 0 and 1, or the cap is below 1.
  """

  def __init__(self, *, power: float = 1.0, max_size: Optional[int] = None):
    if not 0 <= power <= 1:
      raise UserError(f"SizeWeights.power={power} must be between 0 and 1.")
    check_at_least("SizeWeights.max_size", max_size, 1)
    self._power = power
    self._max_size = max_size

  def draws_per_epoch(self, sizes: np.ndarray, samples_per_class: int) -> np.ndarray:
    """Computes the draws of each class per epoch.

    Args:
      sizes: [C] int64 ≥ 1, records of each class.
      samples_per_class: K.

    Returns:
      [C] int64 ≥ 1.

    Raises:
      UserError: the total would exceed 2³¹.
    """
    if self._max_size is not None:
      sizes = np.minimum(sizes, self._max_size)
    if self._power == 1:
      draws_per_epoch = -(-sizes // samples_per_class)
    else:
      relative = (sizes / samples_per_class) ** self._power
      draws_per_epoch = np.maximum(1, np.rint(_RESOLUTION * relative)).astype(np.int64)
    if draws_per_epoch.sum() > _MAX_DRAWS_PER_EPOCH:
      raise UserError(
        f"SizeWeights gives {draws_per_epoch.sum():,} draws per epoch, more than the "
        f"{_MAX_DRAWS_PER_EPOCH:,} allowed; lower max_size or power."
      )
    return draws_per_epoch


class Draws(NamedTuple):
  """The classes drawn in some steps.

  Attributes:
    classes: [S, P] int64, positions among the classes to draw from; distinct per step.
    blocks: [S, P] int64 ≥ 0, the block of members of each class.
  """

  classes: np.ndarray
  blocks: np.ndarray


class ClassStream(Protocol):
  """A stream of drawn classes."""

  def draw(self, steps: np.ndarray) -> Draws:
    """Returns the classes of steps [S] int64."""


class EqualClasses:
  """A stream with every class once per epoch; takes no memory.

  Args:
    num_classes: C ≥ P.
    num_drawn: P.
    seed: random seed of the order.
  """

  def __init__(self, num_classes: int, num_drawn: int, seed: int):
    self._num_classes = num_classes
    self._num_drawn = num_drawn
    self._key = permutation.mix(seed, _DRAWS)

  def draw(self, steps: np.ndarray) -> Draws:
    """Returns the classes of steps [S] int64."""
    classes = _draws(steps, self._num_classes, self._key, self._num_drawn)
    return Draws(classes, _epochs(steps, self._num_classes, self._num_drawn))


class WeightedClasses:
  """A stream with every class as often per epoch as its weight specifies.

  If a step draws a class twice, the second draw is replaced by another class, drawn
  with the same weights, and any block of its members.

  Args:
    draws_per_epoch: [C] int64 ≥ 1, draws of each class; C ≥ P.
    num_drawn: P.
    seed: random seed of the order.
  """

  def __init__(self, draws_per_epoch: np.ndarray, num_drawn: int, seed: int):
    self._ends = np.cumsum(draws_per_epoch, dtype=np.int64)
    self._num_drawn = num_drawn
    self._seed = seed
    self._key = permutation.mix(seed, _DRAWS)

  def draw(self, steps: np.ndarray) -> Draws:
    """Returns the classes of steps [S] int64."""
    total = int(self._ends[-1])
    draws = _draws(steps, total, self._key, self._num_drawn)
    classes = self._class_of(draws)
    starts = np.where(classes > 0, self._ends[classes - 1], 0)
    num_each = self._ends[classes] - starts
    epochs = _epochs(steps, total, self._num_drawn)
    blocks = epochs * num_each + draws - starts
    in_order = np.sort(classes, axis=1)
    for row in np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(axis=1)):
      self._substitute(int(steps[row]), classes[row], blocks[row])
    return Draws(classes, blocks)

  def _class_of(self, draws: np.ndarray) -> np.ndarray:
    return np.searchsorted(self._ends, draws, side="right")

  def _substitute(self, step: int, classes: np.ndarray, blocks: np.ndarray) -> None:
    """Replaces repeated classes of a step, in place; both arrays are [P]."""
    _, firsts = np.unique(classes, return_index=True)
    drawn = set(classes[firsts].tolist())
    for position in np.setdiff1d(np.arange(len(classes)), firsts).tolist():
      hashes = permutation.mix(
        self._seed, _SUBSTITUTES, step, position, np.arange(_MAX_DRAWS)
      )
      candidates = self._class_of((hashes % np.uint64(self._ends[-1])).astype(np.int64))
      free = (c for c in candidates.tolist() if c not in drawn)
      substitute = next(free, None)
      if substitute is None:
        substitute = int(candidates[-1])
        while substitute in drawn:
          substitute = (substitute + 1) % len(self._ends)
      drawn.add(substitute)
      classes[position] = substitute
      blocks[position] = int(hashes[0] >> np.uint64(33))


def _draws(
  steps: np.ndarray, draws_per_epoch: int, key: np.ndarray, num_drawn: int
) -> np.ndarray:
  """Returns [S, P] int64 in range(T), distinct within a row."""
  shape = steps.shape
  return permutation.distinct_block(
    steps, np.full(shape, draws_per_epoch), np.broadcast_to(key, shape), num_drawn
  )


def _epochs(steps: np.ndarray, draws_per_epoch: int, num_drawn: int) -> np.ndarray:
  """Returns [S, P] int64, the number of complete epochs before each draw."""
  return (steps[:, None] * num_drawn + np.arange(num_drawn)) // draws_per_epoch
