"""Mode `mine`: mines a round for each new checkpoint, in a separate process.

The training uses the newest round at each multiple of `OfflineMining.every_steps`, and
removes rounds that it no longer needs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Optional

import gin
import numpy as np
from absl import logging

from trainer.cli.evaluate import Evaluation
from trainer.cli.follow import (
  check_newest_checkpoint,
  check_single_process,
  check_times,
  newest_step,
  num_steps_of,
  restore_newer,
)
from trainer.distribute.strategy import make_strategy
from trainer.distribute.workers import current_workers
from trainer.errors import TooFewExamplesError, UserError
from trainer.mining import round
from trainer.mining.miner import Miner, corpus_fingerprint
from trainer.mining.round import MiningRound, OtherDataError
from trainer.run import Run, watching
from trainer.training import checkpoint_files
from trainer.training.checkpoint_files import FOLDER, saved_centres
from trainer.training.run_folder import check_writable

_MINING, _MINER = "train.mining", "train.mining.miner"


@gin.configurable("mine")
@dataclasses.dataclass(frozen=True)
class MineOptions:
  """Options for mining for a run.

  Attributes:
    miner: mines the rounds.
    poll_s: seconds between checks for a checkpoint.
    timeout_s: seconds without a new checkpoint before giving up, for example because
      training ended before its last step; None to wait without limit.

  Raises:
    UserError: a time is not above 0.
  """

  miner: Miner
  poll_s: float = 5.0
  timeout_s: Optional[float] = None

  def __post_init__(self):
    check_times("mine", poll_s=self.poll_s, timeout_s=self.timeout_s)


def main(run: Run) -> None:
  """Mines with each new checkpoint before the last step."""
  _check_config(run)
  num_steps_of(run)  # Fail early if it is unknown.
  strategy = make_strategy(run.hardware, run.fingerprint())
  with strategy.scope(), watching(run, current_workers().index):
    check_single_process("mine")
    options = MineOptions()  # type: ignore[call-arg]  # They are gin's.
    evaluation = Evaluation()  # type: ignore[call-arg]
    evaluation.encoder.create_variables(evaluation.dataset.decoder.shape)
    _mine(run, options, evaluation)


def _mine(run: Run, options: MineOptions, evaluation: Evaluation) -> None:
  """Locks the run's folder, and mines into it.

  Raises:
    UserError: another process mines into it, or it cannot be written to; or as in
      `Miner.mine` and `round.write_round`.
  """
  check_writable(run.model_dir)
  with round.locked_rounds(run.model_dir):
    _follow(run, options, evaluation)


def _follow(run: Run, options: MineOptions, evaluation: Evaluation) -> None:
  dataset, miner = evaluation.dataset, options.miner
  miner.check(dataset)
  embedder = miner.embedder(evaluation.encoder, dataset)
  num_steps = num_steps_of(run)
  # A training that restored an earlier checkpoint repeats steps already mined.
  step = min(
    _newest_complete(run.model_dir, corpus_fingerprint(dataset)),
    newest_step(run.model_dir),
  )
  while step < num_steps:
    step = restore_newer(evaluation, run.model_dir, step, options)
    if step >= num_steps:
      break  # A round of the last checkpoint would not be used.
    try:
      centres = _centres(run, miner, evaluation, step)
    except UserError:
      if step in checkpoint_files.steps(os.path.join(run.model_dir, FOLDER)):
        raise
      logging.info("The checkpoint of step %d was removed while it was read.", step)
      continue
    try:
      mined = miner.mine(embedder, dataset, step, centres)
    except TooFewExamplesError as error:
      if not round.round_steps(run.model_dir):
        raise
      logging.warning("Step %d: %s The previous round remains the newest.", step, error)
      continue
    round.write_round(
      run.model_dir,
      step,
      mined,
      fingerprint=corpus_fingerprint(dataset),
      num_records=dataset.index.num_records,
      num_classes=dataset.index.num_classes,
    )
    folder = round.round_path(run.model_dir, step)
    logging.info("Step %d: %s: %s.", step, mined.summary(), os.path.basename(folder))


def _centres(
  run: Run, miner: Miner, evaluation: Evaluation, step: int
) -> Optional[np.ndarray]:
  """Reads the class centres of a checkpoint, [C, k, D], if the miner needs them."""
  if not miner.uses_centres:
    return None
  dataset = evaluation.dataset
  classes = np.sort(dataset.train_classes)
  hashes = dataset.index.class_names.hashes[classes]
  centres = saved_centres(run.model_dir, step).read(hashes)
  return centres.reshape(len(classes), -1, evaluation.encoder.embedding_size)


def _newest_complete(model_dir: str, fingerprint: Mapping[str, str]) -> int:
  """Returns the step of the newest complete round; 0 if there is none."""
  for step in round.round_steps(model_dir):
    try:
      return MiningRound(model_dir, step, fingerprint).step
    except OtherDataError:
      raise
    except UserError as error:
      logging.warning("%s It is skipped.", error)
  return 0


def _check_config(run: Run) -> None:
  """Checks that the training uses rounds of this process, and the newest checkpoints.

  Raises:
    UserError: it does not.
  """
  values = run.config.values
  if values.get(_MINING, "None") == "None":
    raise UserError(
      f"{_MINING} is not set, so the training uses no rounds; set it to "
      "@OfflineMining() for the training and for --mode=mine."
    )
  if values.get(_MINER, "None") != "None":
    raise UserError(
      f"{_MINER} mines inside the training; set it to None, and set mine.miner only."
    )
  check_newest_checkpoint(run, "mine")
