"""Callbacks of the outer loop: logging, metrics, events and checkpoints.

`metrics.jsonl` and the TensorBoard events can be read without this package. Each
callback is called with a `StepReport`, the only information that it gets from the outer
loop.
"""

from __future__ import annotations

import contextlib
import json
import logging as python_logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable, NamedTuple, Optional

import tensorflow as tf
from absl import logging

from trainer import __version__
from trainer.config import run_config
from trainer.errors import UnwritableError, UserError, short_reason
from trainer.losses.mining_statistics import ADVICE, describe_collapse
from trainer.run import Run
from trainer.runtime import filesystem
from trainer.training.checkpoint import Checkpoints
from trainer.training.step import TrainStep

_QUANTILES = ("p05", "p50", "p95")

LOGGED = (
  "train/loss",
  "train/learning_rate",
  "train/images_per_second",
  "train/seconds_per_step",
  "mining/active_fraction",
  "mining/anchors_without_positive",
  "mining/duplicate_fraction",
  "mining/easy_fraction",
  "mining/semi_hard_fraction",
  "mining/hard_fraction",
  "mining/margin_violations",
  "mining/hardest_positive_distance",
  "mining/hardest_negative_distance",
  *(f"mining/positive_distance_{each}" for each in _QUANTILES),
  *(f"mining/negative_distance_{each}" for each in _QUANTILES),
  "mining/embedding_norm",
  "mining/embedding_norm_std",
  "mining/embedding_spread",
  "mining/embedding_rank",
)


METRICS_FILE = "metrics.jsonl"
HISTORY_FILE = os.path.join("eval", "history.jsonl")
LOG_FILE = "log.txt"


