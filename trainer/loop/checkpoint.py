"""Checkpoints: what is saved, where, how many are kept."""

from __future__ import annotations

import os
import tempfile
from typing import Optional

import tensorflow as tf
from absl import logging

from trainer.errors import UserError
from trainer.loop.averages import AveragedWeights
from trainer.models.batch_norms import make_replicas_equal

FOLDER = "checkpoints"
# TensorFlow's reader raises the last two for a file that is short or damaged.
_UNREADABLE = (tf.errors.OpError, IndexError, RuntimeError)


class Checkpoints:
  """The checkpoints of a run.

  Args:
    model_dir: folder of the run.
    encoder: its variables exist.
    loss: saved too where it is a `tf.Module` (a learned temperature).
    optimizer: built; its `iterations` are the step. None to read encoders only.
    averages: of the encoder's weights, if there are any.
    num_kept: how many of the newest to keep.
    is_chief: whether this worker's checkpoints stay. All workers must save, because
      reading a variable that is kept on each replica is a collective; the others'
      go to a folder that is deleted.
  """

  def __init__(
    self,
    *,
    model_dir: str,
    encoder: tf.keras.Model,
    loss: object = None,
    optimizer: Optional[tf.keras.optimizers.Optimizer] = None,
    averages: Optional[AveragedWeights] = None,
    num_kept: int = 1,
    is_chief: bool = True,
  ):
    self._encoder = encoder
    self._optimizer = optimizer
    self._averages = averages
    parts = {"encoder": encoder}
    if optimizer is not None:
      parts["optimizer"] = optimizer
    if averages is not None:
      parts["averages"] = averages
    if isinstance(loss, tf.Module):
      parts["loss"] = loss
    self._checkpoint = tf.train.Checkpoint(**parts)
    self._folder = os.path.join(model_dir, FOLDER)
    _listed(self._folder)  # The manager would raise what is no user's error.
    self._aside = None if is_chief else tempfile.TemporaryDirectory()
    self._manager = tf.train.CheckpointManager(
      self._checkpoint,
      self._aside.name if self._aside else self._folder,
      max_to_keep=num_kept if is_chief else 1,
    )

  @property
  def num_bytes(self) -> int:
    """Size of one checkpoint, without its index."""
    variables = [
      *self._encoder.variables,
      *getattr(self._optimizer, "variables", ()),
      *getattr(self._averages, "averages", ()),
    ]
    return sum(v.shape.num_elements() * v.dtype.size for v in variables)

  @property
  def latest_step(self) -> Optional[int]:
    """Step of the newest checkpoint; None where there is none."""
    path = self._latest_path()
    return None if path is None else int(path.rsplit("-", 1)[1])

  def save(self, step: int) -> None:
    """Saves everything after that step, and prunes.

    Where replicas have moving averages of their own, all go on with what is saved.

    Args:
      step: number of steps done.
    """
    make_replicas_equal(self._encoder)
    self._manager.save(checkpoint_number=step)

  def restore(self) -> Optional[int]:
    """Restores the newest checkpoint.

    To an encoder alone its averaged weights are given, where the checkpoint has them.

    Returns:
      The number of steps done; None where there is no checkpoint.

    Raises:
      UserError: the checkpoint is of another encoder, loss or optimizer, or its files
        are missing or damaged.
    """
    path = self._latest_path()
    if path is None:
      return None
    try:
      status = self._checkpoint.restore(path)
      status.assert_existing_objects_matched()
      if self._optimizer is not None:
        status.assert_consumed()
      else:
        _assign_averages(self._encoder, path)
    except (AssertionError, ValueError) as error:
      raise UserError(
        f"{path} does not fit this configuration: {_first_line(error)}"
      ) from error
    except _UNREADABLE as error:
      raise UserError(
        f"{path} can't be read ({_first_line(error)}); copy it here again, or name an "
        f"older one in {os.path.join(self._folder, 'checkpoint')}."
      ) from error
    logging.info("Restored %s.", path)
    return self.latest_step

  def _latest_path(self) -> Optional[str]:
    """The newest checkpoint that the folder's list names; None where there is none.

    TensorFlow's own answer is None too where the files of the newest are missing, and
    the run would start again at its first step.
    """
    path = _listed(self._folder)
    if path is not None and not tf.io.gfile.exists(f"{path}.index"):
      raise UserError(
        f"{path}.index is missing, which {os.path.join(self._folder, 'checkpoint')} "
        "names as the newest; copy it here again, or name an older one there."
      )
    return path


def _listed(folder: str) -> Optional[str]:
  """What the folder's list names as the newest; None where there is no list.

  Raises:
    UserError: the list is damaged.
  """
  path = os.path.join(folder, "checkpoint")
  try:
    state = tf.train.get_checkpoint_state(folder)
  except ValueError:
    state = None
  if state is None and tf.io.gfile.exists(path):
    raise UserError(
      f"{path} can't be read; write 'model_checkpoint_path: \"ckpt-STEP\"' into it."
    )
  return state.model_checkpoint_path if state else None


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _assign_averages(encoder: tf.keras.Model, path: str) -> None:
  reader = tf.train.load_checkpoint(path)
  for number, weight in enumerate(encoder.trainable_variables):
    name = f"averages/averages/{number}/.ATTRIBUTES/VARIABLE_VALUE"
    if reader.has_tensor(name):
      weight.assign(reader.get_tensor(name))
