"""Mode `train_and_evaluate`: ingestion, training with early stopping, and results."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Optional

import gin
import tensorflow as tf
from absl import logging

from trainer.cli import ingest
from trainer.cli.evaluate import BEST_FOLDER, Evaluation, publish
from trainer.cli.train import Training, training
from trainer.config import gin_statements
from trainer.distribute.strategy import make_strategy
from trainer.distribute.workers import current_workers
from trainer.errors import UnwritableError, UserError, check_at_least
from trainer.retrieval.results import Results
from trainer.run import Run, watching
from trainer.training import run_folder
from trainer.training.callbacks import HISTORY_FILE, MetricsFile, StepReport, WriteOnce
from trainer.training.checkpoint import Checkpoints
from trainer.training.options import LoopOptions
from trainer.training.step import TrainStep


@gin.register
@dataclasses.dataclass(frozen=True)
class EarlyStopping:
  """Options for keeping the best encoder and stopping early.

  Attributes:
    every_steps: steps between evaluations; a multiple of
      `LoopOptions.checkpoint_every_steps`, so that a killed run loses no evaluation.
    metric: larger is better, such as "eval/map_at_r".
    patience: number of consecutive evaluations without improvement after which training
      ends; None to train to the last step.

  Raises:
    UserError: a number is below 1.
  """

  every_steps: int
  metric: str = "eval/map_at_r"
  patience: Optional[int] = None

  def __post_init__(self):
    check_at_least("EarlyStopping.every_steps", self.every_steps, 1)
    check_at_least("EarlyStopping.patience", self.patience, 1)

  def check(self, options: LoopOptions, measured: Sequence[str]) -> None:
    """Checks that evaluations coincide with checkpoints and include the metric.

    Args:
      options: of the loop.
      measured: names of the metrics of an evaluation.

    Raises:
      UserError: they do not.
    """
    check_measured("EarlyStopping.metric", self.metric, measured)
    if self.every_steps % options.checkpoint_every_steps:
      raise UserError(
        f"EarlyStopping.every_steps={self.every_steps} must be a multiple of "
        f"LoopOptions.checkpoint_every_steps={options.checkpoint_every_steps}."
      )


def check_measured(parameter: str, metric: str, measured: Sequence[str]) -> None:
  """Checks that a metric is one of an evaluation.

  Args:
    parameter: gin parameter that names the metric.
    metric: its name.
    measured: names of the metrics of an evaluation.

  Raises:
    UserError: it is not.
  """
  if metric not in measured:
    nearest = (
      gin_statements.nearest_name(metric, measured)
      or f"; the metrics are {', '.join(measured)}"
    )
    raise UserError(f"{parameter}={metric!r} is not measured{nearest}")


@dataclasses.dataclass(frozen=True)
class BestTracker:
  """Best evaluation of a run so far.

  Attributes:
    best: the largest value of the metric; None before the first evaluation.
    best_step: the step of that evaluation.
    num_since_best: number of evaluations after it.
  """

  best: Optional[float] = None
  best_step: int = 0
  num_since_best: int = 0

  def after(self, step: int, value: float) -> BestTracker:
    """Returns the state after another evaluation; of equal values the first is best."""
    if self.best is None or value > self.best:
      return BestTracker(value, step, 0)
    return dataclasses.replace(self, num_since_best=self.num_since_best + 1)


class EvaluationHistory:
  """The evaluations of a run: `eval/history.jsonl`, and the best encoder in `best`.

  Attributes:
    tracker: best evaluation so far, the same on all workers.

  Args:
    metric: metric to compare, larger is better.
    patience: number of evaluations without improvement before stopping; None for no
      limit.
    model_dir: folder of the run.
    encoder: the evaluated encoder.
    last_step: evaluations after this step are discarded, and made again.
  """

  def __init__(
    self,
    *,
    metric: str,
    patience: Optional[int],
    model_dir: str,
    encoder: tf.keras.Model,
    last_step: int,
  ):
    self._metric = metric
    self._patience = patience
    self._workers = current_workers()
    self._file = MetricsFile(model_dir, HISTORY_FILE)
    self._best = Checkpoints(
      model_dir=os.path.join(model_dir, BEST_FOLDER),
      encoder=encoder,
      # Keep the one before the best, too, in case a killed run leaves it incomplete.
      num_kept=2,
      is_chief=self._workers.is_chief,
    )
    if self._workers.is_chief:
      self._file.drop_after(last_step)
      self._best.drop_after(last_step)
    self.tracker = self._broadcast_from_chief()

  @property
  def last_step(self) -> int:
    """The step of the last evaluation, equal on all workers; 0 before any."""
    step = max((int(row["step"]) for row in self._file.rows()), default=0)
    return int(self._workers.exchange(str(step))[0])

  @property
  def is_over(self) -> bool:
    """Whether the patience is exhausted."""
    num_since = self.tracker.num_since_best
    return self._patience is not None and num_since >= self._patience

  def add(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds an evaluation of the current encoder, and saves the encoder if it is best.

    Args:
      step: number of steps it was trained.
      metrics: by name, the same on all workers.
    """
    # Use the chief's value: different hardware may differ by rounding errors.
    value = json.loads(self._workers.exchange(json.dumps(metrics[self._metric]))[0])
    self.tracker = self.tracker.after(step, value)
    if self._workers.is_chief:
      self._file.append(step, metrics)
    line = "Step %d: %s %.4f, best %.4f."
    logging.info(line, step, self._metric, value, self.tracker.best)
    if self.tracker.num_since_best == 0:
      self._best.save(step)
      self._best.wait()

  def finish(self) -> None:
    """Writes results that could not be written so far.

    Raises:
      UnwritableError: the disk is still full, or the best encoder could not be written.
    """
    self._file.write_waiting()
    if self._best.failure:
      raise UnwritableError(
        f"the best encoder is lost: {self._best.failure}; free some disk space, and "
        "train again from an earlier checkpoint."
      )

  def _broadcast_from_chief(self) -> BestTracker:
    tracker = BestTracker()
    if self._workers.is_chief:
      for row in self._file.rows():
        if self._metric in row:
          tracker = tracker.after(int(row["step"]), row[self._metric])
      if tracker.best is not None and tracker.best_step not in self._best.steps():
        logging.warning(
          "The checkpoint of the best encoder is missing; searching for a new best."
        )
        tracker = BestTracker()
    received = self._workers.exchange(json.dumps(dataclasses.astuple(tracker)))
    return BestTracker(*json.loads(received[0]))


