"""What happens after each call of the inner loop: log, write, save.

An action is called with a `Report`; the outer loop knows no more of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Callable, NamedTuple, Optional

import tensorflow as tf
from absl import logging

from trainer.config import saved
from trainer.errors import UnwritableError, reason_of
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
  """A row of `metrics.jsonl` for each report."""

  def __init__(self, file: MetricsFile):
    self._file = file

  def __call__(self, report: Report) -> None:
    """Appends the report's metrics."""
    self._file.append(report.step, report.metrics)

  def finish(self) -> None:
    """Writes the rows that found no room so far.

    Raises:
      UnwritableError: there still is none.
    """
    self._file.write_waiting()


class WriteEvents:
  """TensorBoard events in the run's folder.

  Readers of a file stop at the first event that is cut off. So reports that find no
  room on the disk are kept, and written into a new file before the next one.

  Args:
    model_dir: folder of the run.
  """

  def __init__(self, model_dir: str):
    self._model_dir = model_dir
    self._writer: Optional[tf.summary.SummaryWriter] = None
    self._waiting: list[Report] = []

  def __call__(self, report: Report) -> None:
    """Writes each metric as a scalar."""
    self._waiting.append(report)
    self._write_waiting()

  def finish(self) -> None:
    """Writes the reports that found no room so far; curves are no reason to fail."""
    if self._waiting:
      self._write_waiting()

  def _write_waiting(self) -> None:
    try:
      if self._writer is None:
        self._writer = tf.summary.create_file_writer(self._model_dir)
      for report in self._waiting:
        with self._writer.as_default(step=report.step):
          for name, value in report.metrics.items():
            tf.summary.scalar(name, value)
      self._writer.flush()
      self._waiting.clear()
    except tf.errors.OpError as error:
      self._writer = None
      reason, step = reason_of(error), self._waiting[-1].step
      logging.warning("Events of step %d can't be written: %s.", step, reason)


class WriteOnce:
  """Writes a file on the first report; on a later one, where the disk was full.

  Args:
    path: of the file, for messages.
    write_fn: writes it.
  """

  def __init__(self, path: str, write_fn: Callable[[], None]):
    self._path = path
    self._write_fn = write_fn
    self._is_written = False

  def __call__(self, report: Report) -> None:
    """Writes it, unless it is written."""
    del report
    try:
      self.finish()
    except UnwritableError as error:
      logging.warning("%s.", error)

  def finish(self) -> None:
    """Writes it, unless it is written.

    Raises:
      UnwritableError: it can't be written.
    """
    if self._is_written:
      return
    try:
      self._write_fn()
    except OSError as error:
      raise UnwritableError(
        f"{self._path} can't be written: {reason_of(error)}"
      ) from error
    self._is_written = True


class SaveOperativeConfig(WriteOnce):
  """`operative_config.gin`, when the first steps have called all parts.

  Args:
    model_dir: folder of the run.
  """

  def __init__(self, model_dir: str):
    path = os.path.join(model_dir, saved.OPERATIVE_CONFIG)
    super().__init__(path, lambda: saved.save_operative(model_dir))


class SaveCheckpoint:
  """A checkpoint every so many steps, and after the last."""

  def __init__(self, checkpoints: Checkpoints, *, every_steps: int):
    self._checkpoints = checkpoints
    self._every_steps = every_steps

  def __call__(self, report: Report) -> None:
    """Saves if it is time."""
    if report.step % self._every_steps == 0 or report.step == report.num_steps:
      self._checkpoints.save(report.step)
