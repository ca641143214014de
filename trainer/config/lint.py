"""What gin lets pass and a run must not: unknown, unset and lower-case names."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from trainer import errors
from trainer.config import registry, suggest
from trainer.config.statements import Binding, Import, Macro, Reference, Statement

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


def known_part(name: str, origin: str) -> registry.Part:
  """The part of this name; refuses an unknown one."""
  part = registry.find(name, origin)
  if part is None:
    nearest = suggest.nearest(name, registry.names())
    raise errors.UserError(f"{origin}: there is no {name!r} to configure{nearest}")
  return part


def _check_parameter(binding: Binding) -> None:
  """Refuses a parameter that the part does not have."""
  part = known_part(binding.name, binding.origin)
  if not part.accepts(binding.parameter):
    nearest = suggest.nearest(binding.parameter, part.parameters)
    every = f" It has: {', '.join(sorted(part.parameters)) or 'none'}."
    raise errors.UserError(
      f"{binding.origin}: {binding.name} has no parameter {binding.parameter!r}"
      f"{nearest or '.' + every}"
    )


def _check_macro(macro: Macro, macros: Sequence[str], origin: str) -> None:
  """Refuses `%NAME` that neither a binding nor gin itself sets."""
  if macro.name not in macros and not registry.is_constant(macro.name):
    nearest = suggest.nearest(macro.name, macros)
    raise errors.UserError(
      f"{origin}: nothing sets %{macro.name}{nearest or f'; add {macro.name} = ...'}"
    )


def _not_a_macro(binding: Binding) -> str:
  """The message for `name = value` whose name is not that of a macro."""
  owners = [
    f"{name}.{binding.name}"
    for name in registry.names()
    if binding.name in known_part(name, "").parameters
  ]
  example = owners[0] if owners else f"Part.{binding.name}"
  return (
    f"{binding.origin}: {binding.key!r} has no part before it, and a macro is "
    f"UPPERCASE; write {example} = ... or {binding.name.upper()} = ..."
  )
