"""Sweeps in a study of Optuna, with a fake task."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from tests.sweep import command_test
from trainer.sweep import points, spec
from trainer.sweep.points import PointBuilder
from trainer.sweep.run_process import Ending
from trainer.sweep.study import SweepStudy

_TPE = "log_range/MARGIN = (0.01, 1.0)\nsweep.method = 'tpe'\nsweep.num_trials = {}\n"
_State = optuna.trial.TrialState


def _trials(folder, state=None, storage=None):
  """Returns the trials of the only study, of one state or all."""
  if storage is None:
    journal = folder / "runs" / "sweeps" / "mine" / "study.journal"
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
  [name] = optuna.get_all_study_names(storage)
  trials = optuna.load_study(study_name=name, storage=storage).trials
  return [trial for trial in trials if state in (None, trial.state)]


def test_study_finds_better_margins_in_the_requested_number_of_trials(sweep, folder):
  assert sweep(_TPE.format(16), "--num_parallel=2") == 0
  values = [trial.value for trial in _trials(folder, _State.COMPLETE)]
  assert len(values) == 16
  assert [t.value for t in _trials(folder)] == pytest.approx(
    [float(f"{t.params['MARGIN']:.4g}") for t in _trials(folder)]
  )
  assert sum(values[10:]) / 6 > sum(values[:10]) / 10


def test_more_trials_are_added_to_a_study(sweep, folder):
  assert sweep(_TPE.format(2)) == 0
  assert sweep(_TPE.format(3)) == 0
  assert len(_trials(folder)) == 3


def test_value_of_a_trial_is_the_mean_over_its_seeds(sweep, folder):
  assert sweep(_TPE.format(2) + "sweep.seeds = (1, 2)") == 0
  assert len(command_test._calls(folder)) == 4
  assert len(_trials(folder, _State.COMPLETE)) == 2


def test_choice_of_parts_is_passed_to_gin(sweep, folder):
  text = "choice/TrainStep.loss = (@BatchAllTripletLoss(), @BatchHardTripletLoss())\n"
  text += "BatchHardTripletLoss.margin = %MARGIN\n"
  assert sweep(text + _TPE.format(4)) == 0
  losses = {row["TrainStep.loss"] for row in command_test._table(folder)}
  assert losses <= {"@BatchAllTripletLoss()", "@BatchHardTripletLoss()"}


def test_run_that_is_worse_than_the_median_is_pruned(sweep, folder, monkeypatch):
  monkeypatch.setenv("STEP_S", "0.25")
  text = _TPE.format(8) + "sweep.prune_metric = 'train/loss'"
  assert sweep(text) == 0
  assert len(_trials(folder, _State.PRUNED)) >= 1
  best = max(_trials(folder, _State.COMPLETE), key=lambda trial: trial.value)
  worst = min(trial.params["MARGIN"] for trial in _trials(folder, _State.PRUNED))
  assert worst < best.params["MARGIN"]


def test_crashed_trial_counts_and_does_not_stop_the_others(sweep, folder, monkeypatch):
  monkeypatch.setenv("CRASH_ABOVE", "0.1")
  assert sweep(_TPE.format(6)) == 1
  failed, complete = (_trials(folder, s) for s in (_State.FAIL, _State.COMPLETE))
  assert len(failed) + len(complete) == 6
  assert failed
  assert all(trial.params["MARGIN"] > 0.1 for trial in failed)


def test_trials_that_break_a_constraint_do_not_count(sweep, folder):
  text = _TPE.format(4) + "sweep.constraints = ('MARGIN > 0.2',)"
  assert sweep(text) == 0
  assert len(_trials(folder, _State.COMPLETE)) == 4
  assert all(trial.params["MARGIN"] > 0.2 for trial in _trials(folder, _State.COMPLETE))


@pytest.mark.thorough
def test_trial_of_a_killed_sweep_is_resumed(sweep, folder, sweep_file):
  text = _TPE.format(1)
  process = command_test._start(folder, sweep_file(text), STEP_S="0.5")
  command_test._wait_for(lambda: command_test._num_steps(folder) >= 2)
  process.kill()
  process.communicate()
  assert sweep(text) == 0
  assert len(_trials(folder, _State.COMPLETE)) == 1
  assert list(command_test._calls(folder).values()) == [1]
  assert command_test._num_steps(folder) == 5


def test_trial_that_finishes_during_a_check_is_not_repeated(
  folder, sweep_file, monkeypatch
):
  read = spec.read_spec(sweep_file(_TPE.format(2)))
  sweep_dir = str(folder / "runs" / "sweeps" / "mine")
  one, other = (SweepStudy(read, PointBuilder(read), sweep_dir) for _ in range(2))
  trial, is_gone = one.take(), other._is_gone

  def is_gone_late(record):
    one.finish(trial, Ending.DONE, 0.5)
    one.close()
    return is_gone(record)

  monkeypatch.setattr(other, "_is_gone", is_gone_late)
  assert other.take().record.number == 1
  assert [each.state for each in _trials(folder)] == [_State.COMPLETE, _State.RUNNING]


def test_resumed_study_runs_the_trials_of_an_uninterrupted_one(
  sweep, folder, monkeypatch
):
  assert sweep(_TPE.format(4)) == 0
  assert sweep(_TPE.format(13)) == 0
  resumed = [trial.params for trial in _trials(folder)]
  shutil.rmtree(folder / "runs")
  assert sweep(_TPE.format(13)) == 0
  assert [trial.params for trial in _trials(folder)] == resumed
  assert len({repr(params) for params in resumed}) == 13


def test_failed_trial_is_retried_only_on_request(sweep, folder, monkeypatch):
  monkeypatch.setenv("CRASH_ABOVE", "0.1")
  assert sweep(_TPE.format(3)) == 1
  monkeypatch.delenv("CRASH_ABOVE")
  assert sweep(_TPE.format(3)) == 1
  num_failed = len(_trials(folder, _State.FAIL))
  assert num_failed > 0
  assert sweep(_TPE.format(3), "--retry") == 0
  assert len(_trials(folder, _State.COMPLETE)) == 3
  assert (
    sorted(command_test._calls(folder).values())
    == [1] * (3 - num_failed) + [2] * num_failed
  )


def test_grid_in_a_database_has_the_parameters_of_each_point(sweep, folder):
  storage = f"sqlite:///{folder}/study.db"
  text = "choice/MARGIN = (0.1, 0.2)\nsweep.seeds = (1, 2)"
  assert sweep(text, f"--storage={storage}") == 0
  trials = _trials(folder, _State.COMPLETE, storage)
  assert [t.params["MARGIN"] for t in trials] == ["0.1", "0.2"] * 2
  assert [t.value for t in trials] == [0.1, 0.2] * 2


def _study(folder, sweep_file, machine="", storage=None):
  """Starts a worker of a grid of three points; workers share only a database."""
  read = spec.read_spec(sweep_file("choice/MARGIN = (0.1, 0.2, 0.3)"))
  builder = PointBuilder(read)
  sweep_dir = str(folder / machine / "sweep")
  listed = points.listed(read, builder)
  return SweepStudy(read, builder, sweep_dir, listed=listed, storage=storage)


def test_workers_without_a_shared_disk_run_each_point_once(folder, sweep_file):
  storage = f"sqlite:///{folder}/study.db"
  one, other = (_study(folder, sweep_file, m, storage) for m in ("one", "other"))
  taken = [one.take(), other.take()]
  one.close()
  taken.append(other.take())
  assert [trial.points[0].values["MARGIN"] for trial in taken] == [0.1, 0.2, 0.3]
  assert other.take() is None
  assert other.is_over()


def test_worker_takes_over_the_trial_of_a_dead_worker(folder, sweep_file):
  one, other = (_study(folder, sweep_file) for _ in range(2))
  first = one.take()
  for _ in range(2):
    other.finish(other.take(), Ending.DONE, 0.5)
  assert other.take() is None
  assert not other.is_over()
  one.close()
  again = other.take()
  assert again.points == first.points
  other.finish(again, Ending.DONE, 0.5)
  assert other.is_over()


def test_trial_with_a_nan_metric_is_not_repeated(folder, sweep_file):
  study = _study(folder, sweep_file)
  for _ in range(3):
    study.finish(study.take(), Ending.DONE, float("nan"))
  assert study.take() is None


def _is_held(path):
  """Returns whether a run has reached the step at which the fake task waits."""
  return len(path.read_text().splitlines()) == 2


def _check_takeover(folder, path, *flags):
  """Kills one of two workers with its run; the other must finish all points."""
  hold = folder / "hold"
  hold.touch()
  both = [command_test._start(folder, path, *flags, HOLD=str(hold)) for _ in range(2)]
  runs = folder / "runs" / "points"
  command_test._wait_for(
    lambda: len([p for p in runs.glob("*/metrics.jsonl") if _is_held(p)]) == 2,
    timeout_s=150,
  )
  killed, left = both
  children = [
    int(child)
    for file in pathlib.Path(f"/proc/{killed.pid}/task").glob("*/children")
    for child in file.read_text().split()
  ]
  killed.kill()
  killed.communicate()
  assert children
  for child in children:
    os.kill(child, signal.SIGKILL)
  hold.unlink()
  _, errors = left.communicate(timeout=120)
  assert left.returncode == 0, errors
  for metrics in runs.glob("*/metrics.jsonl"):
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
  assert sorted(command_test._calls(folder).values()) == [1, 1, 2]


_THREE = "choice/MARGIN = (0.1, 0.2, 0.3)"


def test_worker_takes_over_the_run_of_a_killed_one(folder, sweep_file):
  _check_takeover(folder, sweep_file(_THREE))
  states = [trial.state for trial in _trials(folder)]
  assert sorted(states) == [_State.COMPLETE] * 3 + [_State.FAIL]


def _postgresql(program):
  """The path of a program of PostgreSQL's server; Debian keeps them off the PATH."""
  places = sorted(pathlib.Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
  return str(places[-1]) if places else shutil.which(program)


@pytest.fixture
def database():
  """The URL of a database of a PostgreSQL server, which refuses to run as root."""
  if _postgresql("postgres") is None:
    pytest.skip("PostgreSQL's server is not installed (Debian: postgresql)")
  as_user = ("runuser", "-u", "postgres", "--") if os.getuid() == 0 else ()
  home = pathlib.Path(tempfile.mkdtemp())
  if as_user:
    shutil.chown(home, "postgres")
  init = [_postgresql("initdb"), "-D", f"{home}/data", "-U", "trainer", "-A", "trust"]
  subprocess.run([*as_user, *init], cwd=home, check=True, capture_output=True)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  control = [*as_user, _postgresql("pg_ctl"), "-D", f"{home}/data", "-w"]
  options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1"
  subprocess.run(
    [*control, "-l", f"{home}/log", "-o", options, "start"], cwd=home, check=True
  )
  yield f"postgresql+pg8000://trainer@127.0.0.1:{port}/postgres"
  subprocess.run([*control, "-m", "immediate", "stop"], cwd=home, check=True)
  shutil.rmtree(home)


@pytest.mark.thorough
def test_worker_takes_over_the_run_of_a_killed_one_in_postgresql(
  folder, sweep_file, database
):
  _check_takeover(folder, sweep_file(_THREE), f"--storage={database}")
  states = [trial.state for trial in _trials(folder, storage=database)]
  assert sorted(states) == [_State.COMPLETE] * 3 + [_State.FAIL]


@pytest.mark.thorough
def test_two_sweeps_share_a_study_in_a_database(folder, sweep_file):
  path = sweep_file(_TPE.format(6))
  storage = f"--storage=sqlite:///{folder}/study.db"
  both = [command_test._start(folder, path, storage, STEP_S="0.1") for _ in range(2)]
  outputs = [process.communicate(timeout=90) for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  assert len(_trials(folder, _State.COMPLETE, storage[10:])) == 6


@pytest.mark.parametrize(
  ("text", "flags", "words"),
  [
    (_TPE.format(2) + "choice/TrainStep.los = (1,)", (), ["did you mean 'loss'?"]),
    (_TPE.format(2), ("--storage=nowhere://x",), ["--storage=nowhere://x"]),
    (_THREE, ("--storage=nowhere://me:secret@x/y",), ["nowhere://***@x/y can't be"]),
  ],
)
def test_user_error_is_refused_before_anything_starts(
  sweep, capsys, text, flags, words
):
  assert sweep(text, *flags) == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert all(word in line for word in words)


def test_without_optuna_the_error_names_its_package(folder, sweep_file):
  program = "import sys; sys.path[0] = sys.argv.pop(1); sys.modules['optuna'] = None; "
  program += "from trainer.sweep import __main__ as command; "
  program += "sys.exit(command.main(sys.argv))"
  arguments = [
    sys.executable,
    "-c",
    program,
    str(command_test.ROOT),
    sweep_file(_THREE),
  ]
  done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
  assert done.returncode == 2
  assert "pip install 'retrieval-trainer[sweep]'" in done.stderr.splitlines()[-1]
