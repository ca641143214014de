"""Processes that run the task, forked quickly and stopped by real signals.

A fork server imports TensorFlow once, and uses no device; each run is a fork of it.
Tests of the start or exit of a process run it as a separate process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from tests.distribute.cluster_test import free_addresses

ROOT = pathlib.Path(__file__).parents[2]
_TIMEOUT_S = 600.0  # Long enough for a shared machine.


def _context():
  os.environ["PYTHONPATH"] = str(ROOT)
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.faults.warm"])
  return context


def _redirect(number, path):
  descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(descriptor, number)
  return os.fdopen(number, "w", buffering=1)


def _task(arguments, environment, output, errors, folder):
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
  signal.set_wakeup_fd(-1)
  sys.stdout, sys.stderr = _redirect(1, output), _redirect(2, errors)
  os.environ.update(environment)
  sys.path[:0] = environment.get("PYTHONPATH", str(ROOT)).split(os.pathsep)
  os.chdir(folder)
  from trainer import task

  status = task.main(["trainer.task", *arguments])
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


class Running:
  """A started run of the task.

  Args:
    arguments: of the command line.
    output: file of the printed output.
    environment: variables that are set for it.
    is_fork: false for a separate process, including its imports.
    errors: file of the standard error; None for `output`.
    folder: where it runs.
  """

  def __init__(
    self,
    arguments,
    output,
    environment=None,
    *,
    is_fork=True,
    errors=None,
    folder=ROOT,
  ):
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})}
    self.output = pathlib.Path(output)
    self.output.write_text("")
    self.start_s = time.monotonic()
    self._told_s = self.start_s
    if is_fork:
      process = _context().Process(
        target=_task,
        args=(arguments, environment, str(output), str(errors or output), str(folder)),
        daemon=True,
      )
      process.start()
      self._process = process
    else:
      with open(output, "ab") as file:
        self._process = subprocess.Popen(
          [sys.executable, "-m", "trainer.task", *arguments],
          env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
          cwd=folder,
          stdin=subprocess.DEVNULL,
          stdout=file,
          stderr=file,
        )

  @property
  def pid(self):
    return self._process.pid

  @property
  def status(self):
    """Exit status; None while it runs, −N if signal N ended it."""
    if isinstance(self._process, subprocess.Popen):
      return self._process.poll()
    return self._process.exitcode

  def tell(self, number):
    """Sends a signal and starts the timer of `wait`."""
    self._told_s = time.monotonic()
    if self.status is None:
      os.kill(self.pid, number)

  def wait(self, timeout_s=_TIMEOUT_S):
    """Waits for the exit; returns the status and seconds since the last signal."""
    deadline_s = time.monotonic() + timeout_s
    while self.status is None:
      if time.monotonic() > deadline_s:
        self.end()
        raise TimeoutError(f"{self.output.read_text()[-2000:]}")
      time.sleep(0.005)
    return self.status, time.monotonic() - self._told_s

  def wait_until(self, condition_fn, timeout_s=_TIMEOUT_S):
    """Waits until a condition holds; an earlier exit is an error."""
    deadline_s = time.monotonic() + timeout_s
    while not condition_fn():
      if self.status is not None or time.monotonic() > deadline_s:
        status = self.status
        self.end()
        raise AssertionError(f"ended with {status}: {self.output.read_text()[-2000:]}")
      time.sleep(0.002)

  def said(self, words):
    """Returns whether it has printed the words."""
    return words in self.output.read_text(errors="replace")

  def last_line(self):
    """Returns the last line that it printed itself."""
    lines = self.output.read_text(errors="replace").splitlines()
    return next((x for x in reversed(lines) if x.startswith("error:")), "")

  def end(self):
    """Kills it, suspended or not."""
    if self.status is None:
      os.kill(self.pid, signal.SIGKILL)
      while self.status is None:
        time.sleep(0.01)


class ForkedTask:
  """A forked run of the task, with the interface of `subprocess.Popen`.

  Args:
    command: as for a separate process: Python, -m, trainer.task and its flags.
    environment: variables that are set for it.
    folder: where it runs.
  """

  def __init__(self, command, environment=None, folder=ROOT):
    assert list(command[:3]) == [sys.executable, "-m", "trainer.task"], command
    self._place = tempfile.TemporaryDirectory()
    self._output, self._errors = (
      pathlib.Path(self._place.name, name) for name in ("output", "errors")
    )
    self._errors.write_text("")
    self._running = Running(
      list(map(str, command[3:])),
      self._output,
      environment,
      errors=self._errors,
      folder=folder,
    )
    self.returncode = None

  def communicate(self, timeout=_TIMEOUT_S):
    """Waits for the exit; returns standard output and standard error."""
    self.returncode, _ = self._running.wait(timeout)
    return self._output.read_text(), self._errors.read_text()

  def kill(self):
    """Kills it if it runs."""
    self._running.end()
    self._place.cleanup()


def run_task(command, environment=None):
  """Runs the task in a fork, like `subprocess.run`."""
  process = ForkedTask(command, environment)
  try:
    output, errors = process.communicate()
  finally:
    process.kill()
  return subprocess.CompletedProcess(command, process.returncode, output, errors)


def workers(num_workers, start_fn):
  """Starts workers of one cluster on loopback.

  Args:
    num_workers: how many are named.
    start_fn: starts one, given its number and the environment that it needs.
  """
  addresses = free_addresses(num_workers)
  return [
    start_fn(i, {"TF_CONFIG": tf_config(addresses, i)}) for i in range(num_workers)
  ]


def tf_config(addresses, index):
  """Returns the TF_CONFIG of a worker."""
  task = {"type": "worker", "index": index}
  return json.dumps({"cluster": {"worker": list(addresses)}, "task": task})
