"""What gin has registered: the one place that reads gin's private tables.

Gin 0.5 offers no public way to list registered names or to see a signature before the
call, and the lint needs both.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Optional

import gin
from gin import config as gin_config

from trainer import errors

_OWN = ("gin.macro", "gin.constant")


@dataclasses.dataclass(frozen=True)
class Part:
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


def find(name: str, origin: str) -> Optional[Part]:
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


def names() -> list[str]:
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


def _describe(configurable: gin_config.Configurable) -> Part:
  """What the lint needs to know of a registered function or class."""
  signature = inspect.signature(configurable.wrapped).parameters.values()
  hidden = set(configurable.denylist or ())
  if configurable.allowlist:
    hidden |= {p.name for p in signature} - set(configurable.allowlist)
  variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  bindable = [p for p in signature if p.kind not in variable and p.name not in hidden]
  required = [p for p in bindable if p.default is p.empty or p.default is gin.REQUIRED]
  return Part(
    selector=configurable.selector,
    name=gin_config._REGISTRY.minimal_selector(configurable.selector),
    parameters=frozenset(p.name for p in bindable),
    required=frozenset(p.name for p in required),
    supplied=frozenset(p.name for p in required if p.kind is not p.KEYWORD_ONLY),
    is_open=any(p.kind is p.VAR_KEYWORD for p in signature),
  )
