"""Mode `train_and_evaluate`: the whole job, from ingest to the table of results."""

from __future__ import annotations

import dataclasses
import os
from typing import Optional

import gin

from trainer import ingest
from trainer.distribute.strategy import make_strategy
from trainer.distribute.workers import current_workers
from trainer.evaluate import Evaluation, publish
from trainer.loop import run_folder
from trainer.loop.actions import Report, WriteOnce
from trainer.loop.watchdog import watching
from trainer.retrieval.results import Results
from trainer.run import Run
from trainer.selection import EvaluateNow, Evaluations, Selection
from trainer.train import Training, training


@gin.configurable("train_and_evaluate")
@dataclasses.dataclass(frozen=True)
class Options:
  """What else the whole job does.

  Attributes:
    selection: measures while it trains; None to measure before and after only.
  """

  selection: Optional[Selection] = None


def main(run: Run) -> None:
  """Ingests if the run names a source; then measures, trains and measures again."""
  # The strategy first: ingest uses a device, and replicas must be made before that.
  strategy = make_strategy(run.hardware, run.facts())
  with strategy.scope(), watching(run, current_workers().index) as watchdog:
    workers = current_workers()
    if run.config.binds("ingest"):
      workers.chief_first(lambda: ingest.main(run))
    with training(run, watchdog) as built:
      _train_and_evaluate(run, built)


def _train_and_evaluate(run: Run, training: Training) -> None:
  workers = current_workers()
  evaluation = workers.together(lambda: _evaluation(training))
  if training.first_step == 0:
    before = evaluation.evaluate().measurement
    if workers.is_chief:
      results = Results(run.model_dir)
      write = WriteOnce(results.path, lambda: results.write_before_training(before))
      write(Report(0, training.options.num_steps, {}))
      training.loop.add_action(write)
  _train(run, training, evaluation)
  with training.step.weights_for_evaluation():
    after = evaluation.evaluate()
  publish(run.model_dir, training.num_steps_done, after)
  workers.chief_first(lambda: _print_paths(run.model_dir))


def _evaluation(training: Training) -> Evaluation:
  # The dataset is gin's.
  return Evaluation(encoder=training.step.encoder)  # type: ignore[call-arg]


def _train(run: Run, training: Training, evaluation: Evaluation) -> None:
  """Trains to the end, or until it gets no better."""
  selection = Options().selection
  if selection is not None:
    selection.check(training.options, evaluation.metric_names())
    evaluations = Evaluations(
      metric=selection.metric,
      patience=selection.patience,
      model_dir=run.model_dir,
      encoder=training.step.encoder,
      last_step=training.first_step,
    )
    evaluate = EvaluateNow(
      evaluation, evaluations, training.step, every_steps=selection.every_steps
    )
    evaluate.catch_up(training.first_step)
    if evaluations.is_over:
      return
    training.loop.add_action(evaluate)
  training.loop.run()


def _print_paths(model_dir: str) -> None:
  for path, content in run_folder.CONTENTS.items():
    print(f"{content:<20}{os.path.join(model_dir, path)}")
