"""Statements of gin files, each with its origin.

Gin's own parser reads the statements. Includes are resolved here, because gin resolves
them against the working directory, and an installed package is used from any directory.
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
  """Returns `; did you mean 'x'?` for the nearest known name; "" if none is near.

  Case is ignored, because wrong case is the most common error.
  """
  by_lower_case = {candidate.lower(): candidate for candidate in sorted(known)}
  near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
  return f"; did you mean {by_lower_case[near[0]]!r}?" if near else ""


@dataclasses.dataclass(frozen=True)
class Reference:
  """A reference: `@scope/Name` or, called, `@scope/Name()`."""

  scopes: tuple[str, ...]
  name: str
  is_call: bool

  def __repr__(self):
    return f"@{'/'.join((*self.scopes, self.name))}{'()' if self.is_call else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
  """A macro or gin constant: `%NAME`."""

  name: str

  def __repr__(self):
    return f"%{self.name}"


@dataclasses.dataclass(
  frozen=True, eq=False
)  # Hashed by identity: values may be lists.
class Binding:
  """A binding `scope/Name.parameter = value`, or a macro `NAME = value`.

  Attributes:
    scope: "" for none.
    name: the bound name, as written.
    parameter: "" for a macro.
    value: a literal that may contain `Reference` and `Macro`.
    origin: `file:line`, or the flag.
    files: the chain of includes, from the file of the command line to the file that
      holds the binding; empty for a flag.
  """

  scope: str
  name: str
  parameter: str
  value: Any
  origin: str
  files: tuple[str, ...] = ()

  @property
  def key(self) -> str:
    """Returns the left side, as written."""
    scoped = f"{self.scope}/{self.name}" if self.scope else self.name
    return f"{scoped}.{self.parameter}" if self.parameter else scoped

  @property
  def is_flag(self) -> bool:
    """Returns whether the binding was given on the command line."""
    return self.origin.startswith("--gin_param")

  def __str__(self):
    return f"{self.key} = {self.value!r}"


@dataclasses.dataclass(frozen=True)
class Import:
  """A statement `import module`, which registers the module's parts."""

  module: str
  origin: str

  def __str__(self):
    return f"import {self.module}"


Statement = Union[Binding, Import]


class _Syntax(config_parser.ParserDelegate):
  """Builds values without resolving names, so that our own checks report the errors."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    *scopes, name = scoped_configurable_name.split("/")
    return Reference(tuple(scopes), name, evaluate)

  def macro(self, macro_name):
    return Macro(macro_name)


def read_statements(
  gin_files: Sequence[str], gin_params: Sequence[str]
) -> list[Statement]:
  """Reads all statements of the files, then of the flags, in order of precedence.

  Args:
    gin_files: paths, relative to the working directory.
    gin_params: statements such as `X.y = 1`; they override those of the files.

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
  """Yields the statements of a file and its includes."""
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
  """Yields the statements of a text; `origin_fn` returns the origin of a line."""
  try:
    parsed = list(config_parser.ConfigParser(text, _Syntax()))
  except SyntaxError as error:
    reason = str(error.msg).split("\n")[0]
    content = (error.text or "").strip()
    raise errors.UserError(
      f"{origin_fn(error.lineno)}: invalid gin syntax: {reason} In: {content!r} (a "
      "string needs quotes, a part '@', a macro '%')."
    ) from error
  except tokenize.TokenError as error:
    reason, (line, _) = error.args
    raise errors.UserError(
      f"{origin_fn(line)}: invalid gin syntax: {reason}; check for an open bracket or "
      "quote."
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
  """Returns the path of an include, relative to its file or the working directory."""
  candidates = [os.path.normpath(os.path.join(folder, name)), os.path.normpath(name)]
  for path in candidates:
    if os.path.isfile(path):
      return path
  raise errors.UserError(_missing_file(f"{origin}: include", name, candidates))


def _missing_file(what: str, name: str, candidates: Sequence[str]) -> str:
  """Returns the message for a file that is in none of the searched places."""
  folder = os.path.dirname(candidates[0]) or "."
  entries = os.listdir(folder) if os.path.isdir(folder) else []
  names = [file for file in entries if file.endswith(".gin")]
  paths = " and ".join(dict.fromkeys(_shown(path) for path in candidates))
  nearest = nearest_name(os.path.basename(name), names)
  return f"{what} {name!r}: file not found at {paths}{nearest}."


def _shown(path: str) -> str:
  """Returns the path relative to the working directory if it is inside it."""
  path = os.path.abspath(path)
  relative = os.path.relpath(path)
  return path if relative.startswith(os.pardir) else relative
