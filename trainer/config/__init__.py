"""The configuration of a run: gin files and flags, linted, resolved and hashed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import gin

from trainer import errors
from trainer.config import lint, resolve, statements

# What comes beside or after training doesn't tell one run from another.
_AFTER_TRAINING = ("follow", "mine", "embed", "index", "search", "export")
ROOTS = (
  *("ingest", "validate", "train", "evaluate", "train_and_evaluate"),
  *_AFTER_TRAINING,
)


@dataclasses.dataclass(frozen=True)
class Config:
  """What is computed.

  Attributes:
    text: the whole config in gin's syntax, self-contained; each line with its origin.
    values: what reaches the roots, by path, such as `train.loss.margin`: macros
      substituted, and each value in one spelling.
  """

  text: str
  values: Mapping[str, str]

  @property
  def training_values(self) -> Mapping[str, str]:
    """Those of `values` that tell one run from another."""
    return {
      path: value
      for path, value in self.values.items()
      if path.split(".", 1)[0] not in _AFTER_TRAINING
    }

  @property
  def hash(self) -> str:
    """SHA-256 of `training_values`: equal for configs that train the same."""
    values = self.training_values
    lines = [f"{path} = {value}\n" for path, value in sorted(values.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

  def binds(self, root: str) -> bool:
    """Whether anything is set for this root."""
    return any(path.startswith(f"{root}.") for path in self.values)


@dataclasses.dataclass(frozen=True)
class Assembled:
  """A config, and what was given beside it.

  Attributes:
    config: of the bindings that reach a root.
    unused: those that reach none.
  """

  config: Config
  unused: Sequence[statements.Binding]


def load(
  gin_files: Sequence[str],
  gin_params: Sequence[str] = (),
  *,
  needed: Sequence[str] = (),
  roots: Sequence[str] = ROOTS,
  allowed_imports: Sequence[str] = (),
) -> Config:
  """Reads, checks and hands a config to gin, in place of any it had.

  Args: as `read`.

  Raises:
    UserError: as `read`.
  """
  config = read(
    gin_files,
    gin_params,
    needed=needed,
    roots=roots,
    allowed_imports=allowed_imports,
  )
  gin.clear_config()
  gin.parse_config(config.text)
  gin.finalize()
  return config


def read(
  gin_files: Sequence[str],
  gin_params: Sequence[str] = (),
  *,
  needed: Sequence[str] = (),
  roots: Sequence[str] = ROOTS,
  allowed_imports: Sequence[str] = (),
) -> Config:
  """Reads and checks a config and leaves gin as it is.

  Args:
    gin_files: paths of gin files, in the order they take effect.
    gin_params: statements such as `X.y = 1`; they override the files'.
    needed: the roots that will be called, which must have all they require.
    roots: the configurables from which a binding must be reachable.
    allowed_imports: modules that may be imported beside this package's and
      TensorFlow's.

  Raises:
    UserError: a file is missing or does not parse; a name is unknown, a macro unset or
      lower-case; a binding is of no use; something that must be set is not.
  """
  assembled = assemble(
    statements.read(gin_files, gin_params),
    needed=needed,
    roots=roots,
    allowed_imports=allowed_imports,
  )
  if assembled.unused:
    raise errors.UserError(unused_message(assembled.unused, roots))
  return assembled.config


def assemble(
  given: Sequence[statements.Statement],
  *,
  needed: Sequence[str] = (),
  roots: Sequence[str] = ROOTS,
  allowed_imports: Sequence[str] = (),
) -> Assembled:
  """Checks statements and follows them from the roots; what is of no use is set apart.

  Args:
    given: in the order they take effect.
    needed: the roots that will be called, which must have all they require.
    roots: the configurables from which a binding must be reachable.
    allowed_imports: modules that may be imported beside this package's and
      TensorFlow's.

  Raises:
    UserError: a name is unknown, a macro unset or lower-case; something that must be
      set is not.
  """
  lint.import_modules(given, allowed_imports)
  bindings = [s for s in given if isinstance(s, statements.Binding)]
  lint.check_names(bindings)
  lint.log_overrides(bindings)
  in_effect = list({lint.identity(binding): binding for binding in bindings}.values())
  resolved = resolve.resolve(in_effect, roots, needed)
  if resolved.missing:
    raise errors.UserError(_first_of(resolved.missing))
  imports = [s for s in given if isinstance(s, statements.Import)]
  used = [b for b in in_effect if b in resolved.used]
  return Assembled(
    Config(_text([*imports, *used]), resolved.values),
    [b for b in in_effect if b not in resolved.used],
  )


def unused_message(
  unused: Sequence[statements.Binding], roots: Sequence[str] = ROOTS
) -> str:
  """What to tell of bindings and macros that reach no root."""
  messages = [
    f"{binding.origin}: nothing uses {binding.key}"
    + ("" if binding.parameter else f" (write %{binding.key} where it is meant)")
    for binding in unused
  ]
  return (
    f"{_first_of(messages)}; {', '.join(roots)} reach no reference to it: "
    "refer to it or remove the line."
  )


def diff(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
  """In words, one line a path, in what the values of two configs differ."""
  return [
    f"{path}: {before.get(path, 'unset')} before, {after.get(path, 'unset')} now"
    for path in sorted({*before, *after})
    if before.get(path) != after.get(path)
  ]


def _first_of(messages: Sequence[str]) -> str:
  """The first message, and how many there are beside it."""
  more = f" (and {len(messages) - 1} more like it)" if len(messages) > 1 else ""
  return f"{messages[0]}{more}"


def _text(given: Sequence[statements.Statement]) -> str:
  """The statements as one gin file, each with its origin as a comment."""
  return "".join(f"{statement}  # {statement.origin}\n" for statement in given)
