"""Runs stopped and resumed on another number of replicas."""

from __future__ import annotations

import signal

from tests.faults import runs as runs_lib
from tests.faults.runs import Runs
from tests.faults.table import Outcome, row


@row
def another_number_of_replicas(runs: Runs) -> Outcome:
  """SIGTERM, twice; on 1 replica, resumed on 2 workers, on 4 replicas."""
  smooth = runs.smooth()
  name, model_dir = "moved", runs.folder / "moved"
  at_step = _stop_after(smooth.start(name), model_dir, 0)
  chief, other = smooth.start_workers(name)
  at_step = _stop_after(chief, model_dir, at_step)
  other.wait()
  last = smooth.start(name, flags=("--num_virtual_replicas=4",))
  status, seconds = last.wait()
  error = runs_lib.largest_error(model_dir, smooth.finished(1))
  whole = runs_lib.rows(smooth.finished(1))
  is_logged = [r["step"] for r in runs_lib.rows(model_dir)] == [
    r["step"] for r in whole
  ]
  equal = error if error > 1e-5 else True
  seen = f"{status}, equal to 1e-5: {equal}, each step once: {is_logged}"
  return Outcome("0, equal to 1e-5: True, each step once: True", seen, seconds, 0)


def _stop_after(running, model_dir, step):
  running.wait_until(lambda: runs_lib.newest_step(model_dir) > step)
  running.tell(signal.SIGTERM)
  assert running.wait()[0] == 3, running.output.read_text()[-2000:]
  return runs_lib.newest_step(model_dir)
