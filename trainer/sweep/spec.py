"""The sweep file: swept names, their domains, and constraints.

    include '../runs/digits.gin'
    NUM_STEPS = 100

    choice/MARGIN = (0.1, 0.3)
    range/PKSampler.classes_per_batch = (2, 6, 3)
    log_range/LEARNING_RATE = (1e-4, 1e-2, 3)

    sweep.method = 'grid'
    sweep.seeds = (1, 2, 3)

Constraints support only arithmetic, comparison, `and`, `or`, `not` and `in`. A sweep
file is parsed and never executed.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Union

from trainer.config import gin_resolution, gin_statements
from trainer.config.gin_statements import Binding, Reference, Statement
from trainer.errors import UserError

KINDS = ("choice", "range", "log_range")

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.Eq: operator.eq,
  ast.NotEq: operator.ne,
  ast.Lt: operator.lt,
  ast.LtE: operator.le,
  ast.Gt: operator.gt,
  ast.GtE: operator.ge,
  ast.In: lambda left, right: left in right,
  ast.NotIn: lambda left, right: left not in right,
}

METHODS = ("grid", "random", "tpe")
GOALS = ("maximize", "minimize")
MODES = ("train", "train_and_evaluate")


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

  def sample(self, generator: random.Random) -> Any:
    """Samples a value uniformly."""
    return generator.choice(self.values)


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
      raise UserError("without a third number it is infinite in a grid")
    shares = [i / max(self.num - 1, 1) for i in range(self.num)]
    return list(dict.fromkeys(self._at(share) for share in shares))

  def extremes(self) -> Sequence[Any]:
    """Returns both ends."""
    return [self.low, self.high]

  def sample(self, generator: random.Random) -> Any:
    """Samples a number uniformly, or uniformly in its logarithm."""
    return self._at(generator.random())

  @property
  def is_whole(self) -> bool:
    """Whether the numbers are integers."""
    return isinstance(self.low, int) and isinstance(self.high, int)

  def _at(self, share: float) -> Any:
    """Returns the number at a fraction of the range."""
    if share in (0.0, 1.0):
      return self.high if share else self.low
    if self.is_log:
      low, high = math.log(self.low), math.log(self.high)
      value = math.exp(low + share * (high - low))
    else:
      value = self.low + share * (self.high - self.low)
    # Four digits distinguish two trials and are readable.
    return round(value) if self.is_whole else float(f"{value:.4g}")


Domain = Union[Choice, Range]


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


class Constraint:
  """A condition that every point must meet.

  Args:
    text: a Python expression over swept names; a reference such as `@TripletLoss()` is
      compared as text by its name.
    names: the names it may use.

  Raises:
    UserError: it does not parse, uses a name that is not swept, or is not a condition.
  """

  def __init__(self, text: str, names: Mapping[str, Any]):
    self.text = text
    try:
      self._expression = ast.parse(str(text), mode="eval").body
    except SyntaxError as error:
      raise UserError(
        f"sweep.constraints: {text!r} is no expression: {error.msg}."
      ) from error
    self.holds(names)

  def holds(self, values: Mapping[str, Any]) -> bool:
    """Returns whether it is true for these values.

    Args:
      values: by swept name.

    Raises:
      UserError: it cannot be evaluated.
    """
    try:
      return bool(self._value(self._expression, values))
    except (TypeError, ZeroDivisionError) as error:
      raise UserError(f"sweep.constraints: {self.text!r}: {error}.") from error

  def _value(self, node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
      return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
      return [self._value(item, values) for item in node.elts]
    if isinstance(node, (ast.Name, ast.Attribute)):
      return self._named(ast.unparse(node), values)
    if isinstance(node, ast.BoolOp):
      is_and = isinstance(node.op, ast.And)
      parts = (self._value(part, values) for part in node.values)
      return all(parts) if is_and else any(parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
      value = self._value(node.operand, values)
      return not value if isinstance(node.op, ast.Not) else -value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
      left, right = self._value(node.left, values), self._value(node.right, values)
      return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.Compare) and all(type(op) in _BINARY for op in node.ops):
      sides = [self._value(side, values) for side in (node.left, *node.comparators)]
      pairs = zip(node.ops, sides, sides[1:])
      return all(_BINARY[type(op)](left, right) for op, left, right in pairs)
    raise UserError(
      f"sweep.constraints: {ast.unparse(node)!r} in {self.text!r} is more than "
      "arithmetic and comparison."
    )

  def _named(self, name: str, values: Mapping[str, Any]) -> Any:
    if name not in values:
      nearest = (
        gin_statements.nearest_name(name, values) or f"; swept are {', '.join(values)}"
      )
      raise UserError(f"sweep.constraints: {self.text!r}: {name} is not swept{nearest}")
    value = values[name]
    return value.name if isinstance(value, Reference) else value


@dataclasses.dataclass(frozen=True)
class SweepOptions:
  """Options of a sweep, `sweep.NAME = ...`.

  Attributes:
    method: "grid", "random", or "tpe" (Optuna), which uses results of finished trials.
    metric: the objective, from `eval/metrics.json` or `metrics.jsonl`.
    goal: "maximize" or "minimize".
    num_trials: number of points for random and tpe.
    seeds: each point is run once per seed.
    seed_name: the gin name that takes the seed.
    search_seed: random seed of random and tpe.
    constraints: conditions that a point must meet.
    prune_metric: from `metrics.jsonl`; tpe stops a run whose value is worse than the
      median of the others at that step.
    prune_goal: "maximize" or "minimize", for `prune_metric`.
    mode: mode of each run.
  """

  method: str = "grid"
  metric: str = "eval/map_at_r"
  goal: str = "maximize"
  num_trials: Optional[int] = None
  seeds: Sequence[int] = ()
  seed_name: str = "SEED"
  search_seed: int = 0
  constraints: Sequence[str] = ()
  prune_metric: Optional[str] = None
  prune_goal: str = "minimize"
  mode: str = "train_and_evaluate"

  def __post_init__(self):
    _check_one_of("method", self.method, METHODS)
    _check_one_of("goal", self.goal, GOALS)
    _check_one_of("prune_goal", self.prune_goal, GOALS)
    _check_one_of("mode", self.mode, MODES)
    if self.method == "grid" and self.num_trials is not None:
      raise UserError("sweep.num_trials: a grid has as many as it has; remove it.")
    if self.method != "grid" and not self.num_trials:
      raise UserError(f"sweep.method='{self.method}' needs sweep.num_trials.")
    if self.prune_metric and self.method != "tpe":
      raise UserError("sweep.prune_metric needs sweep.method='tpe'.")
    if len(set(self.seeds)) < len(self.seeds):
      raise UserError(f"sweep.seeds={self.seeds!r} has one twice.")


@dataclasses.dataclass(frozen=True)
class Spec:
  """Content of a sweep file.

  Attributes:
    name: of the file.
    options: of the sweep.
    base: bindings of all points, each name once.
    swept: swept bindings by gin name, with the values of their domains.
    domains: by gin name.
    constraints: conditions that a point must meet.
  """

  name: str
  options: SweepOptions
  base: Sequence[Statement]
  swept: Mapping[str, Binding]
  domains: Mapping[str, Domain]
  constraints: Sequence[Constraint]


def read_spec(path: str) -> Spec:
  """Reads a sweep file.

  Raises:
    UserError: it is missing, does not parse, or is inconsistent.
  """
  given = gin_statements.read_statements([path], [])
  gin_resolution.import_modules(given)
  bindings = [s for s in given if isinstance(s, Binding)]
  options = _options([b for b in bindings if _is_option(b)])
  swept: dict[str, Binding] = {}
  for statement in bindings:
    if _is_swept(statement):
      unscoped = dataclasses.replace(statement, scope="")
      swept[unscoped.key] = statement
  if not swept and not options.seeds:
    raise UserError(
      f"{path}: nothing is swept; write for example choice/MARGIN = (0.1, 0.2)."
    )
  if options.seeds and options.seed_name in swept:
    raise UserError(
      f"{path}: {options.seed_name} is swept and takes sweep.seeds; remove one of them."
    )
  by_name = {name: read_domain(binding) for name, binding in swept.items()}
  first = {name: domain.extremes()[0] for name, domain in by_name.items()}
  return Spec(
    name=os.path.splitext(os.path.basename(path))[0],
    options=options,
    base=_in_effect([s for s in given if not _is_option(s) and not _is_swept(s)]),
    swept={name: dataclasses.replace(b, scope="") for name, b in swept.items()},
    domains=by_name,
    constraints=[Constraint(text, first) for text in options.constraints],
  )


def _is_option(statement: Statement) -> bool:
  return (
    isinstance(statement, Binding)
    and (statement.scope, statement.name) == ("", "sweep")
    and bool(statement.parameter)
  )


def _is_swept(statement: Statement) -> bool:
  """Returns whether the scope is a kind of domain, or a misspelt one."""
  if not isinstance(statement, Binding) or not statement.scope:
    return False
  return statement.scope in KINDS or bool(
    gin_statements.nearest_name(statement.scope, KINDS)
  )


def _options(bindings: Sequence[Binding]) -> SweepOptions:
  known = [field.name for field in dataclasses.fields(SweepOptions)]
  for binding in bindings:
    if binding.parameter not in known:
      nearest = gin_statements.nearest_name(binding.parameter, known)
      every = f"; it has {', '.join(known)}"
      raise UserError(
        f"{binding.origin}: sweep has no {binding.parameter!r}{nearest or every}"
      )
  values = {binding.parameter: binding.value for binding in bindings}
  for name in ("seeds", "constraints"):
    if not isinstance(values.get(name, ()), (list, tuple)):
      raise UserError(f"sweep.{name}={values[name]!r} must be a list.")
  return SweepOptions(**values)


def _in_effect(given: Sequence[Statement]) -> list[Statement]:
  """Returns each name once, with its last value; imports are kept."""
  gin_resolution.log_overrides([s for s in given if isinstance(s, Binding)])
  by_key: dict[Any, Statement] = {}
  for statement in given:
    is_binding = isinstance(statement, Binding)
    by_key[gin_resolution.identity(statement) if is_binding else statement] = statement  # type: ignore[arg-type]
  return list(by_key.values())


def _check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
  if value not in allowed:
    raise UserError(
      f"sweep.{name}={value!r} is none of {', '.join(allowed)}"
      f"{gin_statements.nearest_name(str(value), allowed)}"
    )
