"""The outer loop: where it stops, what it reports, which options it refuses."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import UserError
from trainer.loop.loop import Loop, LoopOptions
from trainer.losses.terms import Ratio


class _CountingInner:
  """Stands for the devices: counts steps into the optimizer."""

  def __init__(self, optimizer):
    self.calls = []
    self._optimizer = optimizer

  def run(self, num_steps):
    self.calls.append(num_steps)
    self._optimizer.iterations.assign_add(num_steps)
    return {"train/loss": Ratio(np.float32(num_steps), np.float32(num_steps))}


def _run_loop(*, first_step, **options):
  optimizer = tf.keras.optimizers.SGD(0.5)
  optimizer.iterations.assign(first_step)
  inner, reports = _CountingInner(optimizer), []
  Loop(
    inner=inner,
    naming_bad_records=lambda *_: contextlib.nullcontext(),
    optimizer=optimizer,
    options=LoopOptions(**options),
    images_per_step=8,
    actions=[reports.append],
  ).run()
  return inner.calls, reports


_OPTIONS = {"num_steps": 10, "steps_per_loop": 4, "checkpoint_every_steps": 8}


def test_loops_end_on_multiples_of_their_length_and_at_the_last_step():
  calls, reports = _run_loop(first_step=0, **_OPTIONS)
  assert calls == [4, 4, 2]
  assert [report.step for report in reports] == [4, 8, 10]


def test_a_resumed_loop_ends_on_the_same_steps():
  calls, reports = _run_loop(first_step=6, **_OPTIONS)
  assert calls == [2, 2]
  assert [report.step for report in reports] == [8, 10]


def test_a_finished_run_does_nothing():
  assert _run_loop(first_step=10, **_OPTIONS) == ([], [])


def test_reports_have_loss_rate_and_speed():
  _, [report, *_] = _run_loop(first_step=0, **_OPTIONS)
  assert report.metrics["train/loss"] == 1.0
  assert report.metrics["train/learning_rate"] == 0.5
  assert report.metrics["train/images_per_second"] > 0


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"num_steps": 0}, "num_steps=0 must be at least 1"),
    ({"steps_per_loop": 0}, "steps_per_loop=0 must be at least 1"),
    ({"checkpoint_every_steps": 6}, "multiple of steps_per_loop=4"),
  ],
)
def test_options_that_do_not_fit_are_refused(changed, message):
  with pytest.raises(UserError, match=message):
    LoopOptions(**{**_OPTIONS, **changed})
