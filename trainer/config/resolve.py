"""From bindings to what the roots receive: macros substituted, references followed.

The walk mirrors gin's own rules: the bindings of an outer scope hold in an inner one, a
reference with scopes replaces the scope, one without keeps it, and a macro is evaluated
in a scope of its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from trainer import errors
from trainer.config import lint, registry
from trainer.config.statements import Binding, Macro, Reference


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
    part = registry.find(root, "")
    if part is not None and (root in needed or walk.binds(part)):
      walk.visit_part(part, _Place(root, (), ""), is_call=False)
  return Resolved(walk.values, frozenset(walk.used), walk.missing)


class _Walk:
  """Collects values, used bindings and missing parameters along the references."""

  def __init__(self, bindings: Sequence[Binding]):
    self._bindings = {lint.identity(binding): binding for binding in bindings}
    self._macros = {b.key: b for b in bindings if not b.parameter}
    self.values: dict[str, str] = {}
    self.used: set[Binding] = set()
    self.missing: list[str] = []

  def binds(self, part: registry.Part) -> bool:
    """Whether any parameter of the part is bound outside scopes."""
    return any(key[:2] == ("", part.selector) for key in self._bindings)

  def visit_part(self, part: registry.Part, place: _Place, is_call: bool) -> None:
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
      part = lint.known_part(value.name, place.origin)
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

  def _bound(self, part: registry.Part, scopes: tuple[str, ...]) -> dict[str, Binding]:
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
    and registry.is_constant(value.name)
    and registry.is_required_marker(value.name)
  )
