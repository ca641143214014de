"""The command, from flags to the verdict."""

from __future__ import annotations

import re

import pytest

from trainer.tpu_check import command

_DIGITS = "configs/runs/digits.gin"


@pytest.fixture
def run(compiler_python, capsys, monkeypatch):
  """Calls the command; its exit status, and what it printed to both streams."""
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")

  def call(*arguments):
    python = f"--compiler_python={compiler_python}"
    status = command.main(["tpu_check", *arguments, python])
    return status, *capsys.readouterr()

  return call


@pytest.mark.parametrize("run_file", [_DIGITS, "configs/runs/fashion_mnist.gin"])
def test_a_run_compiles_for_a_tpu_without_its_data(run, run_file):
  classes = "--gin_param=PKSchedule.classes_per_batch = 4"
  status, out, _ = run(run_file, "--topology=v5e:2x2", classes)
  assert status == 0, out
  assert "COMPILES for v5e:2x2: a replica needs" in out
  for name in ("arguments", "outputs", "temporaries", "code"):
    [number] = re.findall(rf"^    {name} +(\S+) [KMG]iB$", out, re.MULTILINE)
    assert float(number) > 0
  assert re.search(r"operations +\S+e\+0[6-9] FLOP a step", out)
  assert re.search(r"collectives +[1-9]\d* all-reduce; \S+ KiB come", out)
  assert "It does not say: how fast" in out
