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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional, Union

from trainer.config import gin_resolution, gin_statements
from trainer.config.gin_statements import Binding, Reference, Statement
from trainer.errors import UserError

KINDS = ("choice", "range", "log_range")

_OPERATORS: dict[type, Callable[..., Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.USub: operator.neg,
  ast.Not: operator.not_,
  ast.Eq: operator.eq,
  ast.NotEq: operator.ne,
  ast.Lt: operator.lt,
  ast.LtE: operator.le,
  ast.Gt: operator.gt,
  ast.GtE: operator.ge,
  ast.In: lambda left, right: left in right,
  ast.NotIn: lambda left, right: left not in right,
}
# Nodes of a constraint's syntax tree; anything else is refused.
_ALLOWED_NODES = (
  *(ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
  *(ast.Compare, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.BinOp, *_OPERATORS),
)
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


class Constraint:
  """A condition that every point must meet.

  Args:
    text: a Python expression over swept names; a reference such as `@TripletLoss()` is
      compared as text by its name.
    names: the names it may use, with an example of their values.

  Raises:
    UserError: it does not parse, uses a name that is not swept, or is not a condition.
  """

  def __init__(self, text: str, names: Mapping[str, Any]):
    self.text = text
    try:
      tree = _DottedNames().visit(ast.parse(str(text), mode="eval"))
    except SyntaxError as error:
      raise UserError(
        f"sweep.constraints: {text!r} is not an expression: {error.msg}."
      ) from error
    for node in ast.walk(tree.body):
      if not isinstance(node, _ALLOWED_NODES):
        raise UserError(
          f"sweep.constraints: {text!r} has more than arithmetic and comparison."
        )
      if isinstance(node, ast.Name) and node.id not in names:
        nearest = gin_statements.nearest_name(node.id, names)
        raise UserError(
          f"sweep.constraints: {text!r}: {node.id} is not swept"
          f"{nearest or '; swept are ' + ', '.join(names)}"
        )
    self._expression = tree.body
    self.holds(names)

  def holds(self, values: Mapping[str, Any]) -> bool:
    """Returns whether it is true for these values.

    Args:
      values: by swept name.

    Raises:
      UserError: it cannot be evaluated.
    """
    plain = {n: v.name if isinstance(v, Reference) else v for n, v in values.items()}
    try:
      return bool(_evaluate(self._expression, plain))
    except (TypeError, ZeroDivisionError) as error:
      raise UserError(f"sweep.constraints: {self.text!r}: {error}.") from error


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
  """Returns the value of an expression of `_ALLOWED_NODES`."""
  if isinstance(node, ast.Constant):
    return node.value
  if isinstance(node, ast.Name):
    return values[node.id]
  if isinstance(node, (ast.List, ast.Tuple)):
    return [_evaluate(each, values) for each in node.elts]
  if isinstance(node, ast.BoolOp):
    parts = (_evaluate(each, values) for each in node.values)
    return all(parts) if isinstance(node.op, ast.And) else any(parts)
  if isinstance(node, ast.UnaryOp):
    return _OPERATORS[type(node.op)](_evaluate(node.operand, values))
  if isinstance(node, ast.BinOp):
    sides = [_evaluate(each, values) for each in (node.left, node.right)]
    return _OPERATORS[type(node.op)](*sides)
  assert isinstance(node, ast.Compare)
  sides = [_evaluate(each, values) for each in (node.left, *node.comparators)]
  pairs = zip(node.ops, sides, sides[1:])
  return all(_OPERATORS[type(each)](left, right) for each, left, right in pairs)


class _DottedNames(ast.NodeTransformer):
  """Makes one name of the attributes `Name.parameter`."""

  def visit_Attribute(self, node: ast.Attribute) -> ast.Name:
    """Returns the name."""
    return ast.copy_location(ast.Name(ast.unparse(node), ast.Load()), node)


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
      raise UserError("sweep.num_trials: a grid runs all its points; remove it.")
    if self.method != "grid" and not self.num_trials:
      raise UserError(f"sweep.method='{self.method}' needs sweep.num_trials.")
    if self.prune_metric and self.method != "tpe":
      raise UserError("sweep.prune_metric needs sweep.method='tpe'.")
    if len(set(self.seeds)) < len(self.seeds):
      raise UserError(f"sweep.seeds={self.seeds!r} has duplicates; remove them.")


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

  @property
  def identity(self) -> dict[str, str]:
    """All values by name, without the number of trials, which may be raised later."""
    base = {s.key: repr(s.value) for s in self.base if isinstance(s, Binding)}
    swept = {name: repr(domain) for name, domain in self.domains.items()}
    options = {f"sweep.{k}": repr(v) for k, v in vars(self.options).items()}
    del options["sweep.num_trials"]
    return {**base, **swept, **options}

  def is_allowed(self, values: Mapping[str, Any]) -> bool:
    """Returns whether the values of the swept names meet every constraint."""
    return all(constraint.holds(values) for constraint in self.constraints)


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
      f"{path}: {options.seed_name} is swept and set by sweep.seeds; remove one."
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
        f"{binding.origin}: sweep has no option {binding.parameter!r}{nearest or every}"
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
      f"sweep.{name}={value!r} is not one of {', '.join(allowed)}"
      f"{gin_statements.nearest_name(str(value), allowed)}"
    )
