from __future__ import annotations

import os
import subprocess
import sys

import gin
import pytest

from trainer import task

DIGITS = os.path.join(os.path.dirname(__file__), "..", "configs", "runs", "digits.gin")


@pytest.fixture
def refusal(capsys, tmp_path):
  """Runs the command line; returns its one line of error and the exit status."""

  def run(*flags: str) -> str:
    assert task.main(["trainer.task", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line

  return run


def _train(tmp_path, gin_file=DIGITS):
  return ("--mode=train", f"--gin_file={gin_file}", f"--model_dir={tmp_path}/run")


@pytest.mark.main_job
def test_help_loads_neither_tensorflow_nor_gin():
  program = (
    "import sys; from trainer import task; status = task.main(['task', '--help']); "
    "print(sorted({'tensorflow', 'gin', 'numpy'} & set(sys.modules)), status)"
  )
  output = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, check=True, text=True
  ).stdout
  assert output.splitlines()[-1] == "[] 0"


def test_help_has_every_mode_and_flag_and_fits_a_screen():
  text = task.help_text()
  flags = [name for group in task.define_flags().values() for name in group]
  assert all(f"--{name} " in text for name in flags)
  assert all(f"  {mode} " in text for mode in task.MODES)
  assert len(text.splitlines()) <= 40


@pytest.mark.main_job
def test_module_run_as_a_program_exits_with_the_status():
  done = subprocess.run(
    [sys.executable, "-m", "trainer.task", "--mod=train"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.splitlines() == [
    "error: Unknown command line flag 'mod'. Did you mean: mode, model_dir. See --help."
  ]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--gin_fil=x"], ["'gin_fil'", "gin_file"]),
    (["--mode=trian"], ["trian", "<ingest|validate|train|evaluate|"]),
    (["--num_virtual_replicas=0"], ["num_virtual_replicas", "not a positive"]),
    (["--num_virtual_replicas=two"], ["num_virtual_replicas", "two"]),
    (["train"], ["unknown flag 'train'"]),
    ([], ["--mode is missing"]),
    (["--mode=train"], ["--gin_file is missing"]),
    (["--mode=train", "--gin_file=x.gin"], ["--model_dir is missing"]),
    (
      ["--mode=train", "--gin_file=x.gin", "--model_dir=gs://b/run"],
      ["--model_dir=gs://b/run is not a local or mounted folder"],
    ),
  ],
)
def test_invalid_flag_is_refused(refusal, flags, words):
  line = refusal(*flags)
  assert all(word in line for word in words)


def test_missing_gin_file_is_refused_with_the_nearest(refusal, tmp_path):
  line = refusal(*_train(tmp_path, DIGITS.replace("digits", "digit")))
  assert "digit.gin" in line
  assert "did you mean 'digits.gin'?" in line


@pytest.mark.parametrize(
  ("param", "words"),
  [
    ("LoopOption.num_steps = 1", ["'LoopOption'", "did you mean 'LoopOptions'?"]),
    ("LoopOptions.num_step = 1", ["LoopOptions has no", "did you mean 'num_steps'?"]),
    ("LoopOptions.num_steps = %NUM_STEP", ["%NUM_STEP", "'NUM_STEPS'?"]),
    ("num_steps = 1", ["'num_steps'"]),
    ("UNUSED = 1", ["nothing uses UNUSED"]),
    ("LoopOptions.num_steps = (", ["invalid gin syntax"]),
  ],
)
def test_invalid_gin_param_is_refused(refusal, tmp_path, param, words):
  line = refusal(*_train(tmp_path), f"--gin_param={param}")
  assert all(word in line for word in words)
  assert not os.path.exists(tmp_path / "run")


def test_invalid_value_is_reported_without_the_gin_trace(
  refusal, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    "trainer.cli.train.main", lambda run: gin.get_configurable("LoopOptions")()
  )
  line = refusal(*_train(tmp_path), "--gin_param=LoopOptions.steps_per_loop = 0")
  assert line == "error: LoopOptions.steps_per_loop=0 must be at least 1."


def test_keyboard_interrupt_prints_no_traceback(monkeypatch, capsys):
  def interrupt(values):
    raise KeyboardInterrupt

  monkeypatch.setattr(task, "_run", interrupt)
  flags = ["task", "--mode=train", "--gin_file=x.gin", "--model_dir=y"]
  assert task.main(flags) == 130
  assert capsys.readouterr().err == "interrupted\n"
