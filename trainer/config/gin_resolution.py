"""Checks of gin statements, and the values that they give to the roots.

Gin 0.5 offers no public way to list registered names or to see a signature before the
call, and the lint needs both.

The walk mirrors gin's own rules: the bindings of an outer scope hold in an inner one, a
reference with scopes replaces the scope, one without keeps it, and a macro is evaluated
in a scope of its name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import gin
from absl import logging
from gin import config as gin_config

from trainer import errors
from trainer.config import gin_statements
from trainer.config.gin_statements import Binding, Import, Macro, Reference, Statement

_OWN = ("gin.macro", "gin.constant")
# Names of parts and parameters before the first release, and what they are now. The
# table goes with the second release.
_RENAMED = {
  "PKSchedule": "PKSampler",
  "TripletSchedule": "TripletSampler",
  "OneGroupSchedule": "GroupedSampler",
  "with_hard_classes": "HardClassSampler",
  "with_lone_images": "SingletonSampler",
  "num_lone_rows": "num_singleton_rows",
  "MinedGroups": "MinedTripletSampler",
  "PerPart": "MultiOptimizer",
  "MemoryBank": "CrossBatchMemory",
  "ActivePace": "AdaptivePace",
  "RecordsInPlace": "ExistingTFRecords",
  "Selection": "EarlyStopping",
  "across_replicas": "global_negatives",
  "per_replica": "local_negatives",
  "seed_batch_all": "omoindrot_batch_all",
  "seed_batch_hard": "omoindrot_batch_hard",
  "schedule_fn": "sampler_fn",
  "memory_bank": "cross_batch_memory",
  "when_not_finite": "on_nonfinite",
  "when_disk_full": "on_disk_full",
}


@dataclasses.dataclass(frozen=True)
class Registered:
  """A registered function or class.

  Attributes:
    selector: its full name with the module.
    name: the shortest name that is clear.
    parameters: all that can be bound.
    required: those without default that can be bound; gin passes keywords only.
    supplied: those of `required` that may be positional arguments of the caller.
    is_open: whether it takes any further keyword.
  """

  selector: str
  name: str
  parameters: frozenset[str]
  required: frozenset[str]
  supplied: frozenset[str]
  is_open: bool

  def accepts(self, parameter: str) -> bool:
    """Whether the parameter can be bound."""
    return self.is_open or parameter in self.parameters


def find_registered(name: str, origin: str) -> Optional[Registered]:
  """The part of this name, or None.

  Raises:
    UserError: several parts have the name.
  """
  matching = gin_config._REGISTRY.matching_selectors(name)
  if len(matching) > 1:
    raise errors.UserError(
      f"{origin}: {name!r} is ambiguous; write one of {', '.join(sorted(matching))}."
    )
  return _describe(gin_config._REGISTRY[matching[0]]) if matching else None


def registered_names() -> list[str]:
  """The short names of all parts that a config can bind."""
  selectors = [selector for selector, _ in gin_config._REGISTRY.items()]
  return [
    gin_config._REGISTRY.minimal_selector(selector)
    for selector in selectors
    if selector not in _OWN
  ]


def is_constant(name: str) -> bool:
  """Whether `%name` is one of gin's constants and no macro."""
  return len(gin_config._CONSTANTS.matching_selectors(name)) == 1


def is_required_marker(name: str) -> bool:
  """Whether `%name` is gin's mark for a value that must still be set."""
  return gin_config._CONSTANTS.get_match(name) is gin.REQUIRED


def _describe(configurable: gin_config.Configurable) -> Registered:
  """What the lint needs to know of a registered function or class."""
  signature = inspect.signature(configurable.wrapped).parameters.values()
  hidden = set(configurable.denylist or ())
  if configurable.allowlist:
    hidden |= {p.name for p in signature} - set(configurable.allowlist)
  variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  bindable = [p for p in signature if p.kind not in variable and p.name not in hidden]
  required = [p for p in bindable if p.default is p.empty or p.default is gin.REQUIRED]
  return Registered(
    selector=configurable.selector,
    name=gin_config._REGISTRY.minimal_selector(configurable.selector),
    parameters=frozenset(p.name for p in bindable),
    required=frozenset(p.name for p in required),
    supplied=frozenset(p.name for p in required if p.kind is not p.KEYWORD_ONLY),
    is_open=any(p.kind is p.VAR_KEYWORD for p in signature),
  )


_MACRO_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_IMPORTABLE = ("trainer", "tensorflow", "tensorflow_addons")


def import_modules(
  statements: Sequence[Statement], allowed: Sequence[str] = ()
) -> None:
  """Runs the import statements, so that the modules register their parts.

  Args:
    statements: those that are no imports are passed over.
    allowed: modules that may be imported, with those inside of them, beside this
      package's and TensorFlow's.

  Raises:
    UserError: the module is of another package, or cannot be imported.
  """
  importable = (*_IMPORTABLE, *allowed)
  for statement in statements:
    if not isinstance(statement, Import):
      continue
    module = statement.module
    if not any(module == name or module.startswith(f"{name}.") for name in importable):
      raise errors.UserError(
        f"{statement.origin}: import of {module!r}; a gin file may import from "
        f"{', '.join(importable)} only; if you trust it, add "
        f"--allow_gin_import={module}."
      )
    try:
      importlib.import_module(statement.module)
    except ImportError as error:
      raise errors.UserError(
        f"{statement.origin}: cannot import {statement.module!r}: {error}"
      ) from error


