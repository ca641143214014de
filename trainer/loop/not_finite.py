"""What a run does about an update that is not finite: computed, and not made."""

from __future__ import annotations

from typing import Callable

import tensorflow as tf
from absl import logging

from trainer.errors import NotFiniteError
from trainer.loop.checkpoint import Checkpoints
from trainer.loop.loop_options import LoopOptions
from trainer.loop.per_part import set_step

_COUNT = "not_finite_steps"


class NotFinitePolicy:
  """Stops, skips the batch, or goes back to the newest checkpoint.

  Args:
    options: which of them, and how often.
    optimizer: its `iterations` are the step, and so the number of the next batch.
    checkpoints: keep how often it was.
    restore_fn: restores the newest checkpoint, on all workers alike.
    diagnose_fn: says in words what is not finite in a step, and of which records.
  """

  def __init__(
    self,
    *,
    options: LoopOptions,
    optimizer: tf.keras.optimizers.Optimizer,
    checkpoints: Checkpoints,
    restore_fn: Callable[[], object],
    diagnose_fn: Callable[[int], str],
  ):
    self._options = options
    self._optimizer = optimizer
    self._checkpoints = checkpoints
    self._restore_fn = restore_fn
    self._diagnose_fn = diagnose_fn

  @property
  def _count(self) -> int:
    return self._checkpoints.notes.get(_COUNT, 0)

  def metrics(self) -> dict[str, float]:
    """How many batches were passed over, where that is wanted."""
    if self._options.when_not_finite == "stop":
      return {}
    return {"train/not_finite_steps": float(self._count)}

  def pass_over(self, step: int) -> None:
    """Goes on with the batch after that of a step, or raises.

    Args:
      step: the step whose update is not finite.

    Raises:
      NotFiniteError: the options want it, or it was too often.
    """
    diagnosis = self._diagnose_fn(step)
    if self._options.when_not_finite == "stop":
      self._stop(step, f"{diagnosis}; no update was made with it")
    if self._count >= self._options.max_not_finite:
      self._stop(step, f"{diagnosis}; {self._count} batches were passed over before")
    count = self._count + 1
    if self._options.when_not_finite == "go_back":
      self._restore_fn()
      logging.warning("Step %d: %s; %s.", step, diagnosis, self._checkpoints.newest)
    else:
      logging.warning("Step %d: %s; its batch is skipped.", step, diagnosis)
    self._checkpoints.notes[_COUNT] = count
    set_step(self._optimizer, step + 1)

  def _stop(self, step: int, why: str) -> None:
    self._checkpoints.wait()
    raise NotFiniteError(f"step {step}: {why}; {self._checkpoints.newest}.")
