"""How often each class is drawn, from how many records it has.

Shapes: C classes to draw from.
"""

from __future__ import annotations

from typing import Optional, Protocol

import gin
import numpy as np

from trainer.errors import UserError

# Tickets of a class with as many records as are drawn of it at once, where tickets
# are not whole passes: fine enough that rounding changes a weight by 3 % at most.
_RESOLUTION = 16
_MAX_TICKETS = 2**31 - 1


class ClassWeights(Protocol):
  """Gives tickets to classes."""

  def num_tickets(self, sizes: np.ndarray, samples_per_class: int) -> np.ndarray:
    """[C] int64 ≥ 1, from sizes [C] and the samples drawn of a class at once."""


@gin.register
class SizeWeights:
  """Classes in proportion to a power of their size, with a cap.

  With power 1 an epoch is one of records: a class of n comes ⌈n / K⌉ times, so that
  each of its records comes once (some twice, where K doesn't divide n). With power 0.5
  it is the square root of the size; with power 0 all classes are equal.

  Args:
    power: 0 … 1.
    max_size: a larger class counts as one of so many records; None for no cap.

  Raises:
    UserError: the power is not between 0 and 1, or the cap is below 1.
  """

  def __init__(self, *, power: float = 1.0, max_size: Optional[int] = None):
    if not 0 <= power <= 1:
      raise UserError(f"SizeWeights.power={power} must be between 0 and 1.")
    if max_size is not None and max_size < 1:
      raise UserError(f"SizeWeights.max_size={max_size} must be at least 1, or None.")
    self._power = power
    self._max_size = max_size

  def num_tickets(self, sizes: np.ndarray, samples_per_class: int) -> np.ndarray:
    """Tickets of each class.

    Args:
      sizes: [C] int64 ≥ 1, records of each class.
      samples_per_class: K.

    Returns:
      [C] int64 ≥ 1.

    Raises:
      UserError: there would be more than 2³¹ in all.
    """
    if self._max_size is not None:
      sizes = np.minimum(sizes, self._max_size)
    if self._power == 1:
      tickets = -(-sizes // samples_per_class)
    else:
      relative = (sizes / samples_per_class) ** self._power
      tickets = np.maximum(1, np.rint(_RESOLUTION * relative)).astype(np.int64)
    if tickets.sum() > _MAX_TICKETS:
      raise UserError(
        f"SizeWeights gives {tickets.sum():,} draws an epoch, and at most "
        f"{_MAX_TICKETS:,} can be ordered; lower max_size or power."
      )
    return tickets
