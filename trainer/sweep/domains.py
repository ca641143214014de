"""What a swept parameter may be: one of some values, or a number of a range."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, Optional, Union

from trainer.config import suggest
from trainer.config.statements import Binding
from trainer.errors import UserError


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of these values, which may be anything that gin can write."""

  values: Sequence[Any]

  def grid(self) -> Sequence[Any]:
    """Every value."""
    return self.values

  def extremes(self) -> Sequence[Any]:
    """What must be tried to know that all values are accepted: every one."""
    return self.values

  def sample(self, generator: random.Random) -> Any:
    """A value, each as likely."""
    return generator.choice(self.values)


@dataclasses.dataclass(frozen=True)
class Range:
  """A number between two, both included; whole if both are.

  Attributes:
    low: the lowest.
    high: the highest.
    num: how many a grid takes, evenly spaced; None where there is no grid.
    is_log: whether the logarithm is what is even.
  """

  low: float
  high: float
  num: Optional[int] = None
  is_log: bool = False

  def grid(self) -> Sequence[Any]:
    """`num` numbers from low to high, duplicates of rounding left out."""
    if self.num is None:
      raise UserError("without a third number it is infinite in a grid")
    shares = [i / max(self.num - 1, 1) for i in range(self.num)]
    return list(dict.fromkeys(self._at(share) for share in shares))

  def extremes(self) -> Sequence[Any]:
    """Both ends."""
    return [self.low, self.high]

  def sample(self, generator: random.Random) -> Any:
    """A number, evenly distributed or its logarithm is."""
    return self._at(generator.random())

  @property
  def is_whole(self) -> bool:
    """Whether the numbers are integers."""
    return isinstance(self.low, int) and isinstance(self.high, int)

  def _at(self, share: float) -> Any:
    """The number at this share of the way from low to high."""
    if share in (0.0, 1.0):
      return self.high if share else self.low
    if self.is_log:
      low, high = math.log(self.low), math.log(self.high)
      value = math.exp(low + share * (high - low))
    else:
      value = self.low + share * (self.high - self.low)
    # Four digits are enough to tell two trials apart, and can be read.
    return round(value) if self.is_whole else float(f"{value:.4g}")


Domain = Union[Choice, Range]
KINDS = ("choice", "range", "log_range")


def read(binding: Binding) -> Domain:
  """The domain of `KIND/Name.parameter = values`.

  Args:
    binding: its scope is the kind.

  Raises:
    UserError: the kind is unknown, or the values don't fit it.
  """
  if binding.scope not in KINDS:
    nearest = suggest.nearest(binding.scope, KINDS)
    raise UserError(
      f"{binding.origin}: {binding.scope!r} is none of {', '.join(KINDS)}{nearest}."
    )
  values = binding.value
  if binding.scope == "choice":
    if not isinstance(values, (list, tuple)) or not values:
      raise UserError(f"{binding.origin}: {binding.key} needs a list of values.")
    return Choice(list(values))
  return _range(binding)


def _range(binding: Binding) -> Range:
  values, is_log = binding.value, binding.scope == "log_range"
  form = f"{binding.origin}: {binding.key} needs (low, high) or (low, high, how many)"
  if not isinstance(values, (list, tuple)) or len(values) not in (2, 3):
    raise UserError(f"{form}; it has {values!r}.")
  if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
    raise UserError(f"{form}, all of them numbers; it has {values!r}.")
  low, high, *num = values
  if low >= high or (is_log and low <= 0):
    above = ", low above 0" if is_log else ""
    raise UserError(f"{form} with low below high{above}; it has {values!r}.")
  if num and (not isinstance(num[0], int) or num[0] < 1):
    raise UserError(f"{form}, at least one; it has {values!r}.")
  return Range(low, high, num[0] if num else None, is_log)
