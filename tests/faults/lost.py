"""Workers that are killed, suspended or never started."""

from __future__ import annotations

import signal
import time

from tests.distribute.cluster_test import free_addresses
from tests.faults import runs as runs_lib
from tests.faults.processes import tf_config
from tests.faults.runs import Runs
from tests.faults.table import Outcome, row

_LONG = "NUM_STEPS = 100000"


def _harmed(runs: Runs, name, number, *flags, is_fork):
  """Runs two workers; the second receives a signal during training."""
  model_dir = runs.folder / name
  chief, other = runs.start_workers(name, _LONG, flags=flags, is_fork=is_fork)
  try:
    chief.wait_until(lambda: runs_lib.newest_step(model_dir) >= 4)
    other.tell(number)
    start_s = time.monotonic()
    status, _ = chief.wait()
    seconds = time.monotonic() - start_s
  finally:
    other.end()
    chief.end()
  lost = runs_lib.rows(model_dir)[-1]["step"] - runs_lib.newest_step(model_dir)
  return chief, model_dir, status, seconds, lost


@row
def worker_killed_while_training(runs: Runs) -> Outcome:
  """SIGKILL; training, worker 1 of 2; the other."""
  chief, _, status, seconds, lost = _harmed(
    runs, "killed-peer", signal.SIGKILL, is_fork=False
  )
  is_named = "lost worker 1 (127.0.0.1:" in chief.last_line()
  seen = f"{status} within 30 s: {seconds < 30}, named: {is_named}"
  return Outcome("4 within 30 s: True, named: True", seen, seconds, lost)


@row
def suspended_worker(runs: Runs) -> Outcome:
  """SIGSTOP; training, worker 1 of 2; the other, --step_deadline_s=5."""
  _, model_dir, status, seconds, lost = _harmed(
    runs, "stopped-peer", signal.SIGSTOP, "--step_deadline_s=5", is_fork=True
  )
  is_written = (model_dir / "stalled-worker-0.txt").exists()
  seen = f"{status}, where every thread stood: {is_written}"
  return Outcome("4, where every thread stood: True", seen, seconds, lost)


@row
def worker_that_never_starts(runs: Runs) -> Outcome:
  """Not started; worker 1 of 2; the other, --worker_timeout_s=2."""
  addresses = free_addresses(2)
  environment = {"TF_CONFIG": tf_config(addresses, 0)}
  running = runs.start(
    "alone", flags=("--worker_timeout_s=2",), environment=environment
  )
  status, seconds = running.wait()
  is_named = f"worker 1 ({addresses[1]})" in running.last_line()
  return Outcome("4, named: True", f"{status}, named: {is_named}", seconds)
