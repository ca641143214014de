"""The config that a run leaves in its folder, and the check against what it holds."""

from __future__ import annotations

import os
from typing import Optional

import gin
import tensorflow as tf
from absl import logging

from trainer import config as config_lib
from trainer import errors
from trainer.data import paths

CONFIG = "config.gin"
OPERATIVE_CONFIG = "operative_config.gin"
_VALUE = "#   "
_NUM_SHOWN = 5
# What gives a variable its first value, which a checkpoint replaces.
_INITIAL_VALUES = (".temperature.initial",)
_INITIAL_WEIGHTS = ("train.seed", ".backbone.weights")


def save(config: config_lib.Config, model_dir: str) -> None:
  """Writes the whole config; it is a gin file that gives the same config again.

  The values are added as comments, so that a later version can tell what differs even
  when it no longer knows every name.
  """
  values = [
    f"{_VALUE}{path} = {value}\n" for path, value in config.training_values.items()
  ]
  text = f"# Hash: {config.hash}\n{config.text}\n# Hashed values:\n{''.join(values)}"
  _write(os.path.join(model_dir, CONFIG), text)


def save_operative(model_dir: str) -> None:
  """Writes what gin has handed out so far, defaults included: call after a step."""
  _write(os.path.join(model_dir, OPERATIVE_CONFIG), gin.operative_config_str())


def check_same(
  config: config_lib.Config,
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
  before = read_values(model_dir)
  if before is None or before == config.training_values:
    return
  lines = config_lib.diff(before, config.training_values)
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


def read_values(model_dir: str) -> Optional[dict[str, str]]:
  """The values of the saved config, by path.

  Args:
    model_dir: folder of the run.

  Returns:
    Such as {"train.loss.margin": "0.2"}; None if the folder has no config.
  """
  path = os.path.join(model_dir, CONFIG)
  if not tf.io.gfile.exists(path):
    return None
  with tf.io.gfile.GFile(path) as file:
    lines = [line for line in file.read().splitlines() if line.startswith(_VALUE)]
  pairs = (line[len(_VALUE) :].partition(" = ") for line in lines)
  return {key: value for key, _, value in pairs}


def _write(path: str, text: str) -> None:
  """Writes a file so that no reader sees half of it."""
  paths.make_folder(os.path.dirname(path))
  paths.replace_file(path, text)
