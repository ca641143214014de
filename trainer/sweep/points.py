"""Points of a sweep: a value for each swept name, and the resulting config."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional

from trainer.config import gin_resolution, run_config
from trainer.config.gin_statements import Binding
from trainer.errors import UserError
from trainer.sweep.spec import Spec, random_values

_ROOTS = {"train": ("train",), "train_and_evaluate": ("train", "evaluate")}
_MAX_POINTS = 10_000
_TRIES_PER_POINT = 1000
_ID_LENGTH = 16  # Hexadecimal digits: 64 bits avoid collisions in a study.


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep.

  Attributes:
    settings: the swept values that it uses, as written in gin, by gin name.
    seed: None if the sweep has no seeds.
    config: config of the run.
    values: all swept values, by gin name.
  """

  settings: Mapping[str, str]
  seed: Optional[int]
  config: run_config.Config
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def run_id(self) -> str:
    """Name of its folder, equal for points with equal computation."""
    return self.config.hash[:_ID_LENGTH]

  @property
  def num_steps(self) -> int:
    """Number of training steps."""
    return int(self.config.values["train.loop.num_steps"])

  def __str__(self):
    seed = {} if self.seed is None else {"seed": self.seed}
    return ", ".join(f"{k}={v}" for k, v in {**self.settings, **seed}.items())


class PointBuilder:
  """Builds points from values of the swept names; each is checked as a run's config.

  A binding of the sweep file that a point does not use is left out of it, such as the
  margin of a loss that was not chosen. A binding that no point uses is refused.

  Args:
    spec: the sweep file.
  """

  def __init__(self, spec: Spec):
    self._spec = spec
    self._seen: dict[tuple[str, str, str], Binding] = {}
    self._used: set[tuple[str, str, str]] = set()

  def build(self, values: Mapping[str, Any], seed: Optional[int]) -> Point:
    """Returns the point of these values.

    Args:
      values: by swept name.
      seed: for `sweep.seed_name`.

    Raises:
      UserError: a run would not accept the config.
    """
    options = self._spec.options
    varied = [
      dataclasses.replace(binding, value=values[name])
      for name, binding in self._spec.swept.items()
    ]
    if seed is not None:
      scope, _, name = options.seed_name.rpartition("/")
      name, _, parameter = name.partition(".")
      varied.append(Binding(scope, name, parameter, seed, "sweep.seeds"))
    taken = {gin_resolution.identity(binding) for binding in varied}
    kept = [
      s
      for s in self._spec.base
      if not isinstance(s, Binding) or gin_resolution.identity(s) not in taken
    ]
    assembled = run_config.assemble([*kept, *varied], needed=_ROOTS[options.mode])
    unused = {gin_resolution.identity(binding) for binding in assembled.unused}
    self._note([*kept, *varied], unused)
    settings = {
      binding.key: repr(binding.value)
      for binding in varied
      if gin_resolution.identity(binding) not in unused
      and binding.origin != "sweep.seeds"
    }
    return Point(settings, seed, assembled.config, values)

  def refuse_unused(self) -> None:
    """Raises if no point so far has used a binding.

    Raises:
      UserError: there is such a binding.
    """
    unused = [b for key, b in self._seen.items() if key not in self._used]
    if unused:
      raise UserError(run_config.unused_message(unused))

  def _note(self, statements: Iterable[Any], unused: set) -> None:
    for statement in statements:
      if isinstance(statement, Binding):
        key = gin_resolution.identity(statement)
        self._seen.setdefault(key, statement)
        if key not in unused:
          self._used.add(key)


def listed(spec: Spec, builder: PointBuilder) -> list[Point]:
  """Returns all points of a grid or a random search, seed by seed, each config once.

  Raises:
    UserError: there are no points or too many, or one has an invalid config.
  """
  is_grid = spec.options.method == "grid"
  assignments = list(_grid(spec) if is_grid else _random(spec))
  if not assignments:
    raise UserError("the grid is empty: no point meets all sweep.constraints.")
  seeds: Sequence[Optional[int]] = spec.options.seeds or (None,)
  points = [builder.build(a, seed) for seed in seeds for a in assignments]
  builder.refuse_unused()
  return list({point.run_id: point for point in reversed(points)}.values())[::-1]


def extremes(spec: Spec, builder: PointBuilder) -> list[Point]:
  """Returns points for every choice and range end; other names have their first value.

  Raises:
    UserError: one of them has an invalid config.
  """
  first = {name: domain.extremes()[0] for name, domain in spec.domains.items()}
  seed = spec.options.seeds[0] if spec.options.seeds else None
  points = [
    builder.build({**first, name: value}, seed)
    for name, domain in spec.domains.items()
    for value in domain.extremes()
  ]
  builder.refuse_unused()
  return points


def _grid(spec: Spec) -> Iterator[Mapping[str, Any]]:
  columns = []
  for name, domain in spec.domains.items():
    try:
      columns.append(domain.grid())
    except UserError as error:
      raise UserError(f"{spec.swept[name].origin}: {name}: {error}.") from error
  num_points = math.prod(len(column) for column in columns)
  if num_points > _MAX_POINTS:
    raise UserError(
      f"the grid has {num_points:,} points, more than {_MAX_POINTS:,}; use "
      "sweep.method='random' with sweep.num_trials."
    )
  for values in itertools.product(*columns):
    assignment = dict(zip(spec.domains, values))
    if spec.is_allowed(assignment):
      yield assignment


def _random(spec: Spec) -> Iterator[Mapping[str, Any]]:
  wanted = spec.options.num_trials or 0
  draws = random_values(spec.domains, spec.options.search_seed)
  seen: set[str] = set()
  for assignment in itertools.islice(draws, wanted * _TRIES_PER_POINT):
    if repr(assignment) not in seen and spec.is_allowed(assignment):
      seen.add(repr(assignment))
      yield assignment
    if len(seen) == wanted:
      return
  raise UserError(
    f"sweep.num_trials={wanted}: only {len(seen)} different points that meet "
    "sweep.constraints were found; ask for fewer, or use a grid."
  )
