"""What a run says: at its start, and all of it, kept in `log.txt` in its folder."""

from __future__ import annotations

import contextlib
import logging as python_logging
import os
from collections.abc import Sequence

import tensorflow as tf
from absl import logging

from trainer import __version__
from trainer.loop.step import TrainStep
from trainer.run import Run

FILE_NAME = "log.txt"


class _LogFile(python_logging.FileHandler):
  """Omits what can't be written: the terminal has it."""

  def emit(self, record):
    """Writes a record; the first one makes the file, where there is room."""
    with contextlib.suppress(OSError):
      super().emit(record)

  def handleError(self, record):  # noqa: N802  The base class's name.
    del record


def keep_log(model_dir: str) -> None:
  """Appends every line that is logged from now on to the run's log.

  Args:
    model_dir: folder of the run, which exists.
  """
  path = os.path.join(model_dir, FILE_NAME)
  handler = _LogFile(path, encoding="utf-8", delay=True)
  handler.setFormatter(logging.PythonFormatter())
  logging.get_absl_logger().addHandler(handler)


def log_start(
  run: Run, batch_shape: Sequence[int], step: TrainStep, first_step: int
) -> None:
  """Says once what is trained, and where.

  Args:
    run: where it lives.
    batch_shape: (P, K), classes and samples a class of the global batch.
    step: with its variables made.
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
