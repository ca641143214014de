"""Trials chosen by Optuna's TPE; several machines may share one study.

Only this module imports Optuna.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Optional, TextIO

from trainer.errors import UserError
from trainer.runtime import lease
from trainer.sweep import spec as spec_lib
from trainer.sweep.points import Point, PointBuilder, meets_constraints
from trainer.sweep.run_process import Ending
from trainer.sweep.spec import Spec
from trainer.sweep.trials import Trial

try:
  import optuna
  from optuna.storages import JournalStorage
  from optuna.storages.journal import JournalFileBackend
except ImportError as error:
  raise UserError(
    "sweep.method='tpe' needs Optuna 4: pip install 'retrieval-trainer[sweep]'."
  ) from error

_JOURNAL_FILE = "study.journal"
_LOCK_FOLDER = "trials"
_TRIES_PER_TRIAL = 200
_HOST = "host"
_CRASHED = "crashed"  # Marks the failed trials that count.
_State = optuna.trial.TrialState


class StudyTrial(Trial):
  """A trial of a study.

  Args:
    points: one per seed.
    trial: trial of Optuna.
    lock: open and locked while the trial is in progress.
    sign: -1 if the goal of `prune_metric` differs from the study's.
  """

  is_waiting = True

  def __init__(
    self, points: Sequence[Point], trial: optuna.Trial, lock: TextIO, sign: int
  ):
    super().__init__(points)
    self.trial = trial
    self.lock = lock
    self._sign = sign

  def is_hopeless(self, point: Point, step: int, value: float) -> bool:
    """Returns whether the first seed's run is worse than the median of others there."""
    if point is not self.points[0]:
      return False
    self.trial.report(self._sign * value, step)
    return self.trial.should_prune()


class StudyTrials:
  """The trials of an Optuna study, resumed if it exists.

  Args:
    spec: the sweep file.
    builder: builds the points.
    sweep_dir: folder of the sweep, with the study's journal and its locks.
    storage: URL of a database instead of the journal.
  """

  def __init__(
    self, spec: Spec, builder: PointBuilder, sweep_dir: str, storage: Optional[str]
  ):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self._spec, self._builder = spec, builder
    self._sweep_dir = sweep_dir
    self._is_journal = storage is None
    os.makedirs(os.path.join(sweep_dir, _LOCK_FOLDER), exist_ok=True)
    self._study = self._open(storage)
    self._lock = threading.Lock()
    self._ask_lock_path = os.path.join(sweep_dir, "ask.lock")
    same_goal = spec.options.prune_goal == spec.options.goal
    self._sign = 1 if same_goal else -1

  def take(self) -> Optional[Trial]:
    """Returns the next trial, starting with those that a killed sweep left."""
    with self._lock, lease.locked(self._ask_lock_path):
      self._reclaim()
      if len(self._counted()) >= (self._spec.options.num_trials or 0):
        return None
      return self._ask()

  def finish(self, trial: Trial, ending: Ending, value: Optional[float]) -> None:
    """Reports the result to the study; a stopped trial is resumed later."""
    assert isinstance(trial, StudyTrial)
    if ending is Ending.DONE and value is not None:
      self._study.tell(trial.trial, value)
    elif ending is Ending.PRUNED:
      self._study.tell(trial.trial, state=_State.PRUNED)
    elif ending is not Ending.STOPPED:
      trial.trial.set_user_attr(_CRASHED, True)
      self._study.tell(trial.trial, state=_State.FAIL)
    trial.lock.close()

  def points(self) -> list[Point]:
    """Returns the points of all trials that count, each once."""
    points = {}
    for trial in self._counted():
      for point in self._points(trial.params):
        points[point.run_id] = point
    return list(points.values())

  def _open(self, storage: Optional[str]) -> optuna.Study:
    options = self._spec.options
    journal = os.path.join(self._sweep_dir, _JOURNAL_FILE)
    try:
      return optuna.create_study(
        study_name=self._spec.name,
        storage=storage or JournalStorage(JournalFileBackend(journal)),
        sampler=optuna.samplers.TPESampler(seed=options.search_seed, multivariate=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
        if options.prune_metric
        else optuna.pruners.NopPruner(),
        direction=optuna.study.StudyDirection[options.goal.upper()],
        load_if_exists=True,
      )
    except Exception as error:  # Optuna propagates any error of a database driver.
      reason = str(error).strip().splitlines()[0]
      raise UserError(f"--storage={storage} can't be opened: {reason}") from error

  def _counted(self) -> list[optuna.trial.FrozenTrial]:
    """Returns the trials of the search, without those that broke a constraint."""
    over = (_State.COMPLETE, _State.PRUNED, _State.RUNNING)
    return [
      trial
      for trial in self._study.get_trials(deepcopy=False)
      if (trial.state in over or trial.user_attrs.get(_CRASHED))
      and len(trial.params) == len(self._spec.domains)
    ]

  def _ask(self) -> StudyTrial:
    for _ in range(_TRIES_PER_TRIAL):
      trial = self._study.ask()
      values = {name: self._suggest(trial, name) for name in self._spec.domains}
      if meets_constraints(self._spec, values):
        trial.set_user_attr(_HOST, socket.gethostname())
        lock = self._hold(trial.number)
        assert lock is not None
        return StudyTrial(self._points(trial.params), trial, lock, self._sign)
      self._study.tell(trial, state=_State.FAIL)
    raise UserError(
      f"{_TRIES_PER_TRIAL} trials in a row broke sweep.constraints; sweep a narrower "
      "range, or sweep.method='grid'."
    )

  def _suggest(self, trial: optuna.Trial, name: str) -> Any:
    domain = self._spec.domains[name]
    if isinstance(domain, spec_lib.Choice):
      # Optuna takes only plain values, not gin references.
      texts = {repr(value): value for value in domain.values}
      return texts[trial.suggest_categorical(name, list(texts))]
    if domain.is_whole:
      low, high = int(domain.low), int(domain.high)
      return trial.suggest_int(name, low, high, log=domain.is_log)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.is_log)

  def _points(self, params: Mapping[str, Any]) -> list[Point]:
    values = dict(params)
    for name, domain in self._spec.domains.items():
      if isinstance(domain, spec_lib.Choice):
        texts = {repr(value): value for value in domain.values}
        values[name] = texts[params[name]]
    seeds = self._spec.options.seeds or (None,)
    return [self._builder.build(values, seed) for seed in seeds]

  def _reclaim(self) -> None:
    """Requeues trials that no process works on."""
    for trial in self._running():
      is_seen = self._is_journal or trial.user_attrs.get(_HOST) == socket.gethostname()
      lock = self._hold(trial.number) if is_seen else None
      if lock is None:
        continue
      with lock:
        # It may have been finished and released since it was listed.
        if trial.number in {each.number for each in self._running()}:
          # The run's folder has the checkpoint; only Optuna needs a new trial number.
          self._study.enqueue_trial(dict(trial.params))
          self._study.tell(trial.number, state=_State.FAIL)

  def _running(self) -> list[optuna.trial.FrozenTrial]:
    return self._study.get_trials(deepcopy=False, states=(_State.RUNNING,))

  def _hold(self, number: int) -> Optional[TextIO]:
    """Returns the trial's open, locked file; None if another process holds it."""
    path = os.path.join(self._sweep_dir, _LOCK_FOLDER, f"{number}.lock")
    return lease.try_lock(path)
