"""`metrics.jsonl`: each step once, whatever happened to the process."""

from __future__ import annotations

import resource

import pytest

from trainer.training.callbacks import MetricsFile


def test_rows_come_back_as_they_were_written(tmp_path):
  file = MetricsFile(str(tmp_path))
  file.append(10, {"train/loss": 0.5})
  file.append(20, {"train/loss": 0.25})
  assert [(row["step"], row["train/loss"]) for row in file.rows()] == [
    (10, 0.5),
    (20, 0.25),
  ]


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
  file = MetricsFile(str(tmp_path))
  for step in (10, 20, 30):
    file.append(step, {})
  file.drop_after(20)
  file.append(30, {"train/loss": 1.0})
  assert [row["step"] for row in file.rows()] == [10, 20, 30]


def test_a_torn_last_line_is_passed_over(tmp_path):
  file = MetricsFile(str(tmp_path))
  file.append(10, {})
  with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as torn:
    torn.write('{"step": 20, "train/lo')
  assert [row["step"] for row in file.rows()] == [10]


def test_a_run_that_has_not_begun_has_no_rows(tmp_path):
  assert list(MetricsFile(str(tmp_path)).rows()) == []


@pytest.fixture
def no_larger_files():
  """Makes files end at so many bytes, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limit(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))

  yield limit
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_find_no_room_are_kept_and_written_later(tmp_path, no_larger_files):
  file = MetricsFile(str(tmp_path))
  file.append(10, {"train/loss": 0.5})
  size = (tmp_path / "metrics.jsonl").stat().st_size
  no_larger_files(size + 20)
  file.append(20, {"train/loss": 0.25})
  file.append(30, {"train/loss": 0.125})
  assert (tmp_path / "metrics.jsonl").stat().st_size == size
  no_larger_files(10**6)
  file.append(40, {"train/loss": 0.0625})
  assert [row["step"] for row in file.rows()] == [10, 20, 30, 40]
