"""Mode train_and_evaluate: output, files, resuming and refusals."""

from __future__ import annotations

import csv
import functools
import json
import os
import pathlib
import re
import sys

import pytest

from tests.faults.processes import run_task
from trainer.training.callbacks import LOGGED

_REPOSITORY = pathlib.Path(__file__).parents[2]
_DIGITS = str(_REPOSITORY / "configs" / "runs" / "digits.gin")
# Short, with several loops and checkpoints.
_SHORT = ("NUM_STEPS = 12", "LoopOptions.steps_per_loop = 2")
_SHORT += ("LoopOptions.checkpoint_every_steps = 4",)
# Mining statistics are slow to compile: one run has them.
_PLAIN = (*_SHORT, "TrainStep.mining_statistics = None")


def _command(folder, model_dir, *flags, mode="train_and_evaluate", params=_SHORT):
  params = [*params, f"DATA_DIR = '{folder / 'digits'}'"]
  return [
    *(sys.executable, "-m", "trainer.task", f"--mode={mode}", f"--gin_file={_DIGITS}"),
    f"--model_dir={model_dir}",
    *(f"--gin_param={param}" for param in params),
    *flags,
  ]


def _run(*arguments, **options):
  return run_task(_command(*arguments, **options))


def _rows(model_dir):
  lines = (model_dir / "metrics.jsonl").read_text().splitlines()
  return {row["step"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@functools.cache
def _finished(folder, num_replicas):
  """Returns the folder of a finished run on `num_replicas` virtual replicas."""
  model_dir = folder / f"on_{num_replicas}"
  flag = f"--num_virtual_replicas={num_replicas}"
  params = _SHORT if num_replicas == 2 else _PLAIN
  done = _run(folder, model_dir, flag, params=params)
  assert done.returncode == 0, done.stderr
  return model_dir, done


@pytest.mark.main_job
def test_run_prints_a_table_and_the_paths_of_its_files(folder):
  _, done = _finished(folder, 2)
  head, *_ = done.stdout.splitlines()
  assert head.split() == ["before", "training", "after", "training"]
  for name in ("recall@1", "MAP@R"):
    [row] = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
    before, after = re.findall(r"([0-9.]+) \[([0-9.]+), ([0-9.]+)\]", row)
    for value, low, high in (before, after):
      assert 0 < float(low) <= float(value) <= float(high) <= 1
  paths = [line.split()[-1] for line in done.stdout.splitlines() if "/on_2/" in line]
  assert len(paths) == 5
  assert all(os.path.exists(path) for path in paths)


@pytest.mark.main_job
def test_run_leaves_files_readable_without_the_package(folder):
  model_dir, _ = _finished(folder, 2)
  names = {path.name for path in model_dir.iterdir()}
  assert {"config.gin", "operative_config.gin", "report.html"} <= names
  assert "step 12/12" in (model_dir / "log.txt").read_text()
  assert any("tfevents" in name for name in names)
  results = json.loads((model_dir / "eval" / "metrics.json").read_text())
  assert results["before_training"]["step"] == 0
  assert results["latest"]["step"] == 12
  rows = _rows(model_dir)
  assert sorted(rows) == [2, 4, 6, 8, 10, 12]
  assert set(rows[2]) == {"step", "time", *LOGGED}


@pytest.mark.parity
@pytest.mark.parametrize(
  "num_replicas", [2, pytest.param(4, marks=pytest.mark.thorough)]
)
def test_the_same_losses_are_logged_on_any_number_of_replicas(folder, num_replicas):
  one, many = (_rows(_finished(folder, num)[0]) for num in (1, num_replicas))
  first = min(one)
  assert many[first]["train/loss"] == pytest.approx(one[first]["train/loss"], rel=1e-5)
  # In later steps rounding errors move a triplet across the margin: the mean over
  # active triplets jumps, and the weights diverge.
  for step in one:
    assert many[step]["train/loss"] == pytest.approx(one[step]["train/loss"], rel=1e-2)


def test_evaluate_measures_the_newest_checkpoint(folder):
  model_dir, _ = _finished(folder, 2)
  expected = json.loads((model_dir / "eval" / "metrics.json").read_text())["latest"]
  done = _run(folder, model_dir, mode="evaluate")
  assert done.returncode == 0, done.stderr
  got = json.loads((model_dir / "eval" / "metrics.json").read_text())["latest"]
  numbers = {name: value for name, value in expected.items() if "eval/" in name}
  assert {name: got[name] for name in numbers} == pytest.approx(numbers, rel=1e-6)
  with open(model_dir / "eval" / "classes.csv", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  assert [row["class"] for row in rows] == [
    row["class"] for row in expected["worst_classes"]
  ]


@pytest.mark.main_job
def test_different_config_in_the_same_folder_is_refused_with_the_difference(folder):
  model_dir, _ = _finished(folder, 2)
  done = _run(folder, model_dir, mode="train", params=(*_SHORT, "MARGIN = 0.7"))
  assert done.returncode == 2
  assert "0.7" in done.stderr.splitlines()[-1]
  assert "--allow_config_change" in done.stderr.splitlines()[-1]


@pytest.mark.resume
def test_allowed_change_of_the_rate_is_logged_and_applied(folder):
  _finished(folder, 1)  # Creates the records.
  model_dir = folder / "changed"
  assert _run(folder, model_dir, mode="train", params=_PLAIN).returncode == 0
  params = (*_PLAIN, "NUM_STEPS = 16", "LEARNING_RATE = 0.05")
  done = _run(folder, model_dir, "--allow_config_change", mode="train", params=params)
  assert done.returncode == 0, done.stderr
  rates = {step: row["train/learning_rate"] for step, row in _rows(model_dir).items()}
  assert rates == {
    step: pytest.approx(0.001 if step <= 12 else 0.05) for step in range(2, 17, 2)
  }
  changed = "train.step.optimizer.learning_rate: 0.001 before, 0.05 now"
  assert changed in (model_dir / "log.txt").read_text() + done.stderr


def test_refused_config_change_leaves_the_folder_unchanged(folder):
  _finished(folder, 1)  # Creates the records.
  model_dir = folder / "unchanged"
  assert _run(folder, model_dir, mode="train", params=_PLAIN).returncode == 0
  config = (model_dir / "config.gin").read_text()
  params = (*_PLAIN, "StepOptions.averaging_decay = 0.9")
  done = _run(folder, model_dir, "--allow_config_change", mode="train", params=params)
  assert done.returncode == 2
  assert (
    "it differs in averages (it has 0 other variables, and lacks"
    in done.stderr.splitlines()[-1]
  )
  assert (model_dir / "config.gin").read_text() == config


@pytest.mark.parametrize(
  ("params", "flags", "message"),
  [
    ((), ("--num_virtual_replicas=3",), "does not split over 3 replicas; try 6"),
    (("PKSampler.samples_per_class = 1",), (), "without positives"),
    (("MARGIN = 0.0",), (), "margin"),
    (("NUM_STEPS = 0",), (), "must be at least 1"),
    (("LoopOptions.checkpoint_every_steps = 3",), (), "multiple of steps_per_loop"),
    (("PKSampler.classes_per_batch = 8",), (), "exceeds the 6 available classes"),
  ],
)
def test_user_error_exits_with_one_line_and_status_2(folder, params, flags, message):
  _finished(folder, 1)  # Creates the records.
  done = _run(folder, folder / "refused", *flags, params=(*_SHORT, *params))
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1]
  assert "Traceback" not in done.stderr


def test_unwritable_model_dir_is_refused(folder):
  _finished(folder, 1)
  (folder / "a_file").write_text("")
  done = _run(folder, folder / "a_file", mode="train")
  assert done.returncode == 2
  assert "can't be written to" in done.stderr.splitlines()[-1]


def test_evaluate_without_a_checkpoint_is_refused(folder):
  _finished(folder, 1)
  done = _run(folder, folder / "empty", mode="evaluate")
  assert done.returncode == 2
  assert "has no checkpoint" in done.stderr.splitlines()[-1]


def test_record_damaged_after_ingest_is_named(folder, tmp_path):
  assert _run(tmp_path, tmp_path / "run", mode="ingest").returncode == 0
  path = tmp_path / "digits" / "records-00000.tfrecord"
  times = path.stat().st_atime_ns, path.stat().st_mtime_ns
  content = bytearray(path.read_bytes())
  for position in range(3000, len(content), 3000):
    content[position] ^= 1
  path.write_bytes(content)
  os.utime(path, ns=times)  # Like a disk error: no new modification time.
  done = _run(tmp_path, tmp_path / "run", mode="train")
  assert done.returncode == 2
  assert "records-00000.tfrecord: record" in done.stderr.splitlines()[-1]