def check_names(bindings: Sequence[Binding]) -> None:
  """Refuses names that stand for nothing.

  Raises:
    UserError: an unknown part, parameter or macro, or a lower-case macro.
  """
  macros = [binding.key for binding in bindings if not binding.parameter]
  for binding in bindings:
    if binding.parameter:
      _check_parameter(binding)
    elif not _MACRO_NAME.fullmatch(binding.name):
      raise errors.UserError(_not_a_macro(binding))
    for value in leaves(binding.value):
      if isinstance(value, Reference):
        known_part(value.name, binding.origin)
      elif isinstance(value, Macro):
        _check_macro(value, macros, binding.origin)


def log_overrides(bindings: Sequence[Binding]) -> None:
  """Logs each binding in a file that replaces another value of an earlier one.

  A file may replace what it includes, and a file of the command line what came before
  it: that is logged for debugging. Any other replacement is a warning: two included
  files or two lines of one file disagree, or an include follows the line it replaces.
  """
  in_effect: dict[tuple[str, str, str], Binding] = {}
  for binding in bindings:
    if binding.is_flag:
      continue
    earlier = in_effect.get(identity(binding))
    in_effect[identity(binding)] = binding
    if earlier is None or repr(earlier.value) == repr(binding.value):
      continue
    log_fn = logging.debug if _is_intended(earlier, binding) else logging.warning
    log_fn(
      "%s: %s replaces the value %r of %s.",
      *(binding.origin, binding, earlier.value, earlier.origin),
    )


def _is_intended(earlier: Binding, later: Binding) -> bool:
  """Whether the later file includes the earlier one, or is of the command line."""
  *_, file = later.files
  is_of_command_line = len(later.files) == 1
  return file in earlier.files[:-1] or (
    is_of_command_line and file != earlier.files[-1]
  )


def identity(binding: Binding) -> tuple[str, str, str]:
  """Scope, full name and parameter: equal for bindings that set the same."""
  if not binding.parameter:
    return binding.scope, binding.name, ""
  part = known_part(binding.name, binding.origin)
  return binding.scope, part.selector, binding.parameter


def leaves(value: Any) -> Iterator[Any]:
  """Every value inside nested lists, tuples and dicts, keys of dicts included."""
  if isinstance(value, dict):
    for item in value.items():
      yield from leaves(item)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from leaves(item)
  else:
    yield value


def known_part(name: str, origin: str) -> Registered:
  """The part of this name; refuses an unknown one."""
  part = find_registered(name, origin)
  if part is None:
    nearest = _renamed(name) or gin_statements.nearest_name(name, registered_names())
    raise errors.UserError(f"{origin}: there is no {name!r} to configure{nearest}")
  return part


def _renamed(name: str) -> str:
  """The end of a message about a name that has changed; empty for other names."""
  new_name = _RENAMED.get(name.rsplit(".", 1)[-1])
  return f"; it is called {new_name!r} now." if new_name else ""


def _check_parameter(binding: Binding) -> None:
  """Refuses a parameter that the part does not have."""
  part = known_part(binding.name, binding.origin)
  if not part.accepts(binding.parameter):
    nearest = _renamed(binding.parameter) or gin_statements.nearest_name(
      binding.parameter, part.parameters
    )
    every = f" It has: {', '.join(sorted(part.parameters)) or 'none'}."
    raise errors.UserError(
      f"{binding.origin}: {binding.name} has no parameter {binding.parameter!r}"
      f"{nearest or '.' + every}"
    )


def _check_macro(macro: Macro, macros: Sequence[str], origin: str) -> None:
  """Refuses `%NAME` that neither a binding nor gin itself sets."""
  if macro.name not in macros and not is_constant(macro.name):
    nearest = gin_statements.nearest_name(macro.name, macros)
    raise errors.UserError(
      f"{origin}: nothing sets %{macro.name}{nearest or f'; add {macro.name} = ...'}"
    )


def _not_a_macro(binding: Binding) -> str:
  """The message for `name = value` whose name is not that of a macro."""
  owners = [
    f"{name}.{binding.name}"
    for name in registered_names()
    if binding.name in known_part(name, "").parameters
  ]
  example = owners[0] if owners else f"Part.{binding.name}"
  return (
    f"{binding.origin}: {binding.key!r} has no part before it, and a macro is "
    f"UPPERCASE; write {example} = ... or {binding.name.upper()} = ..."
  )


