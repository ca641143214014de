"""Actions: the progress line, and the warning of collapse."""

from __future__ import annotations

import io
import sys

from trainer.training.callbacks import ShowProgress, StepReport, WarnOfCollapse

_METRICS = {
  "train/loss": 0.125,
  "mining/active_fraction": 0.5,
  "train/images_per_second": 1234.0,
  "train/seconds_per_step": 2.0,
}


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_is_a_line_a_report_in_a_log(caplog):
  with caplog.at_level("INFO", logger="absl"):
    ShowProgress()(StepReport(40, 100, _METRICS))
  assert caplog.messages == [
    "step 40/100  loss 0.12500  active 50.0%  1,234 images/s  2:00 left"
  ]


def test_progress_without_an_update_says_so(caplog):
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


def test_hours_are_told_as_hours(caplog):
  with caplog.at_level("INFO", logger="absl"):
    ShowProgress()(StepReport(0, 3600, _METRICS))
  assert caplog.messages[0].endswith("2:00:00 left")


def test_collapse_is_said_once_with_what_to_try(caplog):
  warn = WarnOfCollapse()
  healthy = {"mining/duplicate_fraction": 0.0, "mining/embedding_spread": 0.9}
  for step, spread in ((10, 0.9), (20, 1e-4), (30, 1e-5)):
    warn(StepReport(step, 30, {**healthy, "mining/embedding_spread": spread}))
  [record] = caplog.records
  assert record.levelname == "WARNING"
  assert "Step 20: collapse" in record.getMessage()
  assert "JitteredLoss" in record.getMessage()
