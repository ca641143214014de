"""Sweeps whose points Optuna chooses, with a task that only pretends."""

from __future__ import annotations

import subprocess

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from tests.sweep import command_test
from trainer.sweep import spec
from trainer.sweep.optuna_study import StudyTrials
from trainer.sweep.points import PointBuilder
from trainer.sweep.run_process import Ending

_TPE = "log_range/MARGIN = (0.01, 1.0)\nsweep.method = 'tpe'\nsweep.num_trials = {}\n"
_State = optuna.trial.TrialState


def _trials(folder, state=None):
  journal = folder / "runs" / "sweeps" / "mine" / "study.journal"
  storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
  trials = optuna.load_study(study_name="mine", storage=storage).trials
  return [trial for trial in trials if state in (None, trial.state)]


def test_study_finds_the_better_margins_and_makes_as_many_trials_as_asked(
  sweep, folder
):
  assert sweep(_TPE.format(16), "--num_parallel=2") == 0
  values = [trial.value for trial in _trials(folder, _State.COMPLETE)]
  assert len(values) == 16
  assert [t.value for t in _trials(folder)] == pytest.approx(
    [t.params["MARGIN"] for t in _trials(folder)]
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


def test_choice_of_parts_is_handed_to_gin(sweep, folder):
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


def test_trial_of_a_killed_sweep_is_taken_up_where_it_was(sweep, folder, sweep_file):
  text = _TPE.format(1)
  process = command_test._start(folder, sweep_file(text), STEP_S="0.5")
  command_test._wait_for(lambda: command_test._num_steps(folder) >= 2)
  process.kill()
  process.communicate()
  assert sweep(text) == 0
  assert len(_trials(folder, _State.COMPLETE)) == 1
  assert list(command_test._calls(folder).values()) == [1]
  assert command_test._num_steps(folder) == 5


def test_a_trial_that_ends_while_another_sweep_looks_is_not_made_again(
  folder, sweep_file, monkeypatch
):
  read = spec.read_spec(sweep_file(_TPE.format(2)))
  sweep_dir = str(folder / "runs" / "sweeps" / "mine")
  one, other = (
    StudyTrials(read, PointBuilder(read), sweep_dir, None) for _ in range(2)
  )
  trial, hold = one.take(), other._hold

  def hold_late(number):
    if number == trial.trial.number:
      one.finish(trial, Ending.DONE, 0.5)
    return hold(number)

  monkeypatch.setattr(other, "_hold", hold_late)
  assert other.take().trial.number == 1
  assert [each.state for each in _trials(folder)] == [_State.COMPLETE, _State.RUNNING]


def test_two_sweeps_share_a_study_in_a_database(folder, sweep_file):
  path = sweep_file(_TPE.format(6))
  storage = f"--storage=sqlite:///{folder}/study.db"
  optuna.create_study(study_name="mine", storage=storage[10:], direction="maximize")
  both = [command_test._start(folder, path, storage, STEP_S="0.1") for _ in range(2)]
  outputs = [process.communicate(timeout=90) for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  trials = optuna.load_study(study_name="mine", storage=storage[10:]).trials
  assert len([t for t in trials if t.state == _State.COMPLETE]) == 6


@pytest.mark.parametrize(
  ("text", "flags", "words"),
  [
    (_TPE.format(2) + "choice/TrainStep.los = (1,)", (), ["did you mean 'loss'?"]),
    (_TPE.format(2), ("--storage=nowhere://x",), ["--storage=nowhere://x"]),
  ],
)
def test_mistake_is_refused_before_anything_starts(sweep, capsys, text, flags, words):
  assert sweep(text, *flags) == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert all(word in line for word in words)


def test_without_optuna_the_way_to_get_it_is_told(folder, sweep_file):
  program = "import sys; sys.path[0] = sys.argv.pop(1); sys.modules['optuna'] = None; "
  program += "from trainer.sweep import __main__ as command; "
  program += "sys.exit(command.main(sys.argv))"
  process = command_test._start(folder, sweep_file(_TPE.format(2)))
  arguments = [process.args[0], "-c", program, *process.args[3:]]
  process.communicate()
  done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
  assert done.returncode == 2
  assert "pip install 'retrieval-trainer[sweep]'" in done.stderr.splitlines()[-1]