@dataclasses.dataclass(frozen=True)
class Resolved:
  """What reaches the roots.

  Attributes:
    values: by path, such as `train.loss.margin`, each in one canonical spelling.
    used: the bindings and macros that took part.
    missing: a message for each parameter that must be set and is not.
  """

  values: Mapping[str, str]
  used: frozenset[Binding]
  missing: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where in the tree a value stands, and in which scope gin will evaluate it."""

  path: str
  scopes: tuple[str, ...]
  origin: str
  within: tuple[Any, ...] = ()


def resolve(
  bindings: Sequence[Binding], roots: Sequence[str], needed: Sequence[str]
) -> Resolved:
  """Follows the references from every root that is registered.

  Args:
    bindings: those in effect; of two for the same parameter the later one.
    roots: names of the configurables that are called without being referred to.
    needed: the roots that will be called; what another lacks is missing only when some
      of it is bound.

  Raises:
    UserError: a part or a macro contains itself.
  """
  walk = _Walk(bindings)
  for root in roots:
    part = find_registered(root, "")
    if part is not None and (root in needed or walk.binds(part)):
      walk.visit_part(part, _Place(root, (), ""), is_call=False)
  return Resolved(walk.values, frozenset(walk.used), walk.missing)


class _Walk:
  """Collects values, used bindings and missing parameters along the references."""

  def __init__(self, bindings: Sequence[Binding]):
    self._bindings = {identity(binding): binding for binding in bindings}
    self._macros = {b.key: b for b in bindings if not b.parameter}
    self.values: dict[str, str] = {}
    self.used: set[Binding] = set()
    self.missing: list[str] = []

  def binds(self, part: Registered) -> bool:
    """Whether any parameter of the part is bound outside scopes."""
    return any(key[:2] == ("", part.selector) for key in self._bindings)

  def visit_part(self, part: Registered, place: _Place, is_call: bool) -> None:
    """Visits the parameters of a part that is called at this place."""
    within = self._enter(place, (place.scopes, part.selector), part.name)
    bound = self._bound(part, place.scopes)
    required = part.required if is_call else part.required - part.supplied
    for parameter in sorted(required - set(bound)):
      self._report_missing(f"{part.name}.{parameter}", place)
    for parameter, binding in sorted(bound.items()):
      self.used.add(binding)
      path = f"{place.path}.{parameter}"
      inner = _Place(path, place.scopes, binding.origin, within)
      if _is_required_marker(binding.value):
        self._report_missing(f"{part.name}.{parameter}", inner)
      else:
        self.values[path] = self.visit_value(binding.value, inner)

  def visit_value(self, value: Any, place: _Place) -> str:
    """Visits what is inside a value.

    Returns:
      The value in its canonical spelling.
    """
    if isinstance(value, Macro):
      return self._visit_macro(value, place)
    if isinstance(value, Reference):
      part = known_part(value.name, place.origin)
      scopes = value.scopes or place.scopes
      self.visit_part(part, dataclasses.replace(place, scopes=scopes), value.is_call)
      return repr(Reference((), part.name, value.is_call))
    if isinstance(value, dict):
      items = sorted(value.items(), key=lambda item: repr(item[0]))
      texts = [f"{key!r}: {self._visit_item(key, item, place)}" for key, item in items]
      return f"{{{', '.join(texts)}}}"
    if isinstance(value, (list, tuple)):
      texts = [self._visit_item(i, item, place) for i, item in enumerate(value)]
      start, end = "()" if isinstance(value, tuple) else "[]"
      return f"{start}{', '.join(texts)}{end}"
    return repr(value)

  def _visit_item(self, key: Any, value: Any, place: _Place) -> str:
    """Visits an element of a container."""
    return self.visit_value(
      value, dataclasses.replace(place, path=f"{place.path}[{key!r}]")
    )

  def _visit_macro(self, macro: Macro, place: _Place) -> str:
    """Visits the value that the macro stands for."""
    binding = self._macros.get(macro.name)
    if binding is None:
      return repr(macro)
    self.used.add(binding)
    within = self._enter(place, macro, repr(macro))
    scopes = tuple(macro.name.split("/"))
    return self.visit_value(
      binding.value, _Place(place.path, scopes, binding.origin, within)
    )

  def _bound(self, part: Registered, scopes: tuple[str, ...]) -> dict[str, Binding]:
    """The bindings of a part, those of inner scopes over those of outer ones."""
    bound = {}
    for depth in range(len(scopes) + 1):
      scope = "/".join(scopes[:depth])
      for (its_scope, selector, parameter), binding in self._bindings.items():
        if parameter and (its_scope, selector) == (scope, part.selector):
          self.used.add(binding)
          bound[parameter] = binding
    return bound

  def _enter(self, place: _Place, what: Any, name: str) -> tuple[Any, ...]:
    """What is being visited, with one more; refuses what would never end."""
    if what in place.within:
      raise errors.UserError(
        f"{place.origin}: {name} contains itself, by way of {place.path}."
      )
    return (*place.within, what)

  def _report_missing(self, key: str, place: _Place) -> None:
    """Notes a parameter that must be set, once."""
    where = f"{place.origin}: " if place.origin else ""
    message = f"{where}{key} must be set; e.g. --gin_param='{key}=...'"
    if message not in self.missing:
      self.missing.append(message)


def _is_required_marker(value: Any) -> bool:
  """Whether the value is `%gin.REQUIRED`."""
  return (
    isinstance(value, Macro)
    and is_constant(value.name)
    and is_required_marker(value.name)
  )
