"""The configuration of a run: loaded, checked, saved and compared."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Optional

import gin
import tensorflow as tf
from absl import logging

from trainer import errors
from trainer.config import gin_resolution, gin_statements
from trainer.runtime import filesystem

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
  unused: Sequence[gin_statements.Binding]


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
    gin_statements.read_statements(gin_files, gin_params),
    needed=needed,
    roots=roots,
    allowed_imports=allowed_imports,
  )
  if assembled.unused:
    raise errors.UserError(unused_message(assembled.unused, roots))
  return assembled.config


def assemble(
  given: Sequence[gin_statements.Statement],
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
  gin_resolution.import_modules(given, allowed_imports)
  bindings = [s for s in given if isinstance(s, gin_statements.Binding)]
  gin_resolution.check_names(bindings)
  gin_resolution.log_overrides(bindings)
  in_effect = list(
    {gin_resolution.identity(binding): binding for binding in bindings}.values()
  )
  resolved = gin_resolution.resolve(in_effect, roots, needed)
  if resolved.missing:
    raise errors.UserError(_first_of(resolved.missing))
  imports = [s for s in given if isinstance(s, gin_statements.Import)]
  used = [b for b in in_effect if b in resolved.used]
  return Assembled(
    Config(_text([*imports, *used]), resolved.values),
    [b for b in in_effect if b not in resolved.used],
  )


def unused_message(
  unused: Sequence[gin_statements.Binding], roots: Sequence[str] = ROOTS
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


def _text(given: Sequence[gin_statements.Statement]) -> str:
  """The statements as one gin file, each with its origin as a comment."""
  return "".join(f"{statement}  # {statement.origin}\n" for statement in given)


CONFIG_FILE = "config.gin"
OPERATIVE_CONFIG_FILE = "operative_config.gin"
_VALUE = "#   "
_NUM_SHOWN = 5
# What gives a variable its first value, which a checkpoint replaces.
_INITIAL_VALUES = (".temperature.initial",)
_INITIAL_WEIGHTS = ("train.seed", ".backbone.weights")


def save_config(config: Config, model_dir: str) -> None:
  """Writes the whole config; it is a gin file that gives the same config again.

  The values are added as comments, so that a later version can tell what differs even
  when it no longer knows every name.
  """
  values = [
    f"{_VALUE}{path} = {value}\n" for path, value in config.training_values.items()
  ]
  text = f"# Hash: {config.hash}\n{config.text}\n# Hashed values:\n{''.join(values)}"
  _write_config(os.path.join(model_dir, CONFIG_FILE), text)


def save_operative_config(model_dir: str) -> None:
  """Writes what gin has handed out so far, defaults included: call after a step."""
  _write_config(
    os.path.join(model_dir, OPERATIVE_CONFIG_FILE), gin.operative_config_str()
  )


def check_same_config(
  config: Config,
  model_dir: str,
  allow_change: bool = False,
  is_resumed: bool = False,
) -> None:
  """Refuses to go on in a folder that holds another config, unless that is allowed.

  Each change that is allowed is logged.

  Args:
    config: of this run.
    model_dir: its folder.
    allow_change: whether another config may go on.
    is_resumed: whether the folder has a checkpoint. Then values that are only used at
      the first step must not change.

  Raises:
    UserError: what differs.
  """
  before = read_saved_values(model_dir)
  if before is None or before == config.training_values:
    return
  lines = diff(before, config.training_values)
  if allow_change:
    for line in lines:
      path = line.partition(":")[0]
      if is_resumed and path.endswith(_INITIAL_VALUES):
        raise errors.UserError(
          f"{line}; the value is only used at the first step, and the checkpoints of "
          f"{model_dir} are past it: set it back, or take another --model_dir."
        )
      if is_resumed and path.endswith(_INITIAL_WEIGHTS):
        line += "; the weights are those of the checkpoint"
      logging.info("Changed configuration: %s.", line)
    return
  more = [f"and {len(lines) - _NUM_SHOWN} more"] if len(lines) > _NUM_SHOWN else []
  raise errors.UserError(
    f"{model_dir} holds another config: {'; '.join(lines[:_NUM_SHOWN] + more)}. Take "
    "another --model_dir, or continue in this one with --allow_config_change."
  )


def read_saved_values(model_dir: str) -> Optional[dict[str, str]]:
  """The values of the saved config, by path.

  Args:
    model_dir: folder of the run.

  Returns:
    Such as {"train.loss.margin": "0.2"}; None if the folder has no config.
  """
  path = os.path.join(model_dir, CONFIG_FILE)
  if not tf.io.gfile.exists(path):
    return None
  with tf.io.gfile.GFile(path) as file:
    lines = [line for line in file.read().splitlines() if line.startswith(_VALUE)]
  pairs = (line[len(_VALUE) :].partition(" = ") for line in lines)
  return {key: value for key, _, value in pairs}


def _write_config(path: str, text: str) -> None:
  """Writes a file so that no reader sees half of it."""
  filesystem.make_folder(os.path.dirname(path))
  filesystem.replace_file(path, text)
