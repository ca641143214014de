"""The outer loop: calls the inner loop until all steps are done, and acts between.

stop told? -> inner call (n steps) -> all finite? -> actions (log, save) -> stop told?
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer import heartbeat
from trainer.errors import PreemptedError, UserError
from trainer.loop import words
from trainer.loop.actions import Action, Report
from trainer.loop.checkpoint import Checkpoints
from trainer.loop.inner import InnerLoop
from trainer.loop.loop_options import LoopOptions
from trainer.loop.not_finite import NotFinitePolicy
from trainer.loop.watchdog import Watchdog
from trainer.losses.statistics import summarize
from trainer.preemption import Preemption


class Safety(NamedTuple):
  """What keeps a run from losing what it has.

  Attributes:
    checkpoints: of the run.
    preemption: whether the run was told to stop.
    watchdog: watches the steps.
    naming_bad_records: context of steps (first, last) that names what can't be read.
    not_finite: what is done where an update is not finite.
  """

  checkpoints: Checkpoints
  preemption: Preemption
  watchdog: Watchdog
  naming_bad_records: Callable[[int, int], AbstractContextManager]
  not_finite: NotFinitePolicy


class Loop:
  """Runs the training to its end.

  Args:
    inner: several steps on all replicas.
    optimizer: its `iterations` are the step, its learning rate is logged.
    options: how long and how often.
    images_per_step: the global batch size.
    actions: called in order after each inner loop.
    safety: what keeps it from losing what it has.
    metrics_fns: each gives more metrics of an inner loop, given the step at its end.
  """

  def __init__(
    self,
    *,
    inner: InnerLoop,
    optimizer: tf.keras.optimizers.Optimizer,
    options: LoopOptions,
    images_per_step: int,
    actions: Sequence[Action],
    safety: Safety,
    metrics_fns: Sequence[Callable[[int], Mapping[str, float]]] = (),
  ):
    self._inner = inner
    self._optimizer = optimizer
    self._options = options
    self._images_per_step = images_per_step
    self._actions = list(actions)
    self._safety = safety
    self._metrics_fns = list(metrics_fns)
    self._is_over = False

  def add_action(self, action: Action) -> None:
    """Adds what happens after all else.

    Args:
      action: on every worker alike, if it speaks to the others.
    """
    self._actions.append(action)

  def run(self) -> None:
    """Runs the steps that are left, and waits until the last checkpoint is written.

    Raises:
      PreemptedError: the run was told to stop, and has saved.
      NotFiniteError: an update is not finite, and the options don't pass over it.
      UserError: a checkpoint could not be written that had to be.
    """
    safety = self._safety
    saving = safety.preemption.saving(lambda: safety.checkpoints.newest)
    with saving, safety.watchdog.stepping(self._step):
      step = self._step()
      try:
        while step < self._options.num_steps and not self._is_over:
          step = self._run_once(step)
      except Exception:
        with safety.watchdog.acting():
          safety.checkpoints.wait()  # For one that is being written.
        raise
      self._finish()

  def _step(self) -> int:
    return int(self._optimizer.iterations.numpy())

  def _run_once(self, step: int) -> int:
    # Loops end on multiples of their length, so that a resumed run logs the same rows.
    per_loop = self._options.steps_per_loop
    end = min((step // per_loop + 1) * per_loop, self._options.num_steps)
    start_s = time.monotonic()
    statistics, said = self._run_steps(step, end)
    seconds_per_step = (time.monotonic() - start_s) / (end - step)
    self._safety.watchdog.learn(seconds_per_step)
    metrics = {
      **summarize(statistics),
      "train/learning_rate": float(self._optimizer.learning_rate.numpy()),
      "train/images_per_second": self._images_per_step / seconds_per_step,
      "train/seconds_per_step": seconds_per_step,
      **self._safety.not_finite.metrics(),
    }
    for metrics_fn in self._metrics_fns:
      metrics.update(metrics_fn(end))
    with self._safety.watchdog.acting():
      for action in self._actions:
        if action(Report(end, self._options.num_steps, metrics)):
          self._is_over = True
          self._safety.checkpoints.save(end)
        heartbeat.beat()
      self._heed(said, end)
    return end

  def _run_steps(self, step: int, end: int) -> tuple[Mapping[str, Any], words.Said]:
    """Statistics of the steps that were finite, and what the hosts said."""
    parts = []
    while step < end:
      with self._safety.naming_bad_records(step, end):
        done = self._inner.run(end - step)
      parts.append(done.statistics)
      step += done.num_steps
      if step < end:
        with (
          self._safety.watchdog.acting()
        ):  # The step is compiled again to look at it.
          self._safety.not_finite.pass_over(step)
        step += 1
    total = tf.nest.map_structure(lambda *each: functools.reduce(np.add, each), *parts)
    return total, words.understand(done.words)

  def _heed(self, said: words.Said, step: int) -> None:
    """Stops where a worker was told to, or could not save what it must."""
    checkpoints = self._safety.checkpoints
    if said.is_saving_impossible and self._options.when_disk_full == "stop":
      checkpoints.wait()
      raise UserError(
        f"{checkpoints.failure or 'worker 0 could not save'}; {checkpoints.newest}; "
        "free some disk, or set LoopOptions.when_disk_full = 'go_on'."
      )
    if said.is_told_to_stop:
      checkpoints.save(step)
      checkpoints.wait()
      failure = f"{checkpoints.failure}; " if checkpoints.failure else ""
      raise PreemptedError(
        f"{self._safety.preemption.signal_name}: stopped after step {step}; {failure}"
        f"{checkpoints.newest}; the same command goes on."
      )

  def _finish(self) -> None:
    checkpoints = self._safety.checkpoints
    checkpoints.wait()
    if checkpoints.failure:
      raise UserError(
        f"{checkpoints.failure}; {checkpoints.newest}; free some disk, and the same "
        "command does the rest."
      )
    for action in self._actions:
      finish = getattr(action, "finish", None)
      if finish is not None:
        finish()
