"""Callbacks: progress lines, collapse warnings and the metrics file."""

from __future__ import annotations

import io
import resource
import sys

import pytest

from trainer.training.callbacks import (
  MetricsFile,
  ShowProgress,
  StepReport,
  WarnOfCollapse,
)

_METRICS = {
  "train/loss": 0.125,
  "mining/active_fraction": 0.5,
  "train/images_per_second": 1234.0,
  "train/seconds_per_step": 2.0,
}


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_is_one_line_per_report_in_a_log(caplog):
  with caplog.at_level("INFO", logger="absl"):
    ShowProgress()(StepReport(40, 100, _METRICS))
  assert caplog.messages == [
    "step 40/100  loss 0.12500  active 50.0%  1,234 images/s  2:00 left"
  ]


def test_progress_without_an_update_is_reported(caplog):
  metrics = {name: v for name, v in _METRICS.items() if name.startswith("train/")}
  del metrics["train/loss"]
  with caplog.at_level("INFO", logger="absl"):
    ShowProgress()(StepReport(40, 100, metrics))
  assert caplog.messages == ["step 40/100  no update  1,234 images/s  2:00 left"]


def test_progress_is_in_place_on_a_terminal(monkeypatch):
  terminal = _Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  show = ShowProgress()
  show(StepReport(40, 100, _METRICS))
  show(StepReport(100, 100, _METRICS))
  assert terminal.getvalue().count("\r") == 2
  assert terminal.getvalue().endswith("0:00 left\n")


def test_long_durations_are_printed_in_hours(caplog):
  with caplog.at_level("INFO", logger="absl"):
    ShowProgress()(StepReport(0, 3600, _METRICS))
  assert caplog.messages[0].endswith("2:00:00 left")


def test_collapse_is_reported_once_with_remedies(caplog):
  warn = WarnOfCollapse()
  healthy = {"mining/duplicate_fraction": 0.0, "mining/embedding_spread": 0.9}
  for step, spread in ((10, 0.9), (20, 1e-4), (30, 1e-5)):
    warn(StepReport(step, 30, {**healthy, "mining/embedding_spread": spread}))
  [record] = caplog.records
  assert record.levelname == "WARNING"
  assert "Step 20: collapse" in record.getMessage()
  assert "JitteredLoss" in record.getMessage()


def test_rows_are_read_as_they_were_written(tmp_path):
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


def test_incomplete_last_line_is_skipped(tmp_path):
  file = MetricsFile(str(tmp_path))
  file.append(10, {})
  with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as torn:
    torn.write('{"step": 20, "train/lo')
  assert [row["step"] for row in file.rows()] == [10]


def test_run_without_a_history_file_has_no_rows(tmp_path):
  assert list(MetricsFile(str(tmp_path)).rows()) == []


@pytest.fixture
def no_larger_files():
  """Limits the size of files, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limit(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))

  yield limit
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_are_kept_on_a_full_disk_and_written_later(tmp_path, no_larger_files):
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
