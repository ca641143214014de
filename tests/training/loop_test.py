"""The outer loop: where it stops, what it reports, which options it refuses."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import PreemptedError, UserError
from trainer.losses.loss_terms import WeightedMean
from trainer.runtime.shutdown import Preemption
from trainer.runtime.watchdog import Watchdog
from trainer.training.loop import InnerLoopResult, Loop, Safety
from trainer.training.options import LoopOptions


class _CountingInner:
  """Stands for the devices: counts steps into the optimizer, up to one that is bad."""

  def __init__(self, optimizer, bad_step, words):
    self.calls = []
    self._optimizer = optimizer
    self._bad_step = bad_step
    self._words = np.array(words, np.int32)

  def run(self, num_steps):
    first = int(self._optimizer.iterations.numpy())
    if first <= self._bad_step < first + num_steps:
      num_steps = self._bad_step - first
    self.calls.append(num_steps)
    self._optimizer.iterations.assign_add(num_steps)
    size = np.float32(num_steps)
    return InnerLoopResult(
      num_steps, {"train/loss": WeightedMean(size, size)}, self._words
    )


class _NotedCheckpoints:
  """Stands for the disk: notes what is saved."""

  def __init__(self, failure):
    self.failure = failure
    self.saved = []
    self.waited_for = []
    self.newest = "the newest is noted"

  def save(self, step):
    self.saved.append(step)

  def wait(self):
    self.waited_for = list(self.saved)


class _Policy:
  """Passes over what is not finite, and notes it."""

  def __init__(self, optimizer):
    self.passed_over = []
    self._optimizer = optimizer

  def handle_nonfinite(self, step):
    self.passed_over.append(step)
    self._optimizer.iterations.assign(step + 1)

  def metrics(self):
    return {}


class _Parts:
  """A loop and what it is made of."""

  def __init__(
    self, *, first_step=0, bad_step=-1, words=(0, 0), failure=None, **options
  ):
    optimizer = tf.keras.optimizers.SGD(0.5)
    optimizer.iterations.assign(first_step)
    self.reports = []
    self.inner = _CountingInner(optimizer, bad_step, words)
    self.checkpoints = _NotedCheckpoints(failure)
    self.policy = _Policy(optimizer)
    self.loop = Loop(
      inner=self.inner,
      optimizer=optimizer,
      options=LoopOptions(**{**_OPTIONS, **options}),
      images_per_step=8,
      actions=[self.reports.append],
      safety=Safety(
        self.checkpoints,
        Preemption(1.0),
        Watchdog(os.devnull, start_deadline_s=1800.0, step_deadline_s=None),
        lambda *_: contextlib.nullcontext(),
        self.policy,
      ),
    )


def _run_loop(**options):
  parts = _Parts(**options)
  parts.loop.run()
  return parts.inner.calls, parts.reports


_OPTIONS = {"num_steps": 10, "steps_per_loop": 4, "checkpoint_every_steps": 8}


def test_loops_end_on_multiples_of_their_length_and_at_the_last_step():
  calls, reports = _run_loop(first_step=0)
  assert calls == [4, 4, 2]
  assert [report.step for report in reports] == [4, 8, 10]


def test_a_resumed_loop_ends_on_the_same_steps():
  calls, reports = _run_loop(first_step=6)
  assert calls == [2, 2]
  assert [report.step for report in reports] == [8, 10]


@pytest.mark.parametrize("error", [UserError("a mistake"), MemoryError("a fault")])
def test_what_is_being_saved_is_waited_for_before_an_error_ends_the_run(error):
  parts = _Parts()

  def save_and_fail(report):
    parts.checkpoints.save(report.step)
    raise error

  parts.loop.add_action(save_and_fail)
  with pytest.raises(type(error), match=str(error)):
    parts.loop.run()
  assert parts.checkpoints.waited_for == [4]


def test_a_finished_run_does_nothing():
  assert _run_loop(first_step=10) == ([], [])


def test_reports_have_loss_rate_and_speed():
  _, [report, *_] = _run_loop(first_step=0)
  assert report.metrics["train/loss"] == 1.0
  assert report.metrics["train/learning_rate"] == 0.5
  assert report.metrics["train/images_per_second"] > 0


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"num_steps": 0}, "num_steps=0 must be at least 1"),
    ({"steps_per_loop": 0}, "steps_per_loop=0 must be at least 1"),
    ({"checkpoint_every_steps": 6}, "multiple of steps_per_loop=4"),
    ({"on_disk_full": "pray"}, "on_disk_full='pray' is none of go_on, stop"),
    ({"on_nonfinite": "no"}, "on_nonfinite='no' is none of stop, skip, go_back"),
  ],
)
def test_options_that_do_not_fit_are_refused(changed, message):
  with pytest.raises(UserError, match=message):
    LoopOptions(**{**_OPTIONS, **changed})


def test_a_loop_that_is_told_to_stop_saves_after_the_call_and_says_so():
  parts = _Parts(words=(1, 0))
  with pytest.raises(PreemptedError, match="stopped after step 4; the newest is noted"):
    parts.loop.run()
  assert parts.inner.calls == [4]
  assert parts.checkpoints.saved == [4]
  assert [report.step for report in parts.reports] == [4]


def test_a_full_disk_stops_the_loop_only_where_it_should():
  full = {"words": (0, 2), "failure": "no space"}
  parts = _Parts(**full, on_disk_full="stop")
  with pytest.raises(UserError, match="no space; the newest is noted"):
    parts.loop.run()
  assert parts.inner.calls == [4]
  parts = _Parts(**full)
  with pytest.raises(UserError, match="no space; the newest is noted"):
    parts.loop.run()  # All is trained, and what was trained is not on the disk.
  assert parts.inner.calls == [4, 4, 2]


def test_a_batch_that_is_passed_over_counts_as_a_step():
  parts = _Parts(bad_step=5)
  parts.loop.run()
  assert parts.inner.calls == [4, 1, 2, 2]
  assert parts.policy.passed_over == [5]
  assert [report.step for report in parts.reports] == [4, 8, 10]
  assert [report.metrics["train/loss"] for report in parts.reports] == [1.0, 1.0, 1.0]
