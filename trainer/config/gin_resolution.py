"""Checks of gin statements, and the values that reach the roots.

The checks need the registered names and their signatures before any call. Gin 0.5 has
no public API for either.

The traversal follows gin's own rules. Bindings of an outer scope apply in an inner one.
A reference with scopes replaces the current scope, and one without scopes keeps it. A
macro is evaluated in a scope of its name.
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

_GIN_INTERNAL = ("gin.macro", "gin.constant")
# Names of parts and parameters before the first release, with their new names. The
# table will be removed in the second release.
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
  "selection": "early_stopping",
  "schedule_fn": "sampler_fn",
  "memory_bank": "cross_batch_memory",
  "when_not_finite": "on_nonfinite",
  "max_not_finite": "max_nonfinite_steps",
  "when_disk_full": "on_disk_full",
  "with_neighbouring_classes": "neighbouring_class_sampler",
  "hard_share": "hard_fraction",
  "min_share": "min_fraction",
  "share": "side_fraction",
  "changes": "transforms",
}

_MACRO_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_IMPORTABLE = ("trainer", "tensorflow", "tensorflow_addons")


@dataclasses.dataclass(frozen=True)
class Registered:
  """A registered function or class.

  Attributes:
    selector: full name, including the module.
    name: shortest unambiguous name.
    parameters: all parameters that can be bound.
    required: bindable parameters without a default; gin passes keywords only.
    supplied: those of `required` that the caller may pass as positional arguments.
    is_open: whether it accepts arbitrary keywords.
  """

  selector: str
  name: str
  parameters: frozenset[str]
  required: frozenset[str]
  supplied: frozenset[str]
  is_open: bool

  def accepts(self, parameter: str) -> bool:
    """Returns whether the parameter can be bound."""
    return self.is_open or parameter in self.parameters


def find_registered(name: str, origin: str) -> Optional[Registered]:
  """Returns the part with this name, or None.

  Raises:
    UserError: the name is ambiguous.
  """
  matching = gin_config._REGISTRY.matching_selectors(name)
  if len(matching) > 1:
    raise errors.UserError(
      f"{origin}: {name!r} is ambiguous; write one of {', '.join(sorted(matching))}."
    )
  return _describe(gin_config._REGISTRY[matching[0]]) if matching else None


def registered_names() -> list[str]:
  """Returns the short names of all parts that a config can bind."""
  selectors = [selector for selector, _ in gin_config._REGISTRY.items()]
  return [
    gin_config._REGISTRY.minimal_selector(selector)
    for selector in selectors
    if selector not in _GIN_INTERNAL
  ]


def is_constant(name: str) -> bool:
  """Returns whether `%name` is one of gin's constants rather than a macro."""
  return len(gin_config._CONSTANTS.matching_selectors(name)) == 1


def _describe(configurable: gin_config.Configurable) -> Registered:
  """Returns the description of a registered function or class."""
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


def import_modules(
  statements: Sequence[Statement], allowed: Sequence[str] = ()
) -> None:
  """Executes the import statements, which register the modules' parts.

  Args:
    statements: statements; all but imports are skipped.
    allowed: modules that may be imported, including their submodules, in addition to
      this package's and TensorFlow's.

  Raises:
    UserError: the module is not allowed, or cannot be imported.
  """
  importable = (*_IMPORTABLE, *allowed)
  for statement in statements:
    if not isinstance(statement, Import):
      continue
    module = statement.module
    if not any(module == name or module.startswith(f"{name}.") for name in importable):
      raise errors.UserError(
        f"{statement.origin}: import of {module!r}; a gin file may only import from "
        f"{', '.join(importable)}; if you trust it, add --allow_gin_import={module}."
      )
    try:
      importlib.import_module(statement.module)
    except ImportError as error:
      raise errors.UserError(
        f"{statement.origin}: cannot import {statement.module!r}: {error}"
      ) from error


