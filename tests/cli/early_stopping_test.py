"""Evaluation during training: best checkpoint, early stopping and resuming."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from trainer import task
from trainer.cli.train_and_evaluate import BestTracker, EarlyStopping, EvaluationHistory
from trainer.errors import UserError
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.training.checkpoint import Checkpoints
from trainer.training.options import LoopOptions

_DIGITS = "configs/runs/digits.gin"
_PARAMS = (
  "NUM_STEPS = 60",
  "LoopOptions.steps_per_loop = 5",
  "LoopOptions.checkpoint_every_steps = 10",
  "train_and_evaluate.early_stopping = @EarlyStopping()",
  "EarlyStopping.every_steps = 10",
  "EarlyStopping.metric = 'eval/recall_at_1'",
  "TrainStep.mining_statistics = None",  # Slow to compile.
)


def _task(model_dir, data, *params, mode="train_and_evaluate"):
  params = (*_PARAMS, f"DATA_DIR = '{data}'", *params)
  flags = (f"--mode={mode}", f"--gin_file={_DIGITS}", f"--model_dir={model_dir}")
  return task.main(["trainer", *flags, *(f"--gin_param={p}" for p in params)])


def _history(model_dir):
  lines = (model_dir / "eval" / "history.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _without_time(rows):
  return [{name: value for name, value in r.items() if name != "time"} for r in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("early_stopping")


@pytest.fixture(scope="module")
def stopped(folder):
  """The folder of a run that stopped early."""
  model_dir = folder / "stopped"
  assert _task(model_dir, folder / "data", "EarlyStopping.patience = 1") == 0
  return model_dir


def test_run_ends_after_the_first_evaluation_without_improvement(stopped):
  values = [row["eval/recall_at_1"] for row in _history(stopped)]
  assert len(values) < 6
  assert values[-1] <= max(values[:-1])
  assert values[:-1] == sorted(set(values[:-1]))
  results = json.loads((stopped / "eval" / "metrics.json").read_text())
  assert results["latest"]["step"] == 10 * len(values)


def test_the_best_encoder_is_kept_and_can_be_evaluated(folder, stopped):
  best = max(_history(stopped), key=lambda row: row["eval/recall_at_1"])
  again = folder / "again"
  shutil.copytree(stopped, again)
  params = ("EarlyStopping.patience = 1", "evaluate.checkpoint = 'best'")
  assert _task(again, folder / "data", *params, mode="evaluate") == 0
  latest = json.loads((again / "eval" / "metrics.json").read_text())["latest"]
  assert latest["step"] == best["step"]
  assert latest["eval/recall_at_1"] == best["eval/recall_at_1"]


@pytest.mark.thorough
def test_run_that_stopped_early_does_not_continue(folder, stopped):
  before = _history(stopped)
  assert _task(stopped, folder / "data", "EarlyStopping.patience = 1") == 0
  assert _history(stopped) == before


@pytest.mark.thorough
def test_evaluation_killed_after_its_checkpoint_is_repeated(folder, stopped):
  killed = folder / "killed_later"
  shutil.copytree(stopped, killed)
  rows = (killed / "eval" / "history.jsonl").read_text().splitlines(keepends=True)
  (killed / "eval" / "history.jsonl").write_text("".join(rows[:-1]))
  assert _task(killed, folder / "data", "EarlyStopping.patience = 1") == 0
  assert _without_time(_history(killed)) == _without_time(_history(stopped))


@pytest.mark.thorough
def test_unsaved_evaluations_of_a_killed_run_are_repeated(folder, stopped):
  killed = folder / "killed"
  shutil.copytree(stopped, killed)
  # The state after a kill between the second evaluation and the second checkpoint.
  for path in (killed / "checkpoints").glob("ckpt-*"):
    if not path.name.startswith("ckpt-10."):
      path.unlink()
  (killed / "checkpoints" / "checkpoint").unlink(missing_ok=True)
  assert _task(killed, folder / "data", "EarlyStopping.patience = 1") == 0
  assert _without_time(_history(killed)) == _without_time(_history(stopped))


def _evaluations(model_dir, encoder, last_step, patience=2):
  return EvaluationHistory(
    metric="eval/map",
    patience=patience,
    model_dir=str(model_dir),
    encoder=encoder,
    last_step=last_step,
  )


@pytest.fixture
def encoder():
  encoder = Encoder(backbone=Perceptron(hidden_units=(4,)), embedding_size=2)
  encoder.create_variables((3,))
  return encoder


def _fill(encoder, value):
  for variable in encoder.variables:
    variable.assign(tf.fill(variable.shape, np.float32(value)))


def test_patience_counts_from_the_best_across_a_resume(tmp_path, encoder):
  evaluations = _evaluations(tmp_path, encoder, 0)
  for step, value in ((5, 0.1), (10, 0.5), (15, 0.5)):
    _fill(encoder, step)
    evaluations.add(step, {"eval/map": value})
  assert evaluations.tracker == BestTracker(0.5, 10, 1)
  resumed = _evaluations(tmp_path, encoder, 15)
  assert resumed.tracker == BestTracker(0.5, 10, 1)
  resumed.add(20, {"eval/map": 0.3})
  assert resumed.is_over
  assert Checkpoints(model_dir=str(tmp_path / "best"), encoder=encoder).restore() == 10
  assert all(np.all(variable == 10.0) for variable in encoder.variables)


def test_evaluations_after_the_resumed_step_are_discarded(tmp_path, encoder):
  evaluations = _evaluations(tmp_path, encoder, 0)
  for step, value in ((5, 0.1), (10, 0.9)):
    _fill(encoder, step)
    evaluations.add(step, {"eval/map": value})
  resumed = _evaluations(tmp_path, encoder, 5)
  assert resumed.tracker == BestTracker(0.1, 5, 0)
  best = Checkpoints(model_dir=str(tmp_path / "best"), encoder=encoder)
  assert best.restore() == 5
  assert all(np.all(variable == 5.0) for variable in encoder.variables)
  # The new best has an earlier step than the discarded one.
  _fill(encoder, 7)
  resumed.add(7, {"eval/map": 0.5})
  assert best.restore() == 7


def test_missing_best_encoder_resets_the_tracker(tmp_path, encoder):
  _evaluations(tmp_path, encoder, 0).add(5, {"eval/map": 0.9})
  shutil.rmtree(tmp_path / "best")
  assert _evaluations(tmp_path, encoder, 5).tracker == BestTracker()


_OPTIONS = LoopOptions(num_steps=60, steps_per_loop=4, checkpoint_every_steps=8)
# Between two checkpoints, at the end of a loop.
_BETWEEN = 12


def test_unknown_metric_is_refused_with_the_nearest_name():
  early_stopping = EarlyStopping(every_steps=8, metric="eval/map_at_q")
  with pytest.raises(UserError, match="did you mean 'eval/map_at_r'"):
    early_stopping.check(_OPTIONS, ["eval/map_at_r", "eval/mrr"])


def test_evaluations_between_two_checkpoints_are_refused():
  with pytest.raises(UserError, match="every_steps=12 must be a multiple"):
    EarlyStopping(every_steps=_BETWEEN).check(_OPTIONS, ["eval/map_at_r"])


def _flags(model_dir, data, *params):
  params = (f"DATA_DIR = '{data}'", *params)
  flags = (f"--gin_file={_DIGITS}", f"--model_dir={model_dir}")
  return [*flags, *(f"--gin_param={param}" for param in params)]


@pytest.mark.thorough
def test_separate_process_evaluates_the_checkpoints(folder, tmp_path):
  params = ("NUM_STEPS = 20", *_PARAMS[1:3], _PARAMS[-1])
  flags = _flags(tmp_path, folder / "data", *params)
  assert task.main(["trainer", "--mode=ingest", *flags]) == 0
  # Waits for a run that has not started.
  command = [sys.executable, "-m", "trainer.task", "--mode=follow", *flags]
  with subprocess.Popen([*command, "--gin_param=follow.poll_s = 0.2"]) as following:
    assert task.main(["trainer", "--mode=train", *flags]) == 0
    assert following.wait(timeout=300) == 0
  rows = _history(tmp_path)
  assert rows[-1]["step"] == 20
  best = max(rows, key=lambda row: row["eval/map_at_r"])["step"]
  assert (tmp_path / "best" / "checkpoints" / f"ckpt-{best}.index").exists()


def test_following_a_run_that_never_starts_times_out(folder, tmp_path, capsys):
  flags = _flags(tmp_path, folder / "data", "follow.timeout_s = 0.5")
  assert task.main(["trainer", "--mode=ingest", *flags]) == 0
  assert task.main(["trainer", "--mode=follow", *flags]) == 2
  assert "no new checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
  "options", [{"every_steps": 0}, {"every_steps": 5, "patience": 0}]
)
def test_numbers_below_one_are_refused(options):
  with pytest.raises(UserError, match="must be at least 1"):
    EarlyStopping(**options)
