"""Stop requests by SIGTERM or SIGINT, in every phase of a run."""

from __future__ import annotations

import signal
import time

from tests.faults import runs as runs_lib
from tests.faults.kills import EQUAL, ended_as
from tests.faults.runs import NUM_STEPS, Runs
from tests.faults.table import Outcome, row

# Keeps a run in training until the signal: its input hangs, then continues.
_HANGING = ("import tests.faults.parts", "Dataset.decoder = @HarmfulDecoder()")


def harmful(**options) -> tuple[str, ...]:
  """Returns bindings that replace the decoder by the harmful one."""
  return (
    *_HANGING,
    "HarmfulDecoder.decoder = @ImageDecoder()",
    *(f"HarmfulDecoder.{name} = {value!r}" for name, value in options.items()),
  )


def _has_stopped(running, model_dir, status):
  """Describes the status and whether the last logged step is saved."""
  newest = runs_lib.newest_step(model_dir)
  is_saved = newest > 0 and runs_lib.rows(model_dir)[-1]["step"] == newest
  is_said = running.said(f"the newest checkpoint is of step {newest}")
  return f"{status}, saved at its last step: {is_saved and is_said}"


@row
def stopped_while_training(runs: Runs) -> Outcome:
  """SIGINT; training, then again to the end."""
  model_dir = runs.folder / "told"
  running = runs.start("told")
  running.wait_until(lambda: runs_lib.newest_step(model_dir) >= 4)
  running.tell(signal.SIGINT)
  status, seconds = running.wait()
  seen = _has_stopped(running, model_dir, status)
  again, _ = runs.start("told").wait()
  seen += f"; then {ended_as(again, model_dir, runs.finished(1))}"
  return Outcome(f"3, saved at its last step: True; then {EQUAL}", seen, seconds, 0)


@row
def stopped_on_one_worker_of_two(runs: Runs) -> Outcome:
  """SIGTERM; training, worker 1 of 2."""
  model_dir = runs.folder / "told-one"
  chief, other = runs.start_workers("told-one")
  chief.wait_until(lambda: runs_lib.newest_step(model_dir) >= 4)
  is_claimed = runs_lib.claimed_by(model_dir) == [chief.pid]
  other.tell(signal.SIGTERM)
  status, seconds = other.wait()
  chief_status, _ = chief.wait()
  is_claimed &= runs_lib.claimed_by(model_dir) == []
  seen = f"{status} and {_has_stopped(chief, model_dir, chief_status)}"
  seen += f", claimed by the chief: {is_claimed}"
  expected = "3 and 3, saved at its last step: True, claimed by the chief: True"
  return Outcome(expected, seen, seconds, 0)


@row
def stopped_while_importing(runs: Runs) -> Outcome:
  """SIGTERM; importing TensorFlow."""
  running = runs.start("told-early", is_fork=False)
  time.sleep(0.8)
  running.tell(signal.SIGTERM)
  status, seconds = running.wait()
  is_said = "nothing new to save" in running.last_line()
  return Outcome("3, says so: True", f"{status}, says so: {is_said}", seconds, 0)


@row
def stopped_while_compiling(runs: Runs) -> Outcome:
  """SIGTERM; building and compiling the first step."""
  running = runs.start("told-compiling")
  running.wait_until(lambda: running.said("writing to"))
  running.tell(signal.SIGTERM)
  status, seconds = running.wait()
  is_said = "same command resumes it" in running.last_line()
  return Outcome("3, says so: True", f"{status}, says so: {is_said}", seconds, 0)


@row
def stopped_while_evaluating(runs: Runs) -> Outcome:
  """SIGTERM; evaluating after the last step."""
  model_dir = runs.folder / "told-evaluating"
  running = runs.start("told-evaluating", mode="train_and_evaluate")
  running.wait_until(lambda: runs_lib.newest_step(model_dir) == NUM_STEPS)
  running.tell(signal.SIGTERM)
  status, seconds = running.wait()
  newest = runs_lib.newest_step(model_dir)
  return Outcome(f"3, step {NUM_STEPS}", f"{status}, step {newest}", seconds, 0)


@row
def stopped_on_one_worker_while_evaluating(runs: Runs) -> Outcome:
  """SIGTERM; evaluating after the last step, worker 1 of 2."""
  name = "told-one-evaluating"
  chief, other = runs.start_workers(name, "NUM_STEPS = 4", mode="train_and_evaluate")
  chief.wait_until(lambda: runs_lib.newest_step(runs.folder / name) == 4)
  other.tell(signal.SIGTERM)
  status, seconds = other.wait()
  seen = f"{status} and {chief.wait()[0]}"
  return Outcome("3 and 3", seen, seconds, 0)


def _hanging(runs: Runs, name, *flags):
  """Returns a run whose input hangs after its first checkpoints, and the held file."""
  model_dir = runs.folder / name
  file = runs.folder / f"{name}-hangs"
  running = runs.start(
    name, *harmful(hang_file=str(file)), "NUM_STEPS = 100000", flags=flags
  )
  running.wait_until(lambda: runs_lib.newest_step(model_dir) >= 4)
  file.write_text("")
  seen, since_s = None, time.monotonic()
  while time.monotonic() - since_s < 1.0:  # Prefetched batches are used up.
    if seen != (seen := (model_dir / "metrics.jsonl").stat().st_size):
      since_s = time.monotonic()
    time.sleep(0.05)
  return running, model_dir


@row
def stopped_after_the_grace_period(runs: Runs) -> Outcome:
  """SIGTERM; the input hangs longer than --grace_s."""
  running, model_dir = _hanging(runs, "no-grace", "--grace_s=1")
  running.tell(signal.SIGTERM)
  status, seconds = running.wait()
  newest = runs_lib.newest_step(model_dir)
  is_said = f"the newest checkpoint is of step {newest}" in running.last_line()
  lost = runs_lib.rows(model_dir)[-1]["step"] - newest
  return Outcome("3, says so: True", f"{status}, says so: {is_said}", seconds, lost)


@row
def interrupted_twice(runs: Runs) -> Outcome:
  """SIGINT, twice; the input hangs."""
  running, _ = _hanging(runs, "twice")
  running.tell(signal.SIGINT)
  time.sleep(0.3)
  running.tell(signal.SIGINT)
  status, seconds = running.wait()
  return Outcome("130, at once: True", f"{status}, at once: {seconds < 2}", seconds)


@row
def input_that_hangs(runs: Runs) -> Outcome:
  """Nothing; the input hangs longer than --step_deadline_s."""
  running, model_dir = _hanging(runs, "hangs", "--step_deadline_s=3")
  status, _ = running.wait()
  written = model_dir / "stalled-worker-0.txt"
  is_written = written.exists() and "in _run_steps" in written.read_text()
  seen = f"{status}, where every thread stood: {is_written}"
  lost = runs_lib.rows(model_dir)[-1]["step"] - runs_lib.newest_step(model_dir)
  return Outcome("4, where every thread stood: True", seen, 3.0, lost)
