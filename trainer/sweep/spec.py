"""The sweep file: a gin file, in which some names have several values.

include '../runs/digits.gin'
NUM_STEPS = 100

choice/MARGIN = (0.1, 0.3)
range/PKSchedule.classes_per_batch = (2, 6, 3)
log_range/LEARNING_RATE = (1e-4, 1e-2, 3)

sweep.method = 'grid'
sweep.seeds = (1, 2, 3)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from trainer.config import lint, statements, suggest
from trainer.config.statements import Binding, Statement
from trainer.errors import UserError
from trainer.sweep import domains
from trainer.sweep.constraints import Constraint

METHODS = ("grid", "random", "tpe")
GOALS = ("maximize", "minimize")
MODES = ("train", "train_and_evaluate")


@dataclasses.dataclass(frozen=True)
class Options:
  """`sweep.NAME = ...`.

  Attributes:
    method: "grid", "random", or "tpe", which learns from what has finished (Optuna).
    metric: what decides, of `eval/metrics.json` or `metrics.jsonl`.
    goal: "maximize" or "minimize".
    num_trials: how many points random and tpe try.
    seeds: each point is run once for each.
    seed_name: the gin name that takes the seed.
    search_seed: of random and tpe.
    constraints: conditions that a point must meet.
    prune_metric: of `metrics.jsonl`; tpe stops a run that is worse in it than the
      median of the others at that step.
    prune_goal: "maximize" or "minimize", of `prune_metric`.
    mode: what each run does.
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
  """What a sweep file says.

  Attributes:
    name: of the file.
    options: how to search.
    base: what all points have, each name once.
    swept: what varies, by gin name, as bindings whose values are the domains'.
    domains: by gin name.
    constraints: that a point must meet.
  """

  name: str
  options: Options
  base: Sequence[Statement]
  swept: Mapping[str, Binding]
  domains: Mapping[str, domains.Domain]
  constraints: Sequence[Constraint]


def read(path: str) -> Spec:
  """Reads a sweep file.

  Raises:
    UserError: it is missing, does not parse, or says what can't be.
  """
  given = statements.read([path], [])
  lint.import_modules(given)
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
  by_name = {name: domains.read(binding) for name, binding in swept.items()}
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
  """Whether the scope is a domain's kind, or one that a part of it was meant to be."""
  if not isinstance(statement, Binding) or not statement.scope:
    return False
  return statement.scope in domains.KINDS or bool(
    suggest.nearest(statement.scope, domains.KINDS)
  )


def _options(bindings: Sequence[Binding]) -> Options:
  known = [field.name for field in dataclasses.fields(Options)]
  for binding in bindings:
    if binding.parameter not in known:
      nearest = suggest.nearest(binding.parameter, known)
      every = f"; it has {', '.join(known)}"
      raise UserError(
        f"{binding.origin}: sweep has no {binding.parameter!r}{nearest or every}"
      )
  values = {binding.parameter: binding.value for binding in bindings}
  for name in ("seeds", "constraints"):
    if not isinstance(values.get(name, ()), (list, tuple)):
      raise UserError(f"sweep.{name}={values[name]!r} must be a list.")
  return Options(**values)


def _in_effect(given: Sequence[Statement]) -> list[Statement]:
  """Each name once, with its last value; imports stay."""
  lint.log_overrides([s for s in given if isinstance(s, Binding)])
  by_key: dict[Any, Statement] = {}
  for statement in given:
    is_binding = isinstance(statement, Binding)
    by_key[lint.identity(statement) if is_binding else statement] = statement  # type: ignore[arg-type]
  return list(by_key.values())


def _check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
  if value not in allowed:
    raise UserError(
      f"sweep.{name}={value!r} is none of {', '.join(allowed)}"
      f"{suggest.nearest(str(value), allowed)}"
    )
