"""Each row of the fault table, with real faults."""

from __future__ import annotations

import os

import pytest

from tests.faults.every_row import ROWS
from tests.faults.runs import Runs, newest_step, values

_NEEDS_ROOT = (
  "full_disk_before_the_first_step",
  "full_disk_with_continue",
  "full_disk_with_stop",
)
# Rows that the check omits: another row has the same fault elsewhere, or a test within
# one process covers it. So do all overflows.
_THOROUGH = {
  "killed_on_one_replica",
  "killed_while_saving_class_centres",
  "another_number_of_replicas",
  "interrupted_twice",
  "not_finite_with_restore",
  "stopped_after_the_grace_period",
  "stopped_while_evaluating",
  "suspended_worker",
  "stopped_while_compiling",
  "stopped_on_one_worker_while_evaluating",
  "checkpoint_cut_short",
  "checkpoint_with_a_flipped_bit",
  "full_disk_with_stop",
  "full_disk_before_the_first_step",
  "not_finite_with_skip",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  return Runs(tmp_path_factory.mktemp("faults"))


def _row(name):
  is_short = name.startswith("killed") or name == "stopped_on_one_worker_of_two"
  marks = [pytest.mark.resume] if is_short else []
  if name in _THOROUGH or name.startswith("overflow"):
    marks.append(pytest.mark.thorough)
  return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", map(_row, ROWS))
def test_fault_has_the_outcome_of_the_table(runs, name):
  if name in _NEEDS_ROOT and os.geteuid() != 0:
    pytest.skip("a disk of its own is mounted by root")
  outcome = ROWS[name](runs)
  assert outcome.seen == outcome.expected


def test_named_rows_exist():
  assert {*_NEEDS_ROOT, *_THOROUGH} <= set(ROWS)


def test_every_value_of_a_run_changes_between_its_checkpoints(runs):
  """Otherwise a comparison of runs could pass without a change."""
  whole = runs.finished(1)
  newest = newest_step(whole)
  now, before = (values(whole, step) for step in (newest, newest - 4))
  assert len(now) > 20
  constant = [n for n in now if now[n].tobytes() == before[n].tobytes()]
  assert all("learning_rate" in name for name in constant), constant
