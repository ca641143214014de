"""The largest batch that fits, by bisection."""

from __future__ import annotations

from typing import Callable, Optional

# A search that finds no end stops at so many times the P that it began with.
MAX_FACTOR = 64


def largest(fits: Callable[[int], bool], start: int, *, unit: int) -> Optional[int]:
  """The largest multiple of a unit that fits, if all smaller ones do.

  Args:
    fits: whether a number does.
    start: where to begin; it is rounded down to a multiple, or up to the first.
    unit: of what only multiples are possible.

  Returns:
    The number, at most `MAX_FACTOR` times the start; None where not even the unit
    fits.
  """
  first = max(1, start // unit)
  last = first * MAX_FACTOR
  below, above = 0, first
  while above <= last and fits(above * unit):
    below, above = above, 2 * above
  above = min(above, last + 1)
  while above - below > 1:
    middle = (below + above) // 2
    if fits(middle * unit):
      below = middle
    else:
      above = middle
  return below * unit or None
