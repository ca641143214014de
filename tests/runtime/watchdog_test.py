"""How long a run may stand still; that it is ended is shown in the fault table."""

from __future__ import annotations

import os
import time

from trainer.runtime.watchdog import Watchdog


def _watchdog(start_deadline_s=1800.0, step_deadline_s=None):
  return Watchdog(
    os.devnull, start_deadline_s=start_deadline_s, step_deadline_s=step_deadline_s
  )


def test_until_the_first_steps_are_done_there_is_time_to_compile():
  assert _watchdog(start_deadline_s=900.0).deadline_s == 900.0
  assert _watchdog(start_deadline_s=900.0, step_deadline_s=5.0).deadline_s == 900.0


def test_the_deadline_follows_from_the_median_step_and_not_from_the_first_call():
  watchdog = _watchdog()
  for seconds in (500.0, 4.0, 5.0, 90.0):
    watchdog.record_step_time(seconds)
  assert watchdog.deadline_s == 100.0


def test_fast_steps_have_a_minute():
  watchdog = _watchdog()
  for _ in range(3):
    watchdog.record_step_time(0.001)
  assert watchdog.deadline_s == 60.0


def test_a_deadline_that_is_given_is_that_of_steps():
  watchdog = _watchdog(step_deadline_s=7.0)
  watchdog.record_step_time(100.0)
  assert watchdog.deadline_s == 7.0


def test_behind_the_steps_there_is_as_much_time_as_before():
  watchdog = _watchdog(start_deadline_s=900.0)
  with watchdog.stepping(lambda: 0):
    for _ in range(3):
      watchdog.record_step_time(1.0)
  assert watchdog.deadline_s == 900.0


def test_a_run_whose_steps_move_is_not_ended():
  watchdog = _watchdog(start_deadline_s=0.2, step_deadline_s=0.2)
  moves = iter(range(10**6))
  with watchdog.watching(), watchdog.stepping(lambda: next(moves)):
    time.sleep(1.0)
  assert next(moves) > 3


def test_what_is_done_between_steps_has_as_much_time_as_a_start():
  watchdog = _watchdog(start_deadline_s=900.0, step_deadline_s=7.0)
  watchdog.record_step_time(1.0)
  with watchdog.acting():
    assert watchdog.deadline_s == 900.0
  assert watchdog.deadline_s == 7.0
