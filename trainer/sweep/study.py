"""Trials of a sweep, stored in an Optuna study that all workers share, and the workers.

Optuna stores the trials, gives each to one worker, chooses points for tpe, and prunes.
A worker runs trials in parallel, one per device, until none is left. A trial whose
worker has died, as its released file lock shows, is queued again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
import statistics
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Optional, Union

from trainer.config import gin_statements
from trainer.errors import UserError
from trainer.runtime import lease
from trainer.sweep import run_process
from trainer.sweep.points import Point, PointBuilder
from trainer.sweep.run_process import Ending, RunFolder
from trainer.sweep.spec import Choice, Spec, SweepOptions

try:
  import optuna
  from optuna.storages.journal import JournalFileBackend
except ImportError as error:
  raise UserError(
    "a sweep needs Optuna 4 or later: pip install 'retrieval-trainer[sweep]'."
  ) from error

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)

_JOURNAL_FILE = "study.journal"
_WORKERS_FOLDER = "workers"
_TRIES_PER_TRIAL = 200
# User attributes of a trial.
_KEY = "key"  # Shared by a trial and those that repeat it.
_WORKER = "worker"
_CRASHED = "crashed"  # Other trials in state FAIL do not count.
_State = optuna.trial.TrialState
_POLL_S = 1.0


class Trial(NamedTuple):
  """Points that are run together; the value of the trial is their mean.

  Attributes:
    points: the same settings with different seeds; a single one in a grid or a random
      search.
    record: trial of Optuna.
  """

  points: Sequence[Point]
  record: optuna.Trial


class SweepStudy:
  """The trials of a sweep, resumed if there are any; called from several threads.

  Args:
    spec: the sweep file.
    builder: builds the points.
    sweep_dir: folder of the sweep, with the study's journal and the workers' locks.
    listed: all points of a grid or a random search; None if Optuna chooses them.
    storage: URL of a database instead of the journal.

  Raises:
    UserError: the database can't be opened.
  """

  def __init__(
    self,
    spec: Spec,
    builder: PointBuilder,
    sweep_dir: str,
    *,
    listed: Optional[Sequence[Point]] = None,
    storage: Optional[str] = None,
  ):
    self._spec, self._builder = spec, builder
    self._listed = None if listed is None else {p.run_id: p for p in listed}
    self._space = {name: d.distribution() for name, d in spec.domains.items()}
    self._sweep_dir, self._is_journal = sweep_dir, storage is None
    self._ask_lock_path = os.path.join(sweep_dir, "ask.lock")
    os.makedirs(os.path.join(sweep_dir, _WORKERS_FOLDER), exist_ok=True)
    self._worker = secrets.token_hex(8)
    self._worker_lock = lease.try_lock(self._worker_path(self._worker))
    with lease.locked(self._ask_lock_path):
      self._study = self._open(storage)

  def close(self) -> None:
    """Leaves the trials in progress to other workers."""
    assert self._worker_lock is not None
    self._worker_lock.close()

  def take(self) -> Optional[Trial]:
    """Returns the next trial, starting with those of workers that have died.

    Returns:
      None if no trial is left; others may still be running, see `is_over`.
    """
    with lease.locked(self._ask_lock_path):
      self._reclaim()
      for _ in range(_TRIES_PER_TRIAL):
        if not self._prepare_next():
          return None
        record = self._study.ask(self._space)
        points = self._points(record)
        if points:
          record.set_user_attr(_WORKER, self._worker)
          return Trial(points, record)
        self._study.tell(record, state=_State.FAIL)
    raise UserError(
      f"{_TRIES_PER_TRIAL} points in a row do not meet sweep.constraints; sweep a "
      "narrower range, or use sweep.method='grid'."
    )

  def finish(self, trial: Trial, ending: Ending, value: Optional[float]) -> None:
    """Records the result of a trial; a stopped trial is resumed by another worker.

    Args:
      trial: from `take`.
      ending: how it ended.
      value: mean of its metric, if it is done.
    """
    if ending is Ending.STOPPED:
      return
    if ending is Ending.PRUNED:
      self._study.tell(trial.record, state=_State.PRUNED)
    elif ending is Ending.DONE and value is not None and not math.isnan(value):
      self._study.tell(trial.record, value)
    else:
      trial.record.set_user_attr(_CRASHED, True)
      self._study.tell(trial.record, state=_State.FAIL)

  def is_hopeless(self, trial: Trial, point: Point, step: int, value: float) -> bool:
    """Returns whether to prune a run, by the value of `prune_metric` at a step.

    Only the run of a trial's first seed is compared, with those of other trials.
    """
    if point is not trial.points[0]:
      return False
    options = self._spec.options
    sign = 1 if options.prune_goal == options.goal else -1
    trial.record.report(sign * value, step)
    return trial.record.should_prune()

  def is_over(self) -> bool:
    """Returns whether no trial is queued, and none may come from another worker."""
    return not any(
      trial.state == _State.WAITING
      or (
        trial.state == _State.RUNNING
        and trial.user_attrs.get(_WORKER) != self._worker
        and self._is_known(trial)
      )
      for trial in self._current().values()
    )

  def points(self) -> list[Point]:
    """Returns the points of the sweep so far, each once."""
    if self._listed is not None:
      return list(self._listed.values())
    trials = self._current().values()
    # A trial without all its parameters is just being created.
    full = [trial for trial in trials if len(trial.params) == len(self._space)]
    return list({p.run_id: p for trial in full for p in self._points(trial)}.values())

  def requeue_unconfirmed(self, folder_fn: Callable[[Point], RunFolder]) -> None:
    """Queues finished trials again if their runs' folders are missing or were reset.

    Args:
      folder_fn: returns the folder of a point.
    """
    with lease.locked(self._ask_lock_path):
      for trial in self._current().values():
        if trial.state in (_State.COMPLETE, _State.FAIL) and self._is_known(trial):
          folders = [folder_fn(point) for point in self._points(trial)]
          has_failed = trial.state == _State.FAIL and any(f.failure for f in folders)
          if not (has_failed or all(folder.is_finished for folder in folders)):
            self._enqueue(trial)

  def _open(self, storage: Optional[str]) -> optuna.Study:
    options = self._spec.options
    journal = os.path.join(self._sweep_dir, _JOURNAL_FILE)
    identity = json.dumps(self._spec.identity, sort_keys=True).encode()
    # In a database, different sweep files of one name are kept apart.
    name = f"{self._spec.name}-{hashlib.sha256(identity).hexdigest()[:16]}"
    try:
      return optuna.create_study(
        study_name=name,
        storage=optuna.storages.RDBStorage(storage, {"pool_pre_ping": True})
        if storage
        else optuna.storages.JournalStorage(JournalFileBackend(journal)),
        sampler=optuna.samplers.RandomSampler(options.search_seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
        if options.prune_metric
        else optuna.pruners.NopPruner(),
        direction=optuna.study.StudyDirection[options.goal.upper()],
        load_if_exists=True,
      )
    except Exception as error:  # Optuna propagates any error of a database driver.
      reason = str(error).strip().splitlines()[0]
      shown = re.sub(r"//.*@", "//***@", storage or journal)  # Without the password.
      raise UserError(f"--storage={shown} can't be opened: {reason}") from error

  def _current(self) -> dict[Union[str, int], optuna.trial.FrozenTrial]:
    """Returns the trials that count by key, of those with one key the last."""
    return {
      trial.user_attrs.get(_KEY, trial.number): trial
      for trial in self._study.get_trials(deepcopy=False)
      if trial.state != _State.FAIL or trial.user_attrs.get(_CRASHED)
    }

  def _prepare_next(self) -> bool:
    """Prepares the study's next `ask`; returns whether a trial is left."""
    current = self._current()
    if any(trial.state == _State.WAITING for trial in current.values()):
      return True
    if self._listed is None:
      # A new seed for each trial: a resumed sweep chooses as one without interruption.
      self._study.sampler = optuna.samplers.TPESampler(
        seed=self._spec.options.search_seed + len(self._study.get_trials(False)),
        multivariate=True,
      )
      return len(current) < (self._spec.options.num_trials or 0)
    left = [point for key, point in self._listed.items() if key not in current]
    if left:
      params = {
        name: repr(value) if isinstance(self._spec.domains[name], Choice) else value
        for name, value in left[0].values.items()
      }
      self._study.enqueue_trial(params, {_KEY: left[0].run_id})
    return bool(left)

  def _points(
    self, trial: Union[optuna.Trial, optuna.trial.FrozenTrial]
  ) -> Sequence[Point]:
    """Returns the points of a trial; none if it is not to be run."""
    if self._listed is not None:
      point = self._listed.get(trial.user_attrs.get(_KEY, ""))
      return [point] if point else []
    values = {n: d.decode(trial.params[n]) for n, d in self._spec.domains.items()}
    if not self._spec.is_allowed(values):
      return []
    seeds = self._spec.options.seeds or (None,)
    return [self._builder.build(values, seed) for seed in seeds]

  def _reclaim(self) -> None:
    """Queues the trials of workers that have died again."""
    gone = {trial.number for trial in self._running() if self._is_gone(trial)}
    # Listed again: a trial may have ended shortly before its worker.
    for trial in self._running():
      if trial.number in gone:
        self._enqueue(trial)
        self._study.tell(trial.number, state=_State.FAIL)

  def _running(self) -> list[optuna.trial.FrozenTrial]:
    return self._study.get_trials(False, (_State.RUNNING,))

  def _enqueue(self, trial: optuna.trial.FrozenTrial) -> None:
    """Queues a trial again; its runs' folders have the checkpoints."""
    key = trial.user_attrs.get(_KEY, trial.number)
    self._study.enqueue_trial(dict(trial.params), {_KEY: key})

  def _is_gone(self, trial: optuna.trial.FrozenTrial) -> bool:
    """Returns whether the worker of a running trial has died."""
    worker = trial.user_attrs.get(_WORKER)
    if worker is None:  # It died while it asked, or shares the database and no disk.
      return self._is_journal
    return self._is_known(trial) and not lease.is_locked(self._worker_path(worker))

  def _is_known(self, trial: optuna.trial.FrozenTrial) -> bool:
    """Returns whether the worker of a trial shares the sweep's folder."""
    return os.path.exists(self._worker_path(trial.user_attrs.get(_WORKER, "none")))

  def _worker_path(self, worker: str) -> str:
    return os.path.join(self._sweep_dir, _WORKERS_FOLDER, f"{worker}.lock")


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices and folders for the runs.

  Attributes:
    runs_dir: folder of all runs.
    devices: values of `CUDA_VISIBLE_DEVICES`, one run at a time each; None leaves it
      unchanged.
    task_flags: further flags of the task.
  """

  runs_dir: str
  devices: Sequence[Optional[str]] = (None,)
  task_flags: Sequence[str] = ()


class Worker:
  """Takes trials and runs their points.

  Args:
    study: source of the trials.
    options: of the sweep.
    machine: devices and folders for the runs.
  """

  def __init__(self, study: SweepStudy, options: SweepOptions, machine: Machine):
    self.stop = threading.Event()
    self.running: set[str] = set()
    self._study = study
    self._options = options
    self._machine = machine
    self._ingested: set[str] = set()
    self._ingest_lock = threading.Lock()

  @property
  def num_devices(self) -> int:
    """Number of parallel runs."""
    return len(self._machine.devices)

  def folder(self, point: Point) -> RunFolder:
    """Returns the folder of a point."""
    return RunFolder(self._machine.runs_dir, point, self._options.mode)

  def start(self, pool: concurrent.futures.Executor) -> list[concurrent.futures.Future]:
    """Starts a thread per device; each ends when no trial is left or `stop` is set."""
    return [pool.submit(self._work, device) for device in self._machine.devices]

  def _work(self, device: Optional[str]) -> None:
    postponed: list[Trial] = []
    try:
      while not self.stop.is_set():
        trial = self._study.take()
        is_last = trial is None
        if trial is None and postponed:
          trial = postponed.pop(0)
        if trial is None and self._study.is_over():
          return
        if trial is None:  # Other workers may leave trials unfinished.
          self.stop.wait(_POLL_S)
          continue
        ending, value = self._try(trial, device, is_waiting=is_last)
        if ending is Ending.BUSY:
          postponed.append(trial)
        else:
          self._study.finish(trial, ending, value)
    except BaseException:
      self.stop.set()
      raise

  def _try(
    self, trial: Trial, device: Optional[str], *, is_waiting: bool
  ) -> tuple[Ending, Optional[float]]:
    """Runs the points of a trial; returns how it ended and the mean of its metric."""
    values = []
    for point in trial.points:
      ending = self._run(point, trial, device, is_waiting)
      if ending is not Ending.DONE:
        return ending, None
      value = self.folder(point).metric(self._options.metric)
      if value is None:
        return Ending.FAILED, None
      values.append(value)
    return Ending.DONE, statistics.fmean(values)

  def _run(
    self, point: Point, trial: Trial, device: Optional[str], is_waiting: bool
  ) -> Ending:
    folder = self.folder(point)
    while not self.stop.is_set():
      with folder.lock() as lock:
        if lock is not None:
          return self._run_locked(point, trial, device, lock)
      if not is_waiting:
        return Ending.BUSY
      self.stop.wait(_POLL_S)
    return Ending.STOPPED

  def _run_locked(
    self, point: Point, trial: Trial, device: Optional[str], lock: int
  ) -> Ending:
    folder = self.folder(point)
    if folder.is_finished:
      return Ending.DONE
    if folder.failure:
      return Ending.FAILED
    gin_file = folder.prepare()
    self.running.add(point.run_id)
    try:
      ending, status = self._ingest(point, gin_file, device)
      if ending is Ending.DONE:
        ending, status = self._call(
          self._options.mode,
          gin_file,
          folder,
          device,
          [lock],
          _Watch(self, point, trial),
        )
    finally:
      self.running.discard(point.run_id)
    if ending is Ending.DONE and not folder.is_finished:
      ending = Ending.FAILED
    if ending is Ending.FAILED:
      folder.mark_failed(run_process.failure_of(status, folder.log_path))
    return ending

  def _ingest(
    self, point: Point, gin_file: str, device: Optional[str]
  ) -> tuple[Ending, int]:
    """Ingests before the first run of the same data, so that it is done once."""
    config = point.config
    ours = {k: v for k, v in config.values.items() if k.startswith("ingest.")}
    path = os.path.join(self._machine.runs_dir, "ingest.lock")
    with self._ingest_lock:
      if not ours or repr(ours) in self._ingested:
        return Ending.DONE, 0
      with lease.locked(path):
        ending = self._call(
          "ingest", gin_file, self.folder(point), device, [], lambda: False
        )
      if ending[0] is Ending.DONE:
        self._ingested.add(repr(ours))
      return ending

  def _call(self, mode, gin_file, folder, device, inherited, is_hopeless):
    """Runs one mode of the task."""
    command = [sys.executable, "-m", "trainer.task", f"--mode={mode}"]
    command += [f"--gin_file={gin_file}", f"--model_dir={folder.path}"]
    return run_process.run_process(
      [*command, *self._machine.task_flags],
      environment={**os.environ, **self._environment(device)},
      log_path=folder.log_path,
      inherited=inherited,
      stop=self.stop,
      is_hopeless=is_hopeless,
    )

  def _environment(self, device: Optional[str]) -> Mapping[str, str]:
    num_runs = len(self._machine.devices)
    # Parallel runs that each use all cores are slower than sequential ones.
    num_threads = max(1, (os.cpu_count() or 1) // num_runs)
    threads = {"TF_NUM_INTRAOP_THREADS": str(num_threads)} if num_runs > 1 else {}
    return threads if device is None else {**threads, "CUDA_VISIBLE_DEVICES": device}


class _Watch:
  """Monitors the metrics that a run logs, for missing metrics and pruning."""

  def __init__(self, worker: Worker, point: Point, trial: Trial):
    self._options = worker._options
    self._study = worker._study
    self._folder = worker.folder(point)
    self._point = point
    self._trial = trial
    self._seen_step = 0

  def __call__(self) -> bool:
    """Returns whether the run is hopeless.

    Raises:
      UserError: a requested metric is not logged.
    """
    last = self._folder.last_row()
    if last.get("step", 0) == self._seen_step:
      return False
    self._seen_step = int(last["step"])
    for name in (self._options.metric, self._options.prune_metric):
      if name and not name.startswith("eval/") and name not in last:
        nearest = (
          gin_statements.nearest_name(name, last)
          or f"; it logs {', '.join(sorted(last))}"
        )
        raise UserError(f"{self._point}: the run does not log {name!r}{nearest}")
    name = self._options.prune_metric
    return bool(name) and self._study.is_hopeless(
      self._trial, self._point, self._seen_step, last[name or ""]
    )
