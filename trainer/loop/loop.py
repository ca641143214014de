"""The outer loop: calls the inner loop until all steps are done, and acts between."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import gin
import tensorflow as tf

from trainer.errors import UserError
from trainer.loop.actions import Action, Report
from trainer.loop.inner import InnerLoop
from trainer.losses.statistics import summarize


@gin.register
@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """How long a run goes, and how often the host looks in.

  Attributes:
    num_steps: steps in all.
    steps_per_loop: steps a host call; metrics are logged once a call.
    checkpoint_every_steps: a multiple of `steps_per_loop`.
    num_checkpoints_kept: how many of the newest checkpoints stay.
  """

  num_steps: int
  steps_per_loop: int
  checkpoint_every_steps: int
  num_checkpoints_kept: int = 3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        value = getattr(self, field.name)
        raise UserError(f"LoopOptions.{field.name}={value} must be at least 1.")
    if self.checkpoint_every_steps % self.steps_per_loop:
      raise UserError(
        f"LoopOptions.checkpoint_every_steps={self.checkpoint_every_steps} must be a "
        f"multiple of steps_per_loop={self.steps_per_loop}."
      )


class Loop:
  """Runs the training to its end.

  Args:
    inner: several steps on all replicas.
    naming_bad_records: context of steps (first, last) that names what can't be read.
    optimizer: its `iterations` are the step, its learning rate is logged.
    options: how long and how often.
    images_per_step: the global batch size.
    actions: called in order after each inner loop.
  """

  def __init__(
    self,
    *,
    inner: InnerLoop,
    naming_bad_records: Callable[[int, int], AbstractContextManager],
    optimizer: tf.keras.optimizers.Optimizer,
    options: LoopOptions,
    images_per_step: int,
    actions: Sequence[Action],
  ):
    self._inner = inner
    self._naming_bad_records = naming_bad_records
    self._optimizer = optimizer
    self._options = options
    self._images_per_step = images_per_step
    self._actions = actions

  def run(self) -> None:
    """Runs the steps that are left."""
    step = int(self._optimizer.iterations.numpy())
    while step < self._options.num_steps:
      step = self._run_once(step)

  def _run_once(self, step: int) -> int:
    # Loops end on multiples of their length, so that a resumed run logs the same rows.
    per_loop = self._options.steps_per_loop
    end = min((step // per_loop + 1) * per_loop, self._options.num_steps)
    start_s = time.monotonic()
    with self._naming_bad_records(step, end):
      statistics = self._inner.run(end - step)
    seconds_per_step = (time.monotonic() - start_s) / (end - step)
    metrics = {
      **summarize(statistics),
      "train/learning_rate": float(self._optimizer.learning_rate.numpy()),
      "train/images_per_second": self._images_per_step / seconds_per_step,
      "train/seconds_per_step": seconds_per_step,
    }
    for action in self._actions:
      action(Report(end, self._options.num_steps, metrics))
    return end
