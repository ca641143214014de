"""The configuration of a run: loading, checks, saving and comparison."""

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

# Roots that run parallel to training or after it don't affect the hash of a run.
_AFTER_TRAINING = ("follow", "mine", "embed", "index", "search", "export")
ROOTS = (
  *("ingest", "validate", "train", "evaluate", "train_and_evaluate"),
  *_AFTER_TRAINING,
)

CONFIG_FILE = "config.gin"
OPERATIVE_CONFIG_FILE = "operative_config.gin"
_VALUE = "#   "
_NUM_SHOWN = 5
# Initial values of variables, which a checkpoint replaces.
_INITIAL_VALUES = (".temperature.initial",)
_INITIAL_WEIGHTS = ("train.seed", ".backbone.weights")


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of a run.

  Attributes:
    text: the whole config in gin's syntax, self-contained; each line with its origin.
    values: all values that reach a root, by path, such as `train.loss.margin`; macros
      are substituted, and each value has one canonical spelling.
  """

  text: str
  values: Mapping[str, str]

  @property
  def training_values(self) -> Mapping[str, str]:
    """Returns the entries of `values` that identify a training run."""
    return {
      path: value
      for path, value in self.values.items()
      if path.split(".", 1)[0] not in _AFTER_TRAINING
    }

  @property
  def hash(self) -> str:
    """Returns SHA-256 of `training_values`: equal for configs with equal training."""
    values = self.training_values
    lines = [f"{path} = {value}\n" for path, value in sorted(values.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

  def binds(self, root: str) -> bool:
    """Returns whether any parameter is set for this root."""
    return any(path.startswith(f"{root}.") for path in self.values)


@dataclasses.dataclass(frozen=True)
class Assembled:
  """A config, and its unused bindings.

  Attributes:
    config: config of the bindings that reach a root.
    unused: bindings that reach no root.
  """

  config: Config
  unused: Sequence[gin_statements.Binding]


def load(
  gin_files: Sequence[str], gin_params: Sequence[str] = (), **options: Sequence[str]
) -> Config:
  """Reads and checks a config, and replaces gin's current config with it.

  Args: as `read`.

  Raises:
    UserError: as `read`.
  """
  config = read(gin_files, gin_params, **options)
  gin.clear_config()
  gin.parse_config(config.text)
  gin.finalize()
  return config


def read(
  gin_files: Sequence[str],
  gin_params: Sequence[str] = (),
  *,
  roots: Sequence[str] = ROOTS,
  **options: Sequence[str],
) -> Config:
  """Reads and checks a config without changing gin's state.

  Args:
    gin_files: paths of gin files, in order of precedence.
    gin_params: statements such as `X.y = 1`; they override those of the files.
    roots: as in `assemble`.
    **options: `needed` and `allowed_imports` of `assemble`.

  Raises:
    UserError: a file is missing or does not parse; a name is unknown; a macro is unset
      or lower-case; a binding is unused; a required value is not set.
  """
  statements = gin_statements.read_statements(gin_files, gin_params)
  assembled = assemble(statements, roots=roots, **options)
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
  """Checks statements and follows references from the roots; collects unused bindings.

  Args:
    given: statements in order of precedence.
    needed: roots that will be called; all their required parameters must be set.
    roots: the configurables from which every binding must be reachable.
    allowed_imports: modules that may be imported in addition to this package's and
      TensorFlow's.

  Raises:
    UserError: a name is unknown; a macro is unset or lower-case; a required value is
      not set.
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
  """Returns the error message for bindings and macros that reach no root."""
  messages = [
    f"{binding.origin}: nothing uses {binding.key}"
    + ("" if binding.parameter else f" (write %{binding.key} where it is meant)")
    for binding in unused
  ]
  return (
    f"{_first_of(messages)}; {', '.join(roots)} reach no reference to it: refer to it "
    "or remove the line."
  )


def diff(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
  """Returns the differences between the values of two configs, one line per path."""
  return [
    f"{path}: {before.get(path, 'unset')} before, {after.get(path, 'unset')} now"
    for path in sorted({*before, *after})
    if before.get(path) != after.get(path)
  ]


def _first_of(messages: Sequence[str]) -> str:
  """Returns the first message and the number of further ones."""
  more = f" (and {len(messages) - 1} more like it)" if len(messages) > 1 else ""
  return f"{messages[0]}{more}"


def _text(given: Sequence[gin_statements.Statement]) -> str:
  """Returns the statements as one gin file, each with its origin as a comment."""
  return "".join(f"{statement}  # {statement.origin}\n" for statement in given)


def save_config(config: Config, model_dir: str) -> None:
  """Writes the whole config as a gin file that reproduces it.

  The values are added as comments, so that a later version of the package can report
  differences even if it no longer recognizes every name.
  """
  values = [
    f"{_VALUE}{path} = {value}\n" for path, value in config.training_values.items()
  ]
  text = f"# Hash: {config.hash}\n{config.text}\n# Hashed values:\n{''.join(values)}"
  _write_config(os.path.join(model_dir, CONFIG_FILE), text)


def save_operative_config(model_dir: str) -> None:
  """Writes gin's operative config, including defaults; call it after the first step."""
  _write_config(
    os.path.join(model_dir, OPERATIVE_CONFIG_FILE), gin.operative_config_str()
  )


def check_same_config(
  config: Config, model_dir: str, allow_change: bool = False, is_resumed: bool = False
) -> None:
  """Raises if a folder holds another config, unless a change is allowed.

  Every allowed change is logged.

  Args:
    config: config of this run.
    model_dir: folder of the run.
    allow_change: whether a changed config may continue.
    is_resumed: whether the folder has a checkpoint. If so, values that are only used at
      the first step must not change.

  Raises:
    UserError: the configs differ; the message lists the differences.
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
          f"{line}; the value is only used before the first step, and {model_dir} has "
          "later checkpoints: restore the value, or choose another --model_dir."
        )
      if is_resumed and path.endswith(_INITIAL_WEIGHTS):
        line += "; the weights are those of the checkpoint"
      logging.info("Changed configuration: %s.", line)
    return
  more = [f"and {len(lines) - _NUM_SHOWN} more"] if len(lines) > _NUM_SHOWN else []
  raise errors.UserError(
    f"{model_dir} holds another config: {'; '.join(lines[:_NUM_SHOWN] + more)}. Choose "
    "another --model_dir, or continue in this one with --allow_config_change."
  )


def read_saved_values(model_dir: str) -> Optional[dict[str, str]]:
  """Reads the values of the saved config, by path.

  Args:
    model_dir: folder of the run.

  Returns:
    A dict such as {"train.loss.margin": "0.2"}; None if the folder has no config.
  """
  path = os.path.join(model_dir, CONFIG_FILE)
  if not tf.io.gfile.exists(path):
    return None
  with tf.io.gfile.GFile(path) as file:
    lines = [line for line in file.read().splitlines() if line.startswith(_VALUE)]
  pairs = (line[len(_VALUE) :].partition(" = ") for line in lines)
  return {key: value for key, _, value in pairs}


def _write_config(path: str, text: str) -> None:
  """Writes a file atomically."""
  filesystem.make_folder(os.path.dirname(path))
  filesystem.replace_file(path, text)
