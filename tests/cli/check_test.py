"""Mode `check`: output and exit status."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest

from tests.faults.processes import run_task
from tests.thorough import thorough_except
from trainer.cli import check as check_lib
from trainer.errors import UserError
from trainer.run import Hardware, Run

_REPOSITORY = pathlib.Path(__file__).parents[2]
_DIGITS = str(_REPOSITORY / "configs" / "runs" / "digits.gin")
# Each replica normalizes by its own batch, so N replicas differ from one.
_BATCH_NORM = "ConvNet.normalization = 'batch'"
_NO_STATISTICS = "TrainStep.mining_statistics = None"  # Slow to compile.
_BANK = (
  "TrainStep.cross_batch_memory = @CrossBatchMemory()",
  "CrossBatchMemory.size = 100",
  "CrossBatchMemory.warm_up_steps = 1",
)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
  """Runs a mode on digits."""
  folder = tmp_path_factory.mktemp("check")

  def run(*params, flags=(), path=_REPOSITORY, mode="check"):
    params = (f"DATA_DIR = '{folder / 'digits'}'", *params)
    command = [sys.executable, "-m", "trainer.task", f"--mode={mode}"]
    command += [f"--gin_file={_DIGITS}", f"--model_dir={folder / 'run'}"]
    command += [*flags, *(f"--gin_param={param}" for param in params)]
    paths = os.pathsep.join([str(_REPOSITORY), str(path)])
    environment = {"PYTHONPATH": paths}
    done = run_task(command, environment)
    assert not (folder / "run").exists()
    return done

  assert run(mode="ingest").returncode == 0
  return run


def _verdicts(done):
  rows = [line.split() for line in done.stdout.splitlines()]
  return {int(row[0]): row[-1] for row in rows if row[1:2] == ["replicas"]}


@pytest.mark.parity
def test_run_that_is_equal_on_all_numbers_of_replicas_passes(check):
  done = check()
  assert done.returncode == 0, done.stdout + done.stderr
  assert _verdicts(done) == {1: "ok", 2: "ok", 4: "ok"}
  head, columns, *_ = done.stdout.splitlines()
  assert "one replica with the same global batch" in head
  assert columns.split() == ["loss", "gradients", "weights", "statistics"]


_OWN_MODULE = """
import gin
import tensorflow as tf

@gin.register
def functional(features):
  images = tf.keras.Input([8, 8, 1])
  return tf.keras.Model(images, features(images))
"""
_OWN_CONFIG = """
import own_module
Encoder.backbone = @functional()
functional.features = @ConvNet()
"""


@pytest.mark.parity
@pytest.mark.thorough
def test_model_built_by_gin_is_equal_on_all_replicas(check, tmp_path):
  (tmp_path / "own_module.py").write_text(_OWN_MODULE)
  (tmp_path / "own.gin").write_text(_OWN_CONFIG)
  flags = [f"--gin_file={tmp_path / 'own.gin'}", "--allow_gin_import=own_module"]
  done = check(flags=flags, path=tmp_path)
  assert _verdicts(done) == {1: "ok", 2: "ok", 4: "ok"}, done.stdout + done.stderr


def test_run_that_differs_between_replicas_fails_with_status_one(check):
  done = check(_BATCH_NORM, _NO_STATISTICS)
  assert done.returncode == 1
  assert _verdicts(done) == {1: "ok", 2: "FAILS", 4: "FAILS"}
  assert "Traceback" not in done.stderr
  assert done.stderr.splitlines()[-1].startswith("error: replicas differ")


_NOT_COMPILED = (
  ("StepOptions.compiled = 'step'", _NO_STATISTICS),
  "compiled='step' can't compile",
)


@pytest.mark.thorough
def test_replica_counts_that_do_not_divide_the_classes_are_skipped(check):
  done = check(
    "PKSampler.classes_per_batch = 6",
    "StepOptions.num_micro_batches = 4",
    *_BANK,
    _NO_STATISTICS,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert _verdicts(done) == {1: "ok", 2: "ok"}
  assert "4 replicas are skipped: PKSampler.classes_per_batch=6" in done.stderr


@pytest.mark.parametrize(
  ("params", "reason"),
  thorough_except(
    [_NOT_COMPILED],
    [
      (("StepOptions.num_micro_batches = 60",), "num_micro_batches=60 does not divide"),
      _NOT_COMPILED,
    ],
  ),
)
@pytest.mark.thorough
def test_replica_counts_that_a_step_does_not_support_are_skipped(check, params, reason):
  size = ("PKSampler.classes_per_batch = 4", "PKSampler.samples_per_class = 15")
  done = check(*size, *params)
  assert done.returncode == 0, done.stdout + done.stderr
  assert _verdicts(done) == {1: "ok"}
  for num_replicas in (2, 4):
    line = next(x for x in done.stderr.splitlines() if f"{num_replicas} replicas" in x)
    assert reason in line


@pytest.mark.parametrize(
  ("hardware", "flag"),
  [
    (Hardware("tpu"), "--strategy=tpu"),
    (Hardware("multi_worker"), "--strategy=multi_worker"),
    (Hardware(tpu="pod"), "--tpu=pod"),
  ],
)
def test_devices_other_than_the_cpu_are_refused(hardware, flag):
  with pytest.raises(
    UserError, match=f"virtual replicas on the CPU; got {flag}: remove"
  ):
    check_lib.main(Run("nowhere", config=None, hardware=hardware))
