"""Domains of swept parameters: the values of a grid, and what Optuna draws from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Union

from trainer.config import gin_statements
from trainer.config.gin_statements import Binding
from trainer.errors import UserError

KINDS = ("choice", "range", "log_range")


@dataclasses.dataclass(frozen=True)
class Choice:
  """Domain of listed values, which may be anything that gin can write."""

  values: Sequence[Any]

  def grid(self) -> Sequence[Any]:
    """Returns every value."""
    return self.values

  def extremes(self) -> Sequence[Any]:
    """Returns the values to check, which is every value."""
    return self.values

  def distribution(self) -> Any:
    """Returns the distribution of Optuna, over texts: gin references are no values."""
    from optuna import distributions  # Late: Optuna is an extra.

    return distributions.CategoricalDistribution(
      list(dict.fromkeys(map(repr, self.values)))
    )

  def decode(self, stored: str) -> Any:
    """Returns the value of a text in Optuna's storage."""
    return {repr(value): value for value in self.values}[stored]


@dataclasses.dataclass(frozen=True)
class Range:
  """Domain of numbers between two ends, inclusive; integers if both ends are.

  Attributes:
    low: the lowest.
    high: the highest.
    num: number of values in a grid, evenly spaced; None if there is no grid.
    is_log: whether values are evenly spaced on a logarithmic scale.
  """

  low: float
  high: float
  num: Optional[int] = None
  is_log: bool = False

  def grid(self) -> Sequence[Any]:
    """Returns `num` numbers from low to high, without duplicates from rounding."""
    if self.num is None:
      raise UserError("a grid needs a third number, the count of values")
    shares = [i / max(self.num - 1, 1) for i in range(self.num)]
    return list(dict.fromkeys(self._at(share) for share in shares))

  def extremes(self) -> Sequence[Any]:
    """Returns both ends."""
    return [self.low, self.high]

  def distribution(self) -> Any:
    """Returns the distribution of Optuna."""
    from optuna import distributions  # Late: Optuna is an extra.

    if self._is_whole:
      low, high = int(self.low), int(self.high)
      return distributions.IntDistribution(low, high, log=self.is_log)
    return distributions.FloatDistribution(self.low, self.high, log=self.is_log)

  def decode(self, stored: float) -> float:
    """Returns the number, of four digits: they distinguish trials and are readable."""
    if self._is_whole:
      return round(stored)
    return min(max(float(f"{stored:.4g}"), self.low), self.high)

  @property
  def _is_whole(self) -> bool:
    return isinstance(self.low, int) and isinstance(self.high, int)

  def _at(self, share: float) -> float:
    """Returns the number at a fraction of the range."""
    if share in (0.0, 1.0):
      return self.high if share else self.low
    if not self.is_log:
      return self.decode(self.low + share * (self.high - self.low))
    low, high = math.log(self.low), math.log(self.high)
    return self.decode(math.exp(low + share * (high - low)))


Domain = Union[Choice, Range]


def random_values(domains: Mapping[str, Domain], seed: int) -> Iterator[dict[str, Any]]:
  """Yields random values by name without end, the same for the same seed."""
  import optuna  # Late: Optuna is an extra.

  sampler = optuna.samplers.RandomSampler(seed)
  study = optuna.create_study(sampler=sampler)
  trial = optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING)
  space = {name: domain.distribution() for name, domain in domains.items()}
  while True:
    yield {
      name: domain.decode(sampler.sample_independent(study, trial, name, space[name]))
      for name, domain in domains.items()
    }


def read_domain(binding: Binding) -> Domain:
  """Returns the domain of `KIND/Name.parameter = values`.

  Args:
    binding: its scope is the kind.

  Raises:
    UserError: the kind is unknown, or the values do not fit it.
  """
  if binding.scope not in KINDS:
    nearest = gin_statements.nearest_name(binding.scope, KINDS)
    raise UserError(
      f"{binding.origin}: {binding.scope!r} is not one of {', '.join(KINDS)}{nearest}."
    )
  values = binding.value
  if binding.scope == "choice":
    if not isinstance(values, (list, tuple)) or not values:
      raise UserError(f"{binding.origin}: {binding.key} needs a list of values.")
    return Choice(list(values))
  return _range(binding)


def _range(binding: Binding) -> Range:
  values, is_log = binding.value, binding.scope == "log_range"
  form = f"{binding.origin}: {binding.key} needs (low, high) or (low, high, count)"
  if not isinstance(values, (list, tuple)) or len(values) not in (2, 3):
    raise UserError(f"{form}; it is {values!r}.")
  if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
    raise UserError(f"{form}, all numbers; it is {values!r}.")
  low, high, *num = values
  if low >= high or (is_log and low <= 0):
    above = ", low above 0" if is_log else ""
    raise UserError(f"{form} with low below high{above}; it is {values!r}.")
  if num and (not isinstance(num[0], int) or num[0] < 1):
    raise UserError(f"{form} with a count of at least 1; it is {values!r}.")
  return Range(low, high, num[0] if num else None, is_log)
