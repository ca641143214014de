"""Mode `follow`: evaluates each new checkpoint of a run, in a separate process."""

from __future__ import annotations

import ast
import dataclasses
import os
import time
from typing import Optional, Protocol

import gin
from absl import logging

from trainer.cli.evaluate import BEST_FOLDER, Evaluation, publish
from trainer.cli.train_and_evaluate import EvaluationHistory, check_measured
from trainer.config import run_config
from trainer.distribute.strategy import make_strategy
from trainer.distribute.workers import current_workers
from trainer.errors import UserError
from trainer.run import Run, watching
from trainer.runtime import watchdog
from trainer.runtime.lease import locked_folder
from trainer.training import checkpoint_files

_NUM_STEPS, _EARLY_STOPPING = (
  "train.loop.num_steps",
  "train_and_evaluate.early_stopping",
)
_CHECKPOINT = "evaluate.checkpoint"


@gin.configurable("follow")
@dataclasses.dataclass(frozen=True)
class FollowOptions:
  """Options for following a run.

  Attributes:
    metric: metric for keeping the best encoder, larger is better.
    poll_s: seconds between checks for a checkpoint.
    timeout_s: seconds without a new checkpoint before giving up, for example because
      training ended before its last step; None to wait without limit.

  Raises:
    UserError: a time is not above 0.
  """

  metric: str = "eval/map_at_r"
  poll_s: float = 5.0
  timeout_s: Optional[float] = None

  def __post_init__(self):
    check_times("follow", poll_s=self.poll_s, timeout_s=self.timeout_s)


def check_times(mode: str, **times: Optional[float]) -> None:
  """Checks the times of a mode that follows a run.

  Args:
    mode: for the message.
    **times: seconds by name; None for no limit.

  Raises:
    UserError: a time is not above 0.
  """
  for name, value in times.items():
    if value is not None and value <= 0:
      raise UserError(f"{mode}.{name}={value} must be greater than 0.")


def check_single_process(mode: str) -> None:
  """Raises a user error if several workers follow a run."""
  if current_workers().num_workers > 1:
    raise UserError(
      f"--mode={mode} runs in one process; start one only (it may have several "
      "replicas)."
    )


def check_newest_checkpoint(run: Run, mode: str) -> None:
  """Raises a user error if the config selects another checkpoint than the newest."""
  checkpoint = run.config.values.get(_CHECKPOINT, "'newest'")
  if checkpoint != "'newest'":
    raise UserError(
      f"--mode={mode} follows the newest checkpoints, but {_CHECKPOINT}={checkpoint}; "
      "remove that binding."
    )


def main(run: Run) -> None:
  """Evaluates checkpoints up to the last step."""
  _check_alone(run)
  num_steps = num_steps_of(run)
  strategy = make_strategy(run.hardware, run.fingerprint())
  with strategy.scope(), watching(run, current_workers().index):
    check_single_process("follow")
    options = FollowOptions()
    evaluation = Evaluation()  # type: ignore[call-arg]  # Its parts are gin's.
    check_measured("follow.metric", options.metric, evaluation.metric_names())
    evaluation.encoder.create_variables(evaluation.dataset.decoder.shape)
    best_folder = os.path.join(run.model_dir, BEST_FOLDER)
    os.makedirs(best_folder, exist_ok=True)
    with locked_folder(best_folder, "following the run of"):
      _follow(run, options, evaluation, num_steps)


def _follow(
  run: Run, options: FollowOptions, evaluation: Evaluation, num_steps: int
) -> None:
  evaluations = EvaluationHistory(
    metric=options.metric,
    patience=None,
    model_dir=run.model_dir,
    encoder=evaluation.encoder,
    last_step=newest_step(run.model_dir),
  )
  step = evaluations.last_step
  while step < num_steps:
    step = restore_newer(evaluation, run.model_dir, step, options)
    result = evaluation.evaluate()
    evaluations.add(step, result.measurement.metrics)
    publish(run.model_dir, step, result)
  evaluations.finish()


def _steps(model_dir: str) -> list[int]:
  return checkpoint_files.steps(os.path.join(model_dir, checkpoint_files.FOLDER))


def newest_step(model_dir: str) -> int:
  """Returns the step of the newest checkpoint of a run; 0 if there is none."""
  return max(_steps(model_dir), default=0)


def _check_alone(run: Run) -> None:
  """Checks that the training does not keep the best encoder itself.

  Raises:
    UserError: it does, or `evaluate.checkpoint` is not "newest".
  """
  for values in (run.config.values, run_config.read_saved_values(run.model_dir) or {}):
    if values.get(_EARLY_STOPPING, "None") != "None":
      raise UserError(
        f"{_EARLY_STOPPING} already keeps the best encoder and writes the files of "
        "--mode=follow; unset it, or do not follow this run."
      )
  check_newest_checkpoint(run, "follow")


def num_steps_of(run: Run) -> int:
  """Returns the last step of the training that a mode follows.

  Raises:
    UserError: no training is configured.
  """
  try:
    return int(ast.literal_eval(run.config.values[_NUM_STEPS]))
  except (KeyError, ValueError, TypeError, SyntaxError) as error:
    raise UserError(
      f"{_NUM_STEPS} is not a number, so the end of the training is unknown; pass the "
      "gin files of the training."
    ) from error


class PollOptions(Protocol):
  """Protocol of the waiting time for a checkpoint.

  Attributes:
    poll_s: seconds between checks.
    timeout_s: seconds before giving up; None for no limit.
  """

  @property
  def poll_s(self) -> float: ...  # noqa: D102

  @property
  def timeout_s(self) -> Optional[float]: ...  # noqa: D102


def restore_newer(
  evaluation: Evaluation, model_dir: str, step: int, poll_options: PollOptions
) -> int:
  """Waits for a readable checkpoint newer than a step, and restores it.

  Args:
    evaluation: its encoder is restored.
    model_dir: folder of the run.
    step: step of the last checkpoint.
    poll_options: how long to wait.

  Returns:
    Its step.

  Raises:
    UserError: no checkpoint arrives in time, it is of another encoder, or training was
      started again from the beginning.
  """
  start_s = time.monotonic()
  while True:
    newest = newest_step(model_dir)
    if 0 < newest < step:
      raise UserError(
        f"The newest checkpoint of {model_dir} is of step {newest}, but one of step "
        f"{step} was read before: the training was restarted; restart this process, "
        "too."
      )
    if newest > step:
      restored = _restore(evaluation, model_dir, newest)
      if restored > step:
        return restored
    watchdog.beat()
    waited_s = time.monotonic() - start_s
    if poll_options.timeout_s is not None and waited_s > poll_options.timeout_s:
      raise UserError(
        f"{model_dir} has had no new checkpoint for {waited_s:.0f} s since that of "
        f"step {step}; check that the training is running."
      )
    time.sleep(poll_options.poll_s)


def _restore(evaluation: Evaluation, model_dir: str, newest: int) -> int:
  """Returns the restored step; 0 if the newest checkpoint was removed meanwhile."""
  try:
    return evaluation.restore(model_dir)
  except UserError:
    if newest in _steps(model_dir):
      raise
    logging.info(
      "The checkpoint of step %d was removed while it was being read.", newest
    )
    return 0
