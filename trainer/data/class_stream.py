"""Which classes the steps draw, and which block of its members each class gives.

Classes are drawn by tickets. Every class has some, an epoch has each ticket once, in an
order of its own, and the tickets of a class are numbered through all epochs: ticket j
of a class gives block j of its members. So each block comes once, whatever the weights.

Shapes: C classes to draw from, T tickets an epoch, S steps, P classes a batch.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from trainer.data import distinct_stream, permutation

_TICKETS, _SUBSTITUTES = 1, 3
# After so many draws in vain the next free class is taken.
_MAX_DRAWS = 64


class Draws(NamedTuple):
  """The classes of some steps.

  Attributes:
    classes: [S, P] int64, positions among the classes to draw from; a step's differ.
    blocks: [S, P] int64 ≥ 0, the block of its members that each class gives.
  """

  classes: np.ndarray
  blocks: np.ndarray


class ClassStream(Protocol):
  """Draws classes."""

  def draw(self, steps: np.ndarray) -> Draws:
    """The classes of steps [S] int64."""


class EqualClasses:
  """Every class once an epoch. Takes no memory.

  Args:
    num_classes: C ≥ P.
    num_drawn: P.
    seed: another seed, another order.
  """

  def __init__(self, num_classes: int, num_drawn: int, seed: int):
    self._num_classes = num_classes
    self._num_drawn = num_drawn
    self._key = permutation.mix(seed, _TICKETS)

  def draw(self, steps: np.ndarray) -> Draws:
    """The classes of steps [S] int64."""
    classes = _tickets(steps, self._num_classes, self._key, self._num_drawn)
    return Draws(classes, _epochs(steps, self._num_classes, self._num_drawn))


class WeightedClasses:
  """Every class as often an epoch as it has tickets.

  Where a step draws a class twice, the second gives way to another class, drawn by the
  same weights, with any block of its members.

  Args:
    num_tickets: [C] int64 ≥ 1, tickets of each class; C ≥ P.
    num_drawn: P.
    seed: another seed, another order.
  """

  def __init__(self, num_tickets: np.ndarray, num_drawn: int, seed: int):
    self._ends = np.cumsum(num_tickets, dtype=np.int64)
    self._num_drawn = num_drawn
    self._seed = seed
    self._key = permutation.mix(seed, _TICKETS)

  def draw(self, steps: np.ndarray) -> Draws:
    """The classes of steps [S] int64."""
    total = int(self._ends[-1])
    tickets = _tickets(steps, total, self._key, self._num_drawn)
    classes = self._class_of(tickets)
    starts = np.where(classes > 0, self._ends[classes - 1], 0)
    num_each = self._ends[classes] - starts
    epochs = _epochs(steps, total, self._num_drawn)
    blocks = epochs * num_each + tickets - starts
    in_order = np.sort(classes, axis=1)
    for row in np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(axis=1)):
      self._substitute(int(steps[row]), classes[row], blocks[row])
    return Draws(classes, blocks)

  def _class_of(self, tickets: np.ndarray) -> np.ndarray:
    return np.searchsorted(self._ends, tickets, side="right")

  def _substitute(self, step: int, classes: np.ndarray, blocks: np.ndarray) -> None:
    """Replaces what a step draws again, in place; [P] each."""
    _, firsts = np.unique(classes, return_index=True)
    drawn = set(classes[firsts].tolist())
    for place in np.setdiff1d(np.arange(len(classes)), firsts).tolist():
      hashes = permutation.mix(
        self._seed, _SUBSTITUTES, step, place, np.arange(_MAX_DRAWS)
      )
      candidates = self._class_of((hashes % np.uint64(self._ends[-1])).astype(np.int64))
      free = (c for c in candidates.tolist() if c not in drawn)
      substitute = next(free, None)
      if substitute is None:
        substitute = int(candidates[-1])
        while substitute in drawn:
          substitute = (substitute + 1) % len(self._ends)
      drawn.add(substitute)
      classes[place] = substitute
      blocks[place] = int(hashes[0] >> np.uint64(33))


def _tickets(
  steps: np.ndarray, num_tickets: int, key: np.ndarray, num_drawn: int
) -> np.ndarray:
  """[S, P] int64 in range(T), no two alike in a row."""
  shape = steps.shape
  return distinct_stream.block(
    steps, np.full(shape, num_tickets), np.broadcast_to(key, shape), num_drawn
  )


def _epochs(steps: np.ndarray, num_tickets: int, num_drawn: int) -> np.ndarray:
  """[S, P] int64, how often all tickets have come before each one drawn."""
  return (steps[:, None] * num_drawn + np.arange(num_drawn)) // num_tickets
