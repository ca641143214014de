"""What happens after each call of the inner loop: log, write, save.

An action is called with a `Report`; the outer loop knows no more of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Callable, NamedTuple, Optional

import tensorflow as tf
from absl import logging

from trainer.config import saved
from trainer.errors import reason_of
from trainer.loop.checkpoint import Checkpoints
from trainer.loop.metrics_file import MetricsFile
from trainer.losses.collapse import ADVICE, describe_collapse


class Report(NamedTuple):
  """Where a run stands.

  Attributes:
    step: number of steps done.
    num_steps: number of steps in all.
    metrics: of the steps since the last report, by metric name.
  """

  step: int
  num_steps: int
  metrics: Mapping[str, float]


# What gives True ends the run, as if it had made its last step.
Action = Callable[[Report], Optional[bool]]


class ShowProgress:
  """A progress line: in place on a terminal, one line a report in logs."""

  def __init__(self):
    self._is_terminal = sys.stderr.isatty()
    if self._is_terminal:
      logging.get_absl_handler().addFilter(lambda r: not hasattr(r, "is_in_place"))

  def __call__(self, report: Report) -> None:
    """Shows step, loss, active fraction, speed and time left."""
    line = self._line(report)
    if not self._is_terminal:
      logging.info("%s", line)
      return
    logging.get_absl_logger().info("%s", line, extra={"is_in_place": True})
    end = "\n" if report.step == report.num_steps else ""
    sys.stderr.write(f"\r\x1b[K{line}{end}")
    sys.stderr.flush()

  def _line(self, report: Report) -> str:
    metrics = report.metrics
    loss = metrics.get("train/loss")
    parts = [
      f"step {report.step}/{report.num_steps}",
      "no update" if loss is None else f"loss {loss:.5f}",
    ]
    if "mining/active_fraction" in metrics:
      parts.append(f"active {metrics['mining/active_fraction']:.1%}")
    parts.append(f"{metrics['train/images_per_second']:,.0f} images/s")
    parts.append(f"{self._time_left(report)} left")
    return "  ".join(parts)

  def _time_left(self, report: Report) -> str:
    seconds = (report.num_steps - report.step) * report.metrics[
      "train/seconds_per_step"
    ]
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class WarnOfCollapse:
  """Says in words, once, that the embeddings have collapsed, and what to try."""

  def __init__(self):
    self._is_said = False

  def __call__(self, report: Report) -> None:
    """Warns where the mining statistics tell of it."""
    collapse = describe_collapse(report.metrics)
    if collapse and not self._is_said:
      logging.warning("Step %d: collapse: %s; %s.", report.step, collapse, ADVICE)
      self._is_said = True


class WriteMetrics:
  """A row of `metrics.jsonl` a report."""

  def __init__(self, file: MetricsFile):
    self._file = file

  def __call__(self, report: Report) -> None:
    """Appends the report's metrics."""
    self._file.append(report.step, report.metrics)


class WriteEvents:
  """TensorBoard events in the run's folder."""

  def __init__(self, model_dir: str):
    self._writer = tf.summary.create_file_writer(model_dir)

  def __call__(self, report: Report) -> None:
    """Writes each metric as a scalar."""
    try:
      with self._writer.as_default(step=report.step):
        for name, value in report.metrics.items():
          tf.summary.scalar(name, value)
      self._writer.flush()
    except tf.errors.OpError as error:  # A full disk: curves are no reason to stop.
      reason = reason_of(error)
      logging.warning("Events of step %d can't be written: %s.", report.step, reason)


class SaveOperativeConfig:
  """`operative_config.gin`, once, when the first steps have called all parts."""

  def __init__(self, model_dir: str):
    self._model_dir = model_dir
    self._is_saved = False

  def __call__(self, report: Report) -> None:
    """Saves on the first report."""
    if not self._is_saved:
      saved.save_operative(self._model_dir)
      self._is_saved = True


class SaveCheckpoint:
  """A checkpoint every so many steps, and after the last."""

  def __init__(self, checkpoints: Checkpoints, *, every_steps: int):
    self._checkpoints = checkpoints
    self._every_steps = every_steps

  def __call__(self, report: Report) -> None:
    """Saves if it is time."""
    if report.step % self._every_steps == 0 or report.step == report.num_steps:
      self._checkpoints.save(report.step)
