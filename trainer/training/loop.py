"""The training loop: an inner loop on the devices, an outer loop on the host.

stop? -> inner call (n steps) -> all finite? -> callbacks (log, save) -> stop?
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.distribute.collectives import current_collectives
from trainer.distribute.strategy import ReplicaBatches
from trainer.errors import PreemptedError, UserError
from trainer.losses.metric_accumulators import summarize
from trainer.runtime import watchdog as watchdog_lib
from trainer.runtime.shutdown import Preemption
from trainer.runtime.watchdog import Watchdog
from trainer.training.callbacks import Callback, StepReport
from trainer.training.checkpoint import Checkpoints
from trainer.training.nonfinite import NonfinitePolicy
from trainer.training.options import LoopOptions
from trainer.training.step import TrainStep


class HostFlags(NamedTuple):
  """Flags exchanged between hosts.

  Attributes:
    stop_requested: whether a stop was requested.
    is_saving_impossible: whether the last checkpoint could not be written.
  """

  stop_requested: bool
  is_saving_impossible: bool

  def pack(self) -> np.ndarray:
    """Returns the flags of this host, [2] int32, to be summed over hosts."""
    return np.array(self, np.int32)

  @classmethod
  def unpack(cls, sums: np.ndarray) -> HostFlags:
    """Returns which flags are set on at least one host, from their sums [2]."""
    return cls(*(bool(num_hosts) for num_hosts in sums))


# AutoGraph is only for the loop below. Converting the functions inside of it, which
# have no conditions, would take a third of a run's startup.
_no_autograph = tf.autograph.experimental.do_not_convert


class InnerLoopResult(NamedTuple):
  """Result of an inner loop call.

  Attributes:
    num_steps: number of updates applied; fewer than requested if the next update
      was not finite and therefore not applied.
    statistics: summed over these steps and over replicas, as NumPy values.
    host_flags: flags set on at least one host at the end of the call; the same on all.
  """

  num_steps: int
  statistics: Mapping[str, Any]
  host_flags: HostFlags


class InnerLoop:
  """Several steps on the devices, whose statistics are copied to the host once.

  Args:
    step: one update on one replica.
    strategy: the replicas.
    batches: of the replicas.
    zero_statistics: zeros in the structure that a step returns.
    host_flags_fn: returns the flags of this host; called once per inner call, after the
      steps.
  """

  def __init__(
    self,
    *,
    step: TrainStep,
    strategy: tf.distribute.Strategy,
    batches: ReplicaBatches,
    zero_statistics: Mapping[str, Any],
    host_flags_fn: Callable[[], HostFlags],
  ):
    self._step = step
    self._strategy = strategy
    self._batches = batches
    self._zero_statistics = zero_statistics
    self._host_flags_fn = host_flags_fn

  def run(self, num_steps: int) -> InnerLoopResult:
    """Runs the given number of steps, or stops before an update that is not finite.

    Args:
      num_steps: number of steps; changing it does not trace again.
    """
    done = self._run(self._batches.iterator, tf.constant(num_steps))
    num_done, totals, flags = tf.nest.map_structure(lambda each: each.numpy(), done)
    return InnerLoopResult(int(num_done), totals, HostFlags.unpack(flags))

  def set_batches(self, batches: ReplicaBatches) -> None:
    """Uses other batches in the next calls, without tracing again.

    Args:
      batches: of the replicas, of the same shapes.
    """
    self._batches = batches

  @tf.function
  def _run(self, batches, num_steps):
    # The loop is outside strategy.run, because all_gather raises in a loop inside of
    # it, and an update raises in a condition.
    totals = self._strategy.run(self._zeros)
    num_done, is_finite = 0, True
    while num_done < num_steps and is_finite:
      before = self._strategy.run(self._forward_state)
      result = self._strategy.run(self._compute_update, args=(next(batches),))
      is_finite = self._strategy.experimental_local_results(result.is_finite)[0]
      if is_finite:
        totals = self._strategy.run(self._apply_and_add, args=(result, totals))
        num_done += 1
      else:
        self._strategy.run(self._restore, args=(before,))
    flags = self._strategy.run(tf.identity, args=(self._host_flags(),))
    return num_done, *tf.nest.map_structure(self._sum, (totals, flags))

  @_no_autograph
  def _host_flags(self):
    flags = tf.numpy_function(lambda: self._host_flags_fn().pack(), [], tf.int32)
    return tf.ensure_shape(flags, [len(HostFlags._fields)])

  @_no_autograph
  def _sum(self, value):
    return self._strategy.reduce("SUM", value, axis=None)

  @_no_autograph
  def _zeros(self):
    return tf.nest.map_structure(tf.zeros_like, self._zero_statistics)

  @_no_autograph
  def _compute_update(self, batch):
    return self._step.compute_update(batch, current_collectives())

  @_no_autograph
  def _apply_and_add(self, result, totals):
    self._step.apply_update(result.update)
    return tf.nest.map_structure(tf.add, totals, result.statistics)

  @_no_autograph
  def _forward_state(self):
    return self._step.read_forward_state()

  @_no_autograph
  def _restore(self, values):
    self._step.write_forward_state(values)


class Safety(NamedTuple):
  """Objects that protect a run from losing its results.

  Attributes:
    checkpoints: of the run.
    preemption: whether a stop was requested.
    watchdog: monitors the steps.
    reporting_bad_records: context of steps (first, last) that names unreadable records.
    not_finite: handles an update that is not finite.
  """

  checkpoints: Checkpoints
  preemption: Preemption
  watchdog: Watchdog
  reporting_bad_records: Callable[[int, int], AbstractContextManager]
  not_finite: NonfinitePolicy


class Loop:
  """The outer loop, which runs the training to its end.

  Args:
    inner: several steps on all replicas.
    optimizer: its `iterations` are the step; its learning rate is logged.
    options: length, and intervals of logging and checkpoints.
    images_per_step: the global batch size.
    callbacks: called in order after each inner loop.
    safety: protects the results.
    metrics_fns: each returns additional metrics of an inner loop, given the step at its
      end.
  """

  def __init__(
    self,
    *,
    inner: InnerLoop,
    optimizer: tf.keras.optimizers.Optimizer,
    options: LoopOptions,
    images_per_step: int,
    callbacks: Sequence[Callback],
    safety: Safety,
    metrics_fns: Sequence[Callable[[int], Mapping[str, float]]] = (),
  ):
    self._inner = inner
    self._optimizer = optimizer
    self._options = options
    self._images_per_step = images_per_step
    self._callbacks = list(callbacks)
    self._safety = safety
    self._metrics_fns = list(metrics_fns)
    self._is_over = False

  def add_callback(self, callback: Callback) -> None:
    """Adds a callback after all others.

    Args:
      callback: must be the same on every worker if it communicates with the others.
    """
    self._callbacks.append(callback)

  def run(self) -> None:
    """Runs the remaining steps, and waits until the last checkpoint is written.

    Raises:
      PreemptedError: a stop was requested, and the run has saved.
      NotFiniteError: an update is not finite, and the options do not skip it.
      UserError: a required checkpoint could not be written.
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
          safety.checkpoints.end_soon()
          safety.checkpoints.wait()  # A checkpoint may be in progress.
        raise
      self._finish()

  def _step(self) -> int:
    return int(self._optimizer.iterations.numpy())

  def _run_once(self, step: int) -> int:
    # Loops end on multiples of their length, so that a resumed run logs the same rows.
    per_loop = self._options.steps_per_loop
    end = min((step // per_loop + 1) * per_loop, self._options.num_steps)
    start_s = time.monotonic()
    statistics, flags = self._run_steps(step, end)
    seconds_per_step = (time.monotonic() - start_s) / (end - step)
    self._safety.watchdog.record_step_time(seconds_per_step)
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
      for callback in self._callbacks:
        if callback(StepReport(end, self._options.num_steps, metrics)):
          self._is_over = True
          self._safety.checkpoints.save(end)
        watchdog_lib.beat()
      self._act_on(flags, end)
    return end

  def _run_steps(self, step: int, end: int) -> tuple[Mapping[str, Any], HostFlags]:
    """Returns statistics of the finite steps, and the hosts' flags."""
    parts = []
    while step < end:
      with self._safety.reporting_bad_records(step, end):
        done = self._inner.run(end - step)
      parts.append(done.statistics)
      step += done.num_steps
      if step < end:
        with self._safety.watchdog.acting():  # The diagnosis compiles the step again.
          self._safety.not_finite.handle_nonfinite(step)
        step += 1
    total = tf.nest.map_structure(lambda *each: functools.reduce(np.add, each), *parts)
    return total, done.host_flags

  def _act_on(self, flags: HostFlags, step: int) -> None:
    """Stops if a worker requests it, or could not save a required checkpoint."""
    checkpoints = self._safety.checkpoints
    if flags.is_saving_impossible and self._options.on_disk_full == "stop":
      checkpoints.wait()
      raise UserError(
        f"{checkpoints.failure or 'another worker could not save'}; "
        f"{checkpoints.newest}; free some disk space, or set "
        "LoopOptions.on_disk_full = 'continue'."
      )
    if flags.stop_requested:
      checkpoints.save(step)
      checkpoints.wait()
      failure = f"{checkpoints.failure}; " if checkpoints.failure else ""
      raise PreemptedError(
        f"{self._safety.preemption.signal_name}: stopped after step {step}; {failure}"
        f"{checkpoints.newest}; the same command resumes it."
      )

  def _finish(self) -> None:
    checkpoints = self._safety.checkpoints
    checkpoints.wait()
    if checkpoints.failure:
      raise UserError(
        f"{checkpoints.failure}; {checkpoints.newest}; free some disk space, and run "
        "the same command again."
      )
    for callback in self._callbacks:
      finish = getattr(callback, "finish", None)
      if finish is not None:
        finish()
