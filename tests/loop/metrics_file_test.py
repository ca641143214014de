"""`metrics.jsonl`: each step once, whatever happened to the process."""

from __future__ import annotations

from trainer.loop.metrics_file import MetricsFile


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