def check_names(bindings: Sequence[Binding]) -> None:
  """Raises if a name is unknown.

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
  """Logs each binding in a file that overrides a different value of an earlier one.

  A file may override what it includes, and a file of the command line may override the
  files before it. Such overrides are logged at debug level. All others are warnings:
  two included files or two lines of one file disagree, or an include follows the line
  that it overrides.
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
  """Returns whether the later file includes the earlier, or is of the command line."""
  *_, file = later.files
  is_of_command_line = len(later.files) == 1
  return file in earlier.files[:-1] or (
    is_of_command_line and file != earlier.files[-1]
  )


def identity(binding: Binding) -> tuple[str, str, str]:
  """Returns scope, full name and parameter, which identify what a binding sets."""
  if not binding.parameter:
    return binding.scope, binding.name, ""
  part = known_part(binding.name, binding.origin)
  return binding.scope, part.selector, binding.parameter


def leaves(value: Any) -> Iterator[Any]:
  """Yields every value in nested lists, tuples and dicts, including dict keys."""
  if isinstance(value, dict):
    for item in value.items():
      yield from leaves(item)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from leaves(item)
  else:
    yield value


def known_part(name: str, origin: str) -> Registered:
  """Returns the part with this name; raises if it is unknown."""
  part = find_registered(name, origin)
  if part is None:
    nearest = _renamed(name) or gin_statements.nearest_name(name, registered_names())
    raise errors.UserError(f"{origin}: no part is called {name!r}{nearest}")
  return part


def _renamed(name: str) -> str:
  """Returns the hint for a name that was changed; empty for other names."""
  new_name = _RENAMED.get(name.rsplit(".", 1)[-1])
  return f"; it was renamed to {new_name!r}." if new_name else ""


def _check_parameter(binding: Binding) -> None:
  """Raises if the part does not have the parameter."""
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
  """Raises if neither a binding nor gin sets `%NAME`."""
  if macro.name not in macros and not is_constant(macro.name):
    nearest = gin_statements.nearest_name(macro.name, macros)
    raise errors.UserError(
      f"{origin}: nothing sets %{macro.name}{nearest or f'; add {macro.name} = ...'}"
    )


def _not_a_macro(binding: Binding) -> str:
  """Returns the message for `name = value` if the name is not a valid macro name."""
  owners = [
    f"{name}.{binding.name}"
    for name in registered_names()
    if binding.name in known_part(name, "").parameters
  ]
  example = owners[0] if owners else f"Part.{binding.name}"
  return (
    f"{binding.origin}: {binding.key!r} names no part, and macros are UPPERCASE; write "
    f"{example} = ... or {binding.name.upper()} = ..."
  )


@dataclasses.dataclass(frozen=True)
class Resolved:
  """The result of following references from the roots.

  Attributes:
    values: values by path, such as `train.loss.margin`, each in canonical spelling.
    used: the bindings and macros that were reached.
    missing: a message for each required parameter that is not set.
  """

  values: Mapping[str, str]
  used: frozenset[Binding]
  missing: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Position:
  """A position in the tree of values, and the scope in which gin evaluates it."""

  path: str
  scopes: tuple[str, ...]
  origin: str
  within: tuple[Any, ...] = ()


def resolve(
  bindings: Sequence[Binding], roots: Sequence[str], needed: Sequence[str]
) -> Resolved:
  """Follows the references from every registered root.

  Args:
    bindings: bindings in effect; of two for the same parameter, the later one applies.
    roots: names of the configurables that are called without being referenced.
    needed: roots that will be called. Missing parameters of other roots are reported
      only if some parameter of the root is bound.

  Raises:
    UserError: a part or a macro contains itself.
  """
  traversal = _Traversal(bindings)
  for root in roots:
    part = find_registered(root, "")
    if part is not None and (root in needed or traversal.binds(part)):
      traversal.visit_part(part, _Position(root, (), ""), is_call=False)
  return Resolved(traversal.values, frozenset(traversal.used), traversal.missing)


