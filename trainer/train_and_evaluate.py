"""Mode `train_and_evaluate`: the whole job, from ingest to the table of results."""

from __future__ import annotations

import os

from trainer import ingest
from trainer.distribute.strategy import make_strategy
from trainer.distribute.workers import current_workers
from trainer.evaluate import Evaluation, publish
from trainer.loop import run_folder
from trainer.loop.watchdog import watching
from trainer.retrieval.results import Results
from trainer.run import Run
from trainer.train import Training, train


def main(run: Run) -> None:
  """Ingests if the run names a source; then measures, trains and measures again."""
  # The strategy first: ingest uses a device, and replicas must be made before that.
  strategy = make_strategy(run.hardware, run.facts())
  with strategy.scope(), watching(run, current_workers().index) as watchdog:
    workers = current_workers()
    if run.config.binds("ingest"):
      workers.chief_first(lambda: ingest.main(run))
    training = train(run, watchdog)
    evaluation = workers.together(lambda: _evaluation(training))
    if training.first_step == 0:
      before = evaluation.evaluate().measurement
      workers.chief_first(lambda: Results(run.model_dir).write_before_training(before))
    training.loop.run()
    with training.step.weights_for_evaluation():
      after = evaluation.evaluate()
    publish(run.model_dir, training.num_steps, after)
    workers.chief_first(lambda: _print_paths(run.model_dir))


def _evaluation(training: Training) -> Evaluation:
  # The dataset is gin's.
  return Evaluation(encoder=training.step.encoder)  # type: ignore[call-arg]


def _print_paths(model_dir: str) -> None:
  for path, content in run_folder.CONTENTS.items():
    print(f"{content:<20}{os.path.join(model_dir, path)}")
