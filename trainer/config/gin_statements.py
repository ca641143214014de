"""Statements of gin files, each with its place.

Gin's own parser reads the statements. Includes are followed here, because gin looks for
them from the working directory, and an installed package is used from any.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Union

from gin import config_parser

from trainer import errors


def nearest_name(name: str, known: Iterable[str]) -> str:
  """`; did you mean 'x'?` for the known name nearest to `name`; "" if none is near.

  Case is ignored, since it is the commonest mistake of all.
  """
  by_lower_case = {candidate.lower(): candidate for candidate in sorted(known)}
  near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
  return f"; did you mean {by_lower_case[near[0]]!r}?" if near else ""


@dataclasses.dataclass(frozen=True)
class Reference:
  """`@scope/Name` or, called, `@scope/Name()`."""

  scopes: tuple[str, ...]
  name: str
  is_call: bool

  def __repr__(self):
    return f"@{'/'.join((*self.scopes, self.name))}{'()' if self.is_call else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
  """`%NAME`, the value of a macro or of one of gin's constants."""

  name: str

  def __repr__(self):
    return f"%{self.name}"


@dataclasses.dataclass(
  frozen=True, eq=False
)  # Hashed by identity: values may be lists.
class Binding:
  """`scope/Name.parameter = value`, or a macro: `NAME = value`, without parameter.

  Attributes:
    scope: "" for none.
    name: what is bound, as written.
    parameter: "" for a macro.
    value: a literal that may hold `Reference` and `Macro`.
    origin: `file:line`, or the flag.
    files: the file of the command line, each one included from there on, and last the
      one that holds the binding; none for a flag.
  """

  scope: str
  name: str
  parameter: str
  value: Any
  origin: str
  files: tuple[str, ...] = ()

  @property
  def key(self) -> str:
    """The left side, as written."""
    scoped = f"{self.scope}/{self.name}" if self.scope else self.name
    return f"{scoped}.{self.parameter}" if self.parameter else scoped

  @property
  def is_flag(self) -> bool:
    """Whether it was given on the command line."""
    return self.origin.startswith("--gin_param")

  def __str__(self):
    return f"{self.key} = {self.value!r}"


@dataclasses.dataclass(frozen=True)
class Import:
  """`import module`, so that the module registers its parts."""

  module: str
  origin: str

  def __str__(self):
    return f"import {self.module}"


Statement = Union[Binding, Import]


class _Syntax(config_parser.ParserDelegate):
  """Builds values without looking names up, so that every mistake is ours to tell."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    *scopes, name = scoped_configurable_name.split("/")
    return Reference(tuple(scopes), name, evaluate)

  def macro(self, macro_name):
    return Macro(macro_name)


def read_statements(
  gin_files: Sequence[str], gin_params: Sequence[str]
) -> list[Statement]:
  """Every statement of the files and then of the flags, in the order they take effect.

  Args:
    gin_files: paths, relative to the working directory.
    gin_params: statements such as `X.y = 1`; they override the files'.

  Raises:
    UserError: a file is missing, unreadable, includes itself, or does not parse.
  """
  statements: list[Statement] = []
  for path in gin_files:
    if not os.path.isfile(path):
      raise errors.UserError(_missing_file("--gin_file", path, [path]))
    statements += _read_file(path, ())
  for text in gin_params:
    origin = f"--gin_param={text!r}"
    statements += _parse(text, lambda line, origin=origin: origin, "", ())
  return statements


def _read_file(path: str, including: tuple[str, ...]) -> Iterator[Statement]:
  """The statements of one file and of what it includes."""
  shown = _shown(path)
  if os.path.realpath(path) in including:
    raise errors.UserError(f"{shown} includes itself; remove one of the includes.")
  try:
    with open(path, encoding="utf-8") as file:
      text = file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(f"cannot read the gin file {shown}: {error}") from error
  including = (*including, os.path.realpath(path))
  yield from _parse(
    text, lambda line: f"{shown}:{line}", os.path.dirname(path), including
  )


def _parse(text, origin_fn, folder, including) -> Iterator[Statement]:
  """The statements of one text; `origin_fn` tells the place of a line."""
  try:
    parsed = list(config_parser.ConfigParser(text, _Syntax()))
  except SyntaxError as error:
    reason = str(error.msg).split("\n")[0]
    content = (error.text or "").strip()
    raise errors.UserError(
      f"{origin_fn(error.lineno)}: not gin's syntax: {reason} In: {content!r} "
      "(a text needs quotes, a part '@', a macro '%')."
    ) from error
  except tokenize.TokenError as error:
    reason, (line, _) = error.args
    raise errors.UserError(
      f"{origin_fn(line)}: not gin's syntax: {reason}; is a bracket or quote open?"
    ) from error
  for statement in parsed:
    origin = origin_fn(statement.location.line_num)
    if isinstance(statement, config_parser.IncludeStatement):
      yield from _read_file(_find(statement.filename, folder, origin), including)
    elif isinstance(statement, config_parser.ImportStatement):
      yield Import(statement.module, origin)
    elif isinstance(statement, config_parser.BindingStatement):
      name, parameter = statement.selector, statement.arg_name
      yield Binding(
        statement.scope, name, parameter, statement.value, origin, including
      )


def _find(name: str, folder: str, origin: str) -> str:
  """The included file: beside the file that names it, or from the working directory."""
  places = [os.path.normpath(os.path.join(folder, name)), os.path.normpath(name)]
  for path in places:
    if os.path.isfile(path):
      return path
  raise errors.UserError(_missing_file(f"{origin}: include", name, places))


def _missing_file(what: str, name: str, places: Sequence[str]) -> str:
  """The message for a file that is at none of its places."""
  folder = os.path.dirname(places[0]) or "."
  beside = os.listdir(folder) if os.path.isdir(folder) else []
  names = [file for file in beside if file.endswith(".gin")]
  looked = " and ".join(dict.fromkeys(_shown(place) for place in places))
  nearest = nearest_name(os.path.basename(name), names)
  return f"{what} {name!r}: there is no file {looked}{nearest}."


def _shown(path: str) -> str:
  """The path as short as it stays clear: relative below the working directory."""
  path = os.path.abspath(path)
  relative = os.path.relpath(path)
  return path if relative.startswith(os.pardir) else relative
