"""Axes of a plot: where a value stands, and which values are written out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

_STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Axis:
  """A stretch of numbers.

  Attributes:
    low: value at its beginning.
    high: value at its end.
    ticks: values that are written out.
    is_logarithmic: whether equal lengths are equal ratios.
  """

  low: float
  high: float
  ticks: Sequence[float]
  is_logarithmic: bool = False

  def place(self, value: float) -> float:
    """Where a value stands, in per cent of the axis's length."""
    low, high = self.low, self.high
    if self.is_logarithmic:
      low, high, value = math.log(low), math.log(high), math.log(value)
    return round(100 * (value - low) / (high - low), 2)


def linear(
  values: Iterable[float], num_steps: int = 4, *, is_rounded: bool = False
) -> Axis:
  """An axis of all values, with round numbers written out.

  Args:
    values: finite, at least one.
    num_steps: about how many round numbers.
    is_rounded: whether it begins and ends at one.
  """
  values = list(values)
  low, high = min(values), max(values)
  if low == high:
    margin = abs(low) / 2 or 1.0
    low, high = low - margin, high + margin
  step = _round_step((high - low) / num_steps)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  if is_rounded:
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    low, high = first * step, last * step
  return Axis(low, high, [i * step for i in range(first, last + 1)])


def logarithmic(low: float, high: float) -> Axis:
  """An axis of ratios, with 1, 2, 5, 10, 20, ... written out.

  Args:
    low: above 0.
    high: above `low`.
  """
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  ticks = [10.0**power * step for power in powers for step in _STEPS[:-1]]
  return Axis(low, high, [t for t in ticks if low <= t <= high], True)


def short(value: float) -> str:
  """A number as few figures tell it."""
  if value == 0 or abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.4g}"


def _round_step(least: float) -> float:
  """1, 2 or 5 times a power of ten, just above or at `least`."""
  power = 10.0 ** math.floor(math.log10(least))
  return next(step * power for step in _STEPS if step * power >= least * (1 - 1e-9))
