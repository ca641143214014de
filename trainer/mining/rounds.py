"""Mining rounds of a training run: which round is used from which step on.

recorded decision? ─► mine, or newest ─► sampler ──────► log ───► use ──► prune
 round.RoundLog        Miner, AsyncRounds OfflineMining   RoundLog PiecewiseSampler
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Optional, Union

import tensorflow as tf
from absl import logging

from trainer.data.dataset import Dataset
from trainer.data.samplers import BatchSampler
from trainer.distribute.workers import current_workers
from trainer.errors import TooFewExamplesError, UnwritableError, UserError, short_reason
from trainer.mining import round
from trainer.mining.miner import RoundContent, corpus_fingerprint
from trainer.mining.offline_mining import OfflineMining, PiecewiseSampler
from trainer.mining.round import MiningRound, OtherDataError, RoundLog
from trainer.runtime import watchdog
from trainer.training.callbacks import StepReport

_POLL_S = 1.0


class _OpenRound(NamedTuple):
  """A round and its sampler."""

  mining_round: MiningRound
  sampler: BatchSampler


class Rounds:
  """Selects a round at each multiple of `every_steps`, equally on all workers.

  Decisions are permanent: a run that was killed, or that resumes from an earlier
  checkpoint, uses the same rounds from the same steps.

  Attributes:
    sampler: sampler of the run under the decisions so far.

  Args:
    options: of offline mining.
    dataset: of the training.
    plain: sampler used before the first round.
    model_dir: folder of the run, shared by all workers.
    mine_fn: mines with the current encoder, given the step; None if a separate process
      mines.
    continues_unwritten: whether to keep the current batches if a round or a decision
      cannot be written.
    oldest_step_fn: returns the step of the oldest checkpoint; 0 if there is none.
      Rounds that no checkpoint can need again are removed.
  """

  def __init__(
    self,
    options: OfflineMining,
    dataset: Dataset,
    plain: BatchSampler,
    model_dir: str,
    *,
    mine_fn: Optional[Callable[[int], RoundContent]],
    continues_unwritten: bool = False,
    oldest_step_fn: Callable[[], int],
  ):
    self.sampler = PiecewiseSampler(plain)
    self._options = options
    self._dataset = dataset
    self._plain = plain
    self._model_dir = model_dir
    self._mine_fn = mine_fn
    self._continues_unwritten = continues_unwritten
    self._oldest_step_fn = oldest_step_fn
    self._fingerprint = corpus_fingerprint(dataset)
    self._round_log = RoundLog(model_dir)
    self._async_rounds = AsyncRounds(options, model_dir, self._fingerprint)
    self._workers = current_workers()
    self._current: Optional[_OpenRound] = None
    self._recorded: dict[int, Optional[int]] = {}

  def resume(self, first_step: int, num_steps: int) -> None:
    """Restores the round in use at a step, and decides if a decision is due there.

    Args:
      first_step: number of completed steps.
      num_steps: of the whole training; if none are left, nothing is decided.

    Raises:
      UserError: the round is missing, or as in `decide`.
    """
    decisions = self._decisions()
    if not first_step:
      # Decisions are of another training: this one would have saved a checkpoint first.
      self._workers.run_on_chief(self._archive_rounds)
      decisions = {}
    self._recorded = decisions
    before = [step for step in decisions if step < first_step]
    if before:
      self._use_round(before[-1], self._reopen_round(before[-1], decisions[before[-1]]))
    if first_step < num_steps:
      self.decide(first_step)

  def is_due(self, step: int) -> bool:
    """Returns whether a decision is due after a number of steps."""
    return step > 0 and step % self._options.every_steps == 0

  def decide(self, step: int) -> bool:
    """Selects the round for the following batches, if a decision is due.

    Args:
      step: number of completed steps.

    Returns:
      Whether batches change from this step on.

    Raises:
      UserError: nothing can be mined, the rounds of the separate process are too old,
        or the recorded round is missing or does not fit.
    """
    if not self.is_due(step):
      return False
    decisions = self._decisions()
    if step in decisions:
      opened = self._reopen_round(step, decisions[step])
    else:
      try:
        # Open before recording, so that a round that does not fit can be mined again.
        opened = self._next_round(step)
        decisions[step] = None if opened is None else opened.mining_round.step
        self._workers.run_on_chief(lambda: self._round_log.add(step, decisions[step]))
      except UnwritableError as error:
        self._keep_current(step, error)
        return False
    self._recorded = decisions
    has_changed = self._use_round(step, opened)
    self._workers.run_on_chief(self._prune)
    return has_changed

  def metrics(self, step: int) -> dict[str, float]:
    """Returns the step, age and counts of the round in use."""
    counted = self._without_examples(step)
    if self._current is None:
      return counted
    mining_round = self._current.mining_round
    counts = mining_round.metadata.get("counts", {})
    return {
      "mining/round_step": float(mining_round.step),
      "mining/round_age_steps": float(step - mining_round.step),
      **{f"mining/round_{name}": float(value) for name, value in counts.items()},
      **counted,
    }

  def _without_examples(self, step: int) -> dict[str, float]:
    """Counts the rounds before a step that had too few examples, if any was decided.

    The decision of the step itself is excluded, because it follows this log line, while
    a resumed run has it already.
    """
    recorded = [each for each in self._recorded.items() if each[0] < step]
    if self._mine_fn is None or not recorded:
      return {}
    num_kept = sum(step != round_step for step, round_step in recorded)
    return {"mining/rounds_without_examples": float(num_kept)}

  def _archive_rounds(self) -> None:
    """Archives the rounds of another training, if there are any."""
    if self._round_log.decisions() or round.round_steps(self._model_dir):
      round.archive_rounds(self._model_dir)

  def _decisions(self) -> dict[int, Optional[int]]:
    """Returns the decisions read by the chief, on all workers."""
    of_chief = self._workers.run_on_all(
      self._round_log.decisions if self._workers.is_chief else dict
    )
    rows = json.loads(self._workers.exchange(json.dumps(list(of_chief.items())))[0])
    return {step: round_step for step, round_step in rows}

  def _next_round(self, step: int) -> Optional[_OpenRound]:
    """Returns the next round; the current one if the new round has too few examples."""
    is_mining = self._mine_fn is not None
    try:
      return self._open_round(
        self._mine_round(step) if is_mining else self._select_newest(step)
      )
    except TooFewExamplesError as error:
      if self._options.when_too_few == "stop":
        raise
      self._keep_current(step, error)
      return self._current

  def _keep_current(self, step: int, error: UserError) -> None:
    """Keeps the current round in spite of an error.

    Raises:
      UserError: that round is too old; or the error itself, if it must end the run.
    """
    if isinstance(error, UnwritableError) and not self._continues_unwritten:
      raise error
    self._options.check_age(step, self._current_step)
    logging.warning("Step %d: %s Sampling is unchanged.", step, error)

  @property
  def _current_step(self) -> Optional[int]:
    return None if self._current is None else self._current.mining_round.step

  def _mine_round(self, step: int) -> int:
    """Mines a round of this step.

    Raises:
      TooFewExamplesError: there are no hard examples; raised on all workers.
    """
    assert self._mine_fn is not None
    start_s = time.monotonic()
    mined: Union[RoundContent, TooFewExamplesError]
    try:
      mined = self._mine_fn(step)
    except TooFewExamplesError as error:
      mined = error
    index = self._dataset.index

    def write():
      if isinstance(mined, TooFewExamplesError):
        raise mined
      with round.locked_rounds(self._model_dir):
        round.write_round(
          self._model_dir,
          step,
          mined,
          fingerprint=self._fingerprint,
          num_records=index.num_records,
          num_classes=index.num_classes,
        )
      seconds = time.monotonic() - start_s
      logging.info("Step %d: mined in %.1f s: %s.", step, seconds, mined.summary())

    self._workers.run_on_chief(write)
    return step

  def _select_newest(self, step: int) -> Optional[int]:
    """Returns the newest complete round up to this step, as found by the chief.

    Raises:
      UserError: the round is too old, and no newer one arrived in time.
    """
    of_chief = self._workers.run_on_all(
      lambda: (
        self._async_rounds.newest(step, self._current_step)
        if self._workers.is_chief
        else None
      )
    )
    return json.loads(self._workers.exchange(json.dumps(of_chief))[0])

  def _open_round(self, round_step: Optional[int]) -> Optional[_OpenRound]:
    """Opens a round and its sampler on all workers; None for the plain sampler."""
    if round_step is None:
      return None
    if round_step == self._current_step:
      return self._current
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync

    def open_round() -> _OpenRound:
      mining_round = MiningRound(self._model_dir, round_step, self._fingerprint)
      sampler = self._options.make_sampler(
        mining_round, self._dataset, self.sampler.shape, num_replicas
      )
      return _OpenRound(mining_round, sampler)

    return self._workers.run_on_all(open_round)

  def _reopen_round(self, step: int, round_step: Optional[int]) -> Optional[_OpenRound]:
    """Opens the round of a recorded decision."""
    try:
      return self._open_round(round_step)
    except UserError as error:
      folder = os.path.dirname(self._round_log.path)
      raise UserError(
        f"{error} {self._round_log.path} uses it from step {step} on: restore it, or "
        f"remove {folder} to continue with new rounds."
      ) from error

  def _use_round(self, step: int, opened: Optional[_OpenRound]) -> bool:
    """Uses a round from a step on; returns whether that changes the batches."""
    if opened is None and self._mine_fn is None:
      logging.warning(
        "Step %d: there is no mining round yet, and batches are plain; check that "
        "--mode=mine is running.",
        step,
      )
    if opened is self._current:
      return False
    self._current = opened
    self.sampler.use_from(step, self._plain if opened is None else opened.sampler)
    what = "plain batches"
    if opened is not None:
      what = f"the mining round of step {opened.mining_round.step}"
    logging.info("From step %d: %s.", step, what)
    return True

  def _prune(self) -> None:
    """Removes old rounds that no checkpoint needs."""
    if self._current_step is None:
      return
    decisions, oldest = self._round_log.decisions(), self._oldest_step_fn()
    first = max((step for step in decisions if step <= oldest), default=0)
    kept = {each for step, each in decisions.items() if step >= first}
    for round_step in round.round_steps(self._model_dir):
      if round_step < self._current_step and round_step not in kept:
        try:
          round.remove_round(self._model_dir, round_step)
        except OSError as error:
          logging.warning(
            "The old mining round of step %d can't be removed: %s.",
            round_step,
            short_reason(error),
          )


class AsyncRounds:
  """Rounds that a separate process writes to the folder of a run.

  Args:
    options: limits the age of a round and the wait for a newer one.
    model_dir: folder of the run.
    fingerprint: of the records and classes, by name.
  """

  def __init__(
    self, options: OfflineMining, model_dir: str, fingerprint: Mapping[str, Any]
  ):
    self._options = options
    self._model_dir = model_dir
    self._fingerprint = fingerprint
    # Whether a round is complete, by its step and modification time.
    self._is_complete_by_file: dict[tuple[int, int], bool] = {}

  def newest(self, step: int, current_step: Optional[int]) -> Optional[int]:
    """Returns the newest complete round up to a step; waits if it is too old.

    Args:
      step: number of completed steps.
      current_step: the round in use, already checked; None if there is none.

    Returns:
      Its step; None if there is no round.

    Raises:
      UserError: the round is too old and no newer one arrived in time, or it is of
        other data.
    """
    deadline_s = time.monotonic() + self._options.max_wait_s
    while True:
      newest = self._newest_complete(step, current_step)
      try:
        self._options.check_age(step, newest)
        return newest
      except UserError:
        if time.monotonic() >= deadline_s:
          raise
      watchdog.beat()
      time.sleep(_POLL_S)

  def _newest_complete(self, step: int, current_step: Optional[int]) -> Optional[int]:
    for round_step in round.round_steps(self._model_dir):
      if round_step > step:
        continue
      if round_step == current_step or self._is_complete(round_step):
        return round_step
    return None

  def _is_complete(self, round_step: int) -> bool:
    file_key = round_step, round.round_time(self._model_dir, round_step)
    if file_key not in self._is_complete_by_file:
      try:
        MiningRound(self._model_dir, round_step, self._fingerprint)
        self._is_complete_by_file[file_key] = True
      except OtherDataError:
        raise
      except UserError as error:
        logging.warning("%s The previous round is used.", error)
        self._is_complete_by_file[file_key] = False
    return self._is_complete_by_file[file_key]


class ChangeRound:
  """Callback that switches rounds, equally on every worker.

  Args:
    rounds: of the training.
    save_fn: saves a checkpoint of a step, if there is none yet. Mining can take longer
      than the grace period of a preempted machine.
    restart_fn: restarts the input from a step on; batches read ahead are discarded.
  """

  def __init__(
    self,
    rounds: Rounds,
    *,
    save_fn: Callable[[int], None],
    restart_fn: Callable[[int], None],
  ):
    self._rounds = rounds
    self._save_fn = save_fn
    self._restart_fn = restart_fn

  def __call__(self, report: StepReport) -> None:
    """Switches rounds if a decision is due and steps are left."""
    if report.step == report.num_steps or not self._rounds.is_due(report.step):
      return
    self._save_fn(report.step)
    if self._rounds.decide(report.step):
      self._restart_fn(report.step)
