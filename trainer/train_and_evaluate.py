"""Mode `train_and_evaluate`: the whole job, from ingest to the table of results."""

from __future__ import annotations

import os

from trainer import ingest
from trainer.distribute.strategy import make_strategy
from trainer.evaluate import Evaluation
from trainer.loop import run_folder
from trainer.retrieval import report
from trainer.retrieval.results import Results
from trainer.run import Run
from trainer.train import train


def main(run: Run) -> None:
  """Ingests if the run names a source; then measures, trains and measures again."""
  # The strategy first: ingest uses a device, and replicas must be made before that.
  strategy = make_strategy(run.hardware)
  if run.config.binds("ingest"):
    ingest.main(run)
  with strategy.scope():
    training = train(run)
    # The dataset is gin's.
    evaluation = Evaluation(encoder=training.encoder)  # type: ignore[call-arg]
    results = Results(run.model_dir)
    if training.first_step == 0:
      results.write_before_training(evaluation.measure())
    training.loop.run()
    results.write_latest(training.num_steps, evaluation.measure())
  report.write(run.model_dir)
  print(results.table())
  for path, content in run_folder.CONTENTS.items():
    print(f"{content:<20}{os.path.join(run.model_dir, path)}")
