"""Each row of the fault table, done for real."""

from __future__ import annotations

import os

import pytest

from tests.faults.every_row import ROWS
from tests.faults.runs import Runs, newest_step, values

_NEEDS_ROOT = (
  "full_disk_before_the_first_step",
  "full_disk_where_it_goes_on",
  "full_disk_where_it_stops",
)
# Of all combinations, those that have each choice once.
_OVERFLOWS = (
  "overflow_stop_2_batch_1",
  "overflow_skip_1_batch_10",
  "overflow_go_back_2_synchronized_10",
  "overflow_of_a_variance_alone",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp("faults"))


def _row(name):
  is_short = name.startswith("killed") or name == "told_one_worker_of_two"
  marks = [pytest.mark.resume] if is_short else []
  if name.startswith("overflow") and name not in _OVERFLOWS:
    marks.append(pytest.mark.thorough)
  return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", map(_row, ROWS))
def test_a_fault_ends_as_the_table_says(runs, name):
  if name in _NEEDS_ROOT and os.geteuid() != 0:
    pytest.skip("a disk of its own is mounted by root")
  outcome = ROWS[name](runs)
  assert outcome.seen == outcome.expected


def test_every_number_of_a_run_changes_between_its_checkpoints(runs):
  """Else a comparison of runs would find them equal for nothing."""
  whole = runs.finished(1)
  newest = newest_step(whole)
  now, before = (values(whole, step) for step in (newest, newest - 4))
  assert len(now) > 20
  constant = [n for n in now if now[n].tobytes() == before[n].tobytes()]
  assert all("learning_rate" in name for name in constant), constant
