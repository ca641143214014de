"""The command, from flags to the verdict."""

from __future__ import annotations

import re

import pytest

from tests.thorough import thorough_except
from trainer.tpu_check import __main__

_DIGITS = "configs/runs/digits.gin"


@pytest.fixture
def run(compiler_python, capsys, monkeypatch):
  """Calls the command; returns its exit status and both output streams."""
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")

  def call(*arguments):
    python = f"--compiler_python={compiler_python}"
    status = __main__.main(["tpu_check", *arguments, python])
    return status, *capsys.readouterr()

  return call


@pytest.mark.parametrize(
  ("run_file", "changes"),
  thorough_except(
    [(_DIGITS, [])],
    [
      (_DIGITS, []),
      # It has six classes; its statistics, slow to compile, are those of digits.
      (
        "configs/runs/fashion_mnist.gin",
        ["PKSampler.classes_per_batch = 4", "TrainStep.mining_statistics = None"],
      ),
      (
        "configs/runs/digits_class_centres.gin",
        ["ClassCentres.num_classes = 1_000_000", "CENTRE_SAMPLING_RATE = 0.1"],
      ),
    ],
  ),
)
def test_a_run_compiles_for_a_tpu_without_its_data(run, run_file, changes):
  bindings = [f"--gin_param={change}" for change in changes]
  status, out, _ = run(run_file, "--topology=v5e:2x2", *bindings)
  assert status == 0, out
  assert "COMPILES for v5e:2x2: a replica needs" in out
  for name in ("arguments", "outputs", "temporaries", "code"):
    [number] = re.findall(rf"^    {name} +(\S+) [KMG]iB$", out, re.MULTILINE)
    assert float(number) > 0
  assert re.search(r"operations +\S+e\+0[6-9] FLOP a step", out)
  assert re.search(
    r"collectives +[1-9]\d* all-reduce; each replica receives \S+ KiB", out
  )
  assert "Not checked: speed" in out


def test_out_of_memory_is_reported_with_arrays_and_proposed_changes(run):
  status, out, _ = run(
    "configs/runs/glyphs.gin",
    "--topology=v5e:2x2",
    "--gin_param=PKSampler.classes_per_batch = 131072",
    "--gin_param=TrainStep.mining_statistics = None",
  )
  assert status == 1
  assert re.search(r"DOES NOT FIT v5e:2x2: a replica needs \S+ GiB of 15.75 GiB", out)
  array = r"16\.00 GiB \[131072,32,32,32\] of encoder/conv_net\w*/conv2d\w*/Conv2D"
  assert re.search(array, out)
  assert "\n  StepOptions.num_micro_batches = " in out
  assert "compiler accepts the whole replica step" not in out


@pytest.mark.thorough
def test_largest_gpu_batch_is_found_and_reported_as_an_estimate(run):
  status, out, _ = run(
    _DIGITS,
    "--fit",
    "--topology=gpu:2x0.0036GB",
    "--gin_param=TrainStep.mining_statistics = None",
  )
  assert status == 0, out
  tried = re.findall(r"= (\d+) classes x 16 samples: (too large|\S+ [KM]iB)", out)
  largest = max(int(size) for size, result in tried if result != "too large")
  smallest_too_large = min(int(size) for size, result in tried if result == "too large")
  assert smallest_too_large == largest + 2
  assert f"LARGEST for gpu:2x0.0036GB: PKSampler.classes_per_batch = {largest}\n" in out
  assert "An estimate" in out


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([_DIGITS], "--topology is missing; give one such as v5e:2x4"),
    ([_DIGITS, "--topology=v5e-8"], "such as v5e:2x4"),
    (["--topology=v5e:2x2"], "one run file is needed; got 0"),
    ([_DIGITS, "--topolgy=v5e:2x2"], "topolgy"),
    (
      ["configs/runs/digits_class_centres.gin", "--topology=v5e:2x2"],
      "ClassCentres.num_classes is not set",
    ),
    (["nowhere.gin", "--topology=v5e:2x2"], "nowhere.gin"),
    (
      [_DIGITS, "--topology=v5e:2x2", "--gin_param=PKSampler.classes_per_batch = 6"],
      "does not split over 4 replicas; try 8",
    ),
    (
      [_DIGITS, "--topology=v5e:2x2", "--gin_param=Encoder.precision='mixed_float16'"],
      "use 'mixed_bfloat16'",
    ),
    (
      [_DIGITS, "--topology=v5e:2x2", "--gin_param=StepOptions.compiled='step'"],
      "StepOptions.compiled='step'",
    ),
  ],
)
def test_user_error_is_reported_in_one_line(run, arguments, words):
  status, out, err = run(*arguments)
  assert status == 2
  [line] = [line for line in err.splitlines() if line.startswith("error: ")]
  assert words in line
  assert "COMPILES" not in out


def test_missing_compiler_is_reported_with_instructions(capsys):
  assert (
    __main__.main(
      ["", _DIGITS, "--topology=v5e:2x2", "--compiler_python=/nowhere/python"]
    )
    == 2
  )
  assert "run ./launch/tpu_check.sh, which creates it" in capsys.readouterr().err


def test_help_fits_a_screen(capsys):
  assert __main__.main(["", "--help"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) < 24
  assert "--topology" in "\n".join(lines)