class EvaluationCallback:
  """Callback that evaluates at intervals, and ends the run if patience is exhausted.

  Args:
    evaluation: of the trained encoder.
    evaluations: results so far.
    step: training step; its averaged weights are evaluated, if there are any.
    every_steps: steps between evaluations.
  """

  def __init__(
    self,
    evaluation: Evaluation,
    evaluations: EvaluationHistory,
    step: TrainStep,
    *,
    every_steps: int,
  ):
    self._evaluation = evaluation
    self._evaluations = evaluations
    self._step = step
    self._every_steps = every_steps

  def __call__(self, report: StepReport) -> bool:
    """Evaluates if due; returns whether the run should end."""
    if report.step % self._every_steps == 0:
      self.evaluate(report.step)
    return self._evaluations.is_over

  def catch_up(self, step: int) -> None:
    """Evaluates a checkpoint that a killed run saved but did not evaluate.

    Args:
      step: number of completed steps.
    """
    is_due = step > 0 and step % self._every_steps == 0
    if is_due and self._evaluations.last_step < step:
      self.evaluate(step)

  def finish(self) -> None:
    """Checks that the best encoder and all evaluations are on disk.

    Raises:
      UnwritableError: they are not.
    """
    self._evaluations.finish()

  def evaluate(self, step: int) -> None:
    """Evaluates the current encoder.

    Args:
      step: number of completed steps.
    """
    with self._step.weights_for_evaluation():
      found = self._evaluation.evaluate().measurement.metrics
      self._evaluations.add(step, found)


@gin.configurable("train_and_evaluate")
@dataclasses.dataclass(frozen=True)
class TrainAndEvaluateOptions:
  """Options of the mode in addition to those of training and evaluation.

  Attributes:
    early_stopping: evaluates during training; None to evaluate only before and after.
  """

  early_stopping: Optional[EarlyStopping] = None


def main(run: Run) -> None:
  """Ingests if a source is configured, then evaluates, trains and evaluates again."""
  # Make the strategy first: replicas must exist before ingestion uses a device.
  strategy = make_strategy(run.hardware, run.fingerprint())
  with strategy.scope(), watching(run, current_workers().index) as watchdog:
    workers = current_workers()
    if run.config.binds("ingest"):
      workers.run_on_chief(lambda: ingest.main(run))
    with training(run, watchdog) as built:
      _train_and_evaluate(run, built)


def _train_and_evaluate(run: Run, training: Training) -> None:
  workers = current_workers()
  evaluation = workers.run_on_all(lambda: _evaluation(training))
  if training.first_step == 0:
    before = evaluation.evaluate().measurement
    if workers.is_chief:
      results = Results(run.model_dir)
      write = WriteOnce(results.path, lambda: results.write_before_training(before))
      write(StepReport(0, training.options.num_steps, {}))
      training.loop.add_callback(write)
  _train(run, training, evaluation)
  with training.step.weights_for_evaluation():
    after = evaluation.evaluate()
  publish(run.model_dir, training.num_steps_done, after)
  workers.run_on_chief(lambda: _print_paths(run.model_dir))


def _evaluation(training: Training) -> Evaluation:
  # The dataset comes from gin.
  return Evaluation(encoder=training.step.encoder)  # type: ignore[call-arg]


def _train(run: Run, training: Training, evaluation: Evaluation) -> None:
  """Trains to the last step, or until early stopping."""
  early_stopping = TrainAndEvaluateOptions().early_stopping
  if early_stopping is not None:
    early_stopping.check(training.options, evaluation.metric_names())
    evaluations = EvaluationHistory(
      metric=early_stopping.metric,
      patience=early_stopping.patience,
      model_dir=run.model_dir,
      encoder=training.step.encoder,
      last_step=training.first_step,
    )
    evaluate = EvaluationCallback(
      evaluation, evaluations, training.step, every_steps=early_stopping.every_steps
    )
    evaluate.catch_up(training.first_step)
    if evaluations.is_over:
      return
    training.loop.add_callback(evaluate)
  training.loop.run()


def _print_paths(model_dir: str) -> None:
  for path, content in run_folder.CONTENTS.items():
    print(f"{content:<20}{os.path.join(model_dir, path)}")