class _Traversal:
  """Traversal that collects values, used bindings and missing parameters."""

  def __init__(self, bindings: Sequence[Binding]):
    self._bindings = {identity(binding): binding for binding in bindings}
    self._macros = {b.key: b for b in bindings if not b.parameter}
    self.values: dict[str, str] = {}
    self.used: set[Binding] = set()
    self.missing: list[str] = []

  def binds(self, part: Registered) -> bool:
    """Returns whether any parameter of the part is bound outside scopes."""
    return any(key[:2] == ("", part.selector) for key in self._bindings)

  def visit_part(self, part: Registered, position: _Position, is_call: bool) -> None:
    """Visits the parameters of a part that is referenced at this position."""
    within = self._enter(position, (position.scopes, part.selector), part.name)
    bound = self._bound(part, position.scopes)
    required = part.required if is_call else part.required - part.supplied
    for parameter in sorted(required - set(bound)):
      self._report_missing(f"{part.name}.{parameter}", position)
    for parameter, binding in sorted(bound.items()):
      self.used.add(binding)
      path = f"{position.path}.{parameter}"
      inner = _Position(path, position.scopes, binding.origin, within)
      if _is_required_marker(binding.value):
        self._report_missing(f"{part.name}.{parameter}", inner)
      else:
        self.values[path] = self.visit_value(binding.value, inner)

  def visit_value(self, value: Any, position: _Position) -> str:
    """Visits the contents of a value.

    Returns:
      The value in its canonical spelling.
    """
    if isinstance(value, Macro):
      return self._visit_macro(value, position)
    if isinstance(value, Reference):
      part = known_part(value.name, position.origin)
      scopes = value.scopes or position.scopes
      self.visit_part(part, dataclasses.replace(position, scopes=scopes), value.is_call)
      return repr(Reference((), part.name, value.is_call))
    if isinstance(value, dict):
      items = sorted(value.items(), key=lambda item: repr(item[0]))
      texts = [
        f"{key!r}: {self._visit_item(key, item, position)}" for key, item in items
      ]
      return f"{{{', '.join(texts)}}}"
    if isinstance(value, (list, tuple)):
      texts = [self._visit_item(i, item, position) for i, item in enumerate(value)]
      start, end = "()" if isinstance(value, tuple) else "[]"
      return f"{start}{', '.join(texts)}{end}"
    return repr(value)

  def _visit_item(self, key: Any, value: Any, position: _Position) -> str:
    """Visits an element of a container."""
    return self.visit_value(
      value, dataclasses.replace(position, path=f"{position.path}[{key!r}]")
    )

  def _visit_macro(self, macro: Macro, position: _Position) -> str:
    """Visits the value of a macro."""
    binding = self._macros.get(macro.name)
    if binding is None:
      return repr(macro)
    self.used.add(binding)
    within = self._enter(position, macro, repr(macro))
    scopes = tuple(macro.name.split("/"))
    return self.visit_value(
      binding.value, _Position(position.path, scopes, binding.origin, within)
    )

  def _bound(self, part: Registered, scopes: tuple[str, ...]) -> dict[str, Binding]:
    """Returns the bindings of a part; inner scopes override outer ones."""
    bound = {}
    for depth in range(len(scopes) + 1):
      scope = "/".join(scopes[:depth])
      for (its_scope, selector, parameter), binding in self._bindings.items():
        if parameter and (its_scope, selector) == (scope, part.selector):
          self.used.add(binding)
          bound[parameter] = binding
    return bound

  def _enter(self, position: _Position, what: Any, name: str) -> tuple[Any, ...]:
    """Returns the visited names with one more; raises on infinite recursion."""
    if what in position.within:
      raise errors.UserError(
        f"{position.origin}: {name} contains itself, through {position.path}."
      )
    return (*position.within, what)

  def _report_missing(self, key: str, position: _Position) -> None:
    """Records a required parameter that is not set, once."""
    where = f"{position.origin}: " if position.origin else ""
    message = f"{where}{key} must be set; e.g. --gin_param='{key}=...'"
    if message not in self.missing:
      self.missing.append(message)


def _is_required_marker(value: Any) -> bool:
  """Returns whether the value is `%gin.REQUIRED`."""
  return (
    isinstance(value, Macro)
    and is_constant(value.name)
    and gin_config._CONSTANTS.get_match(value.name) is gin.REQUIRED
  )