class MetricsFile:
  """A file of rows; after a resume, rows that will be written again are dropped.

  A row that does not fit on the disk is kept and written before the next one.

  Args:
    model_dir: folder of the run.
    name: of the file in it.
  """

  def __init__(self, model_dir: str, name: str = METRICS_FILE):
    self._path = os.path.join(model_dir, name)
    self._waiting: list[str] = []

  def append(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one whole row and flushes it to the disk, or keeps it if the disk is full.

    Args:
      step: number of steps done.
      metrics: by metric name.
    """
    row = {"step": step, "time": round(time.time(), 3), **metrics}
    self._waiting.append(json.dumps(row) + "\n")
    try:
      self.write_waiting()
    except UnwritableError as error:
      logging.warning("%s.", error)

  def write_waiting(self) -> None:
    """Writes the rows that were kept.

    Raises:
      UnwritableError: they cannot be written, and stay kept.
    """
    if not self._waiting:
      return
    try:
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      _append(self._path, "".join(self._waiting).encode())
    except OSError as error:
      raise UnwritableError(
        f"{self._path} can't be written: {short_reason(error)}"
      ) from error
    self._waiting.clear()

  def rows(self) -> Iterator[dict[str, float]]:
    """Yields the rows; skips a last line that a killed process left incomplete.

    Raises:
      UserError: another line is damaged.
    """
    if not os.path.exists(self._path):
      return
    with open(self._path, encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        if line.endswith("\n"):
          yield _row(self._path, number, line)

  def drop_after(self, step: int) -> None:
    """Keeps the rows up to a step, so that each step occurs once.

    Args:
      step: the last step to keep.

    Raises:
      UnwritableError: the file cannot be written; it is unchanged.
      UserError: a line is damaged.
    """
    kept = [row for row in self.rows() if row["step"] <= step]
    try:
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      filesystem.replace_file(
        self._path, "".join(json.dumps(row) + "\n" for row in kept)
      )
    except OSError as error:
      raise UnwritableError(
        f"{self._path} can't be written: {short_reason(error)}"
      ) from error


def _append(path: str, content: bytes) -> None:
  """Appends content to a file and flushes it to the disk, whole or not at all."""
  descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
  try:
    size = os.fstat(descriptor).st_size
    try:
      while content:
        content = content[os.write(descriptor, content) :]
      os.fsync(descriptor)
    except OSError:
      os.ftruncate(descriptor, size)
      raise
  finally:
    os.close(descriptor)


def _row(path: str, number: int, line: str) -> dict[str, float]:
  try:
    row = json.loads(line)
    if isinstance(row, dict) and isinstance(row["step"], int):
      return row
  except (ValueError, KeyError, RecursionError):
    pass
  raise UserError(
    f"line {number} of {path} is damaged: it is not a JSON object with a step; "
    "remove it."
  )


class _LogFile(python_logging.FileHandler):
  """Log file handler that omits records it cannot write: the terminal has them."""

  def emit(self, record):
    """Writes a record; the first one creates the file, if there is room."""
    with contextlib.suppress(OSError):
      super().emit(record)

  def handleError(self, record):  # noqa: N802  Name of the base class.
    del record


def keep_log(model_dir: str) -> None:
  """Appends every line logged from now on to the run's log.

  Args:
    model_dir: folder of the run, which exists.
  """
  path = os.path.join(model_dir, LOG_FILE)
  handler = _LogFile(path, encoding="utf-8", delay=True)
  handler.setFormatter(logging.PythonFormatter())
  logging.get_absl_logger().addHandler(handler)


def log_start(
  run: Run, batch_shape: Sequence[int], step: TrainStep, first_step: int
) -> None:
  """Logs once what is trained, and where.

  Args:
    run: gives the folder.
    batch_shape: (P, K), classes and samples per class of the global batch.
    step: its variables exist.
    first_step: number of steps done.
  """
  num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
  num_classes, num_samples = batch_shape
  num_parameters = sum(v.shape.num_elements() for v in step.encoder.trainable_variables)
  logging.info("trainer %s, TensorFlow %s.", __version__, tf.__version__)
  logging.info(
    "%d replicas; global batch %d = %d classes x %d samples, replica batch %d.",
    num_replicas,
    num_classes * num_samples,
    num_classes,
    num_samples,
    num_classes * num_samples // num_replicas,
  )
  logging.info("%s trainable parameters.", f"{num_parameters:,}")
  logging.info("From step %d; writing to %s.", first_step, run.model_dir)


class StepReport(NamedTuple):
  """Progress of a run.

  Attributes:
    step: number of steps done.
    num_steps: total number of steps.
    metrics: of the steps since the last report, by metric name.
  """

  step: int
  num_steps: int
  metrics: Mapping[str, float]


# Returning True ends the run, as if it had done its last step.
Callback = Callable[[StepReport], Optional[bool]]


class ShowProgress:
  """Callback for a progress line, in place on a terminal, one per report in logs."""

  def __init__(self):
    self._is_terminal = sys.stderr.isatty()
    if self._is_terminal:
      logging.get_absl_handler().addFilter(lambda r: not hasattr(r, "is_in_place"))

  def __call__(self, report: StepReport) -> None:
    """Shows step, loss, active fraction, speed and time left."""
    line = self._line(report)
    if not self._is_terminal:
      logging.info("%s", line)
      return
    logging.get_absl_logger().info("%s", line, extra={"is_in_place": True})
    end = "\n" if report.step == report.num_steps else ""
    sys.stderr.write(f"\r\x1b[K{line}{end}")
    sys.stderr.flush()

  def _line(self, report: StepReport) -> str:
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

  def _time_left(self, report: StepReport) -> str:
    seconds = (report.num_steps - report.step) * report.metrics[
      "train/seconds_per_step"
    ]
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class WarnOfCollapse:
  """Callback that logs one warning when embeddings have collapsed, with suggestions."""

  def __init__(self):
    self._has_warned = False

  def __call__(self, report: StepReport) -> None:
    """Warns if the mining statistics show a collapse."""
    collapse = describe_collapse(report.metrics)
    if collapse and not self._has_warned:
      logging.warning("Step %d: collapse: %s; %s.", report.step, collapse, ADVICE)
      self._has_warned = True


class WriteMetrics:
  """Callback that writes a row of `metrics.jsonl` for each report."""

  def __init__(self, file: MetricsFile):
    self._file = file

  def __call__(self, report: StepReport) -> None:
    """Appends the report's metrics."""
    self._file.append(report.step, report.metrics)

  def finish(self) -> None:
    """Writes the rows that did not fit on the disk before.

    Raises:
      UnwritableError: there still is no room.
    """
    self._file.write_waiting()


class WriteEvents:
  """Callback that writes TensorBoard events to the run's folder.

  Readers of a file stop at the first truncated event. Reports that do not fit on the
  disk are therefore kept, and written to a new file before the next one.

  Args:
    model_dir: folder of the run.
  """

  def __init__(self, model_dir: str):
    self._model_dir = model_dir
    self._writer: Optional[tf.summary.SummaryWriter] = None
    self._waiting: list[StepReport] = []

  def __call__(self, report: StepReport) -> None:
    """Writes each metric as a scalar."""
    self._waiting.append(report)
    self._write_waiting()

  def finish(self) -> None:
    """Writes the reports that did not fit before; does not fail if there is no room."""
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
      reason, step = short_reason(error), self._waiting[-1].step
      logging.warning("Events of step %d can't be written: %s.", step, reason)


class WriteOnce:
  """Callback that writes a file on the first report, or later if the disk was full.

  Args:
    path: of the file, for messages.
    write_fn: writes the file.
  """

  def __init__(self, path: str, write_fn: Callable[[], None]):
    self._path = path
    self._write_fn = write_fn
    self._is_written = False

  def __call__(self, report: StepReport) -> None:
    """Writes the file unless it is written."""
    del report
    try:
      self.finish()
    except UnwritableError as error:
      logging.warning("%s.", error)

  def finish(self) -> None:
    """Writes the file unless it is written.

    Raises:
      UnwritableError: it cannot be written.
    """
    if self._is_written:
      return
    try:
      self._write_fn()
    except OSError as error:
      raise UnwritableError(
        f"{self._path} can't be written: {short_reason(error)}"
      ) from error
    self._is_written = True


class SaveOperativeConfig(WriteOnce):
  """Callback that writes `operative_config.gin` once all parts have been called.

  Args:
    model_dir: folder of the run.
  """

  def __init__(self, model_dir: str):
    path = os.path.join(model_dir, run_config.OPERATIVE_CONFIG_FILE)
    super().__init__(path, lambda: run_config.save_operative_config(model_dir))


class SaveCheckpoint:
  """Callback that saves a checkpoint every `every_steps` steps, and after the last."""

  def __init__(self, checkpoints: Checkpoints, *, every_steps: int):
    self._checkpoints = checkpoints
    self._every_steps = every_steps

  def __call__(self, report: StepReport) -> None:
    """Saves a checkpoint if it is due."""
    if report.step % self._every_steps == 0 or report.step == report.num_steps:
      self._checkpoints.save(report.step)
