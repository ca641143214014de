"""Runs the trials of a study in parallel, one per device, until none is left."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import statistics
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Optional

from trainer.config import gin_statements
from trainer.errors import UserError
from trainer.runtime import lease
from trainer.sweep import run_process
from trainer.sweep.points import Point
from trainer.sweep.run_process import Ending, RunFolder
from trainer.sweep.spec import SweepOptions
from trainer.sweep.study import SweepStudy, Trial

_POLL_S = 1.0


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
