"""Damaged checkpoints, full disks and untrusted files."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess

from tests.faults import runs as runs_lib
from tests.faults.kills import EQUAL, ended_as
from tests.faults.runs import NUM_STEPS, Runs
from tests.faults.stops import harmful
from tests.faults.table import Outcome, row


def _copy_cut_short(runs: Runs, name):
  """Returns a run killed right after its last checkpoint but one was replaced."""
  whole = runs.finished(1)
  model_dir = runs.folder / name
  shutil.copytree(whole, model_dir)
  return model_dir


def _damaged(runs: Runs, name, damage):
  """Returns the outcome of resuming a run with a damaged newest checkpoint."""
  model_dir = _copy_cut_short(runs, name)
  folder = model_dir / "checkpoints"
  damage(folder)
  running = runs.start(name)
  status, seconds = running.wait()
  is_named = running.said(f"ckpt-{NUM_STEPS}.") and running.said(
    f"resuming from the checkpoint of step {NUM_STEPS - 4}"
  )
  seen = ended_as(status, model_dir, runs.finished(1))
  return Outcome(f"{EQUAL}, named", f"{seen}{', named' * is_named}", seconds, 4)


@row
def checkpoint_with_a_flipped_bit(runs: Runs) -> Outcome:
  """A bit flipped; the newest checkpoint."""

  def flip(folder):
    path = folder / f"ckpt-{NUM_STEPS}.data-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)

  return _damaged(runs, "flipped", flip)


@row
def checkpoint_cut_short(runs: Runs) -> Outcome:
  """Cut to half its size; index of the newest checkpoint."""

  def cut(folder):
    path = folder / f"ckpt-{NUM_STEPS}.index"
    os.truncate(path, path.stat().st_size // 2)

  return _damaged(runs, "cut", cut)


@contextlib.contextmanager
def _small_disk(folder):
  """Mounts a disk of 200 kB at the folder; requires root."""
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
  subprocess.run(mount, check=True)
  try:
    yield
  finally:
    subprocess.run(["umount", str(folder)], check=True)


def _fill(folder):
  with contextlib.suppress(OSError), open(folder / "filler", "wb") as file:
    while True:
      file.write(bytes(512))
      file.flush()


def _on_full_disk(runs: Runs, name, policy):
  """Runs in a folder whose disk is filled after the first checkpoints."""
  model_dir = runs.folder / name
  with _small_disk(model_dir):
    running = runs.start(name, f"LoopOptions.on_disk_full = '{policy}'")
    running.wait_until(lambda: runs_lib.newest_step(model_dir) >= 4)
    _fill(model_dir)
    status, seconds = running.wait()
    kept = runs_lib.newest_step(model_dir)
    is_good = runs_lib.all_finite(model_dir)
    said = "can't be written" in running.last_line()
    (model_dir / "filler").unlink()
    again, _ = runs.start(name, f"LoopOptions.on_disk_full = '{policy}'").wait()
    equal = ended_as(again, model_dir, runs.finished(1)) == EQUAL
  return status, kept, is_good and said, equal, seconds


@row
def full_disk_with_continue(runs: Runs) -> Outcome:
  """No space left; while training, on_disk_full = 'continue'."""
  status, kept, is_good, equal, seconds = _on_full_disk(runs, "full-on", "continue")
  seen = f"{status}, last good stays: {is_good and kept > 0}, then equal: {equal}"
  expected = "2, last good stays: True, then equal: True"
  return Outcome(expected, seen, seconds, NUM_STEPS - kept)


@row
def full_disk_before_the_first_step(runs: Runs) -> Outcome:
  """No space left; before the first step, on_disk_full = 'continue'."""
  name, file = "full-early", runs.folder / "full-early-hangs"
  model_dir = runs.folder / name
  policy = "LoopOptions.on_disk_full = 'continue'"
  file.write_text("")
  with _small_disk(model_dir):
    running = runs.start(name, policy, *harmful(hang_file=str(file)))
    running.wait_until(lambda: running.said("writing to"))
    _fill(model_dir)
    file.unlink()
    status, seconds = running.wait()
    is_whole = running.said(f"step {NUM_STEPS}/{NUM_STEPS}  ")
    said = "can't be written" in running.last_line()
    (model_dir / "filler").unlink()
    again, _ = runs.start(name, policy, *harmful(hang_file=str(file))).wait()
    equal = ended_as(again, model_dir, runs.finished(1)) == EQUAL
  seen = f"{status}, all steps: {is_whole}, told: {said}, then equal: {equal}"
  expected = "2, all steps: True, told: True, then equal: True"
  return Outcome(expected, seen, seconds, NUM_STEPS)


@row
def full_disk_with_stop(runs: Runs) -> Outcome:
  """No space left; while training, on_disk_full = 'stop'."""
  status, kept, is_good, equal, seconds = _on_full_disk(runs, "full-stop", "stop")
  seen = f"{status}, last good stays: {is_good and kept > 0}, then equal: {equal}"
  return Outcome("2, last good stays: True, then equal: True", seen, seconds)


class _Bomb:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return os.mkdir, (str(self._path),)


@row
def planted_pickles(runs: Runs) -> Outcome:
  """Pickles in the place of files; checkpoints and their manifests."""
  bomb = pickle.dumps(_Bomb(runs.folder / "exploded"))
  statuses = []
  for place in ("index", "data-00000-of-00001", "json"):
    name = f"pickled-{place}"
    model_dir = _copy_cut_short(runs, name)
    for step in (NUM_STEPS, NUM_STEPS - 4, NUM_STEPS - 8):
      (model_dir / "checkpoints" / f"ckpt-{step}.{place}").write_bytes(bomb)
    statuses.append(runs.start(name).wait()[0])
  exploded = (runs.folder / "exploded").exists()
  return Outcome(
    "2, 2, 2, unpickled: False", f"{str(statuses)[1:-1]}, unpickled: {exploded}", 0.0
  )
