"""Deadlines of the watchdog; the fault table tests that it stops runs."""

from __future__ import annotations

import os
import time

from trainer.runtime.watchdog import Watchdog


def _watchdog(start_deadline_s=1800.0, step_deadline_s=None):
  return Watchdog(
    os.devnull, start_deadline_s=start_deadline_s, step_deadline_s=step_deadline_s
  )


def test_deadline_of_the_first_steps_includes_compilation():
  assert _watchdog(start_deadline_s=900.0).deadline_s == 900.0
  assert _watchdog(start_deadline_s=900.0, step_deadline_s=5.0).deadline_s == 900.0


def test_deadline_depends_on_the_median_step_not_the_first_call():
  watchdog = _watchdog()
  for seconds in (500.0, 4.0, 5.0, 90.0):
    watchdog.record_step_time(seconds)
  assert watchdog.deadline_s == 100.0


def test_deadline_of_fast_steps_is_one_minute():
  watchdog = _watchdog()
  for _ in range(3):
    watchdog.record_step_time(0.001)
  assert watchdog.deadline_s == 60.0


def test_given_deadline_applies_to_steps():
  watchdog = _watchdog(step_deadline_s=7.0)
  watchdog.record_step_time(100.0)
  assert watchdog.deadline_s == 7.0


def test_deadline_after_the_steps_equals_that_before_them():
  watchdog = _watchdog(start_deadline_s=900.0)
  with watchdog.stepping(lambda: 0):
    for _ in range(3):
      watchdog.record_step_time(1.0)
  assert watchdog.deadline_s == 900.0


def test_run_with_progress_is_not_stopped():
  watchdog = _watchdog(start_deadline_s=0.2, step_deadline_s=0.2)
  moves = iter(range(10**6))
  with watchdog.watching(), watchdog.stepping(lambda: next(moves)):
    time.sleep(1.0)
  assert next(moves) > 3


def test_work_between_steps_has_the_deadline_of_a_start():
  watchdog = _watchdog(start_deadline_s=900.0, step_deadline_s=7.0)
  watchdog.record_step_time(1.0)
  with watchdog.acting():
    assert watchdog.deadline_s == 900.0
  assert watchdog.deadline_s == 7.0
