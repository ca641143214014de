"""Output and refusals of the Slurm script, without Slurm."""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RUN = "configs/runs/digits.gin"


def _run(*flags, **environment):
  return subprocess.run(
    [str(ROOT / "launch" / "slurm.sh"), *flags],
    cwd=ROOT,
    env={**os.environ, **environment},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=30,
  )


def test_dry_run_prints_the_slurm_request():
  options = ("--nodes=4", "--gpus_per_node=8", "--partition=gpu", "--account=me")
  done = _run("--dry_run", *options, "--time=8:00:00", "--warn_s=300", RUN)
  assert done.returncode == 0, done.stderr
  asked = [line for line in done.stdout.splitlines() if line.startswith("#SBATCH")]
  assert asked == [
    "#SBATCH --job-name=digits",
    "#SBATCH --nodes=4",
    "#SBATCH --ntasks-per-node=1",
    "#SBATCH --gpus-per-node=8",
    "#SBATCH --partition=gpu",
    "#SBATCH --account=me",
    "#SBATCH --time=8:00:00",
    "#SBATCH --output=runs/digits/slurm-%j.txt",
    "#SBATCH --open-mode=append",
    "#SBATCH --requeue",
    "#SBATCH --signal=B:TERM@300",
  ]


def test_printed_script_is_valid_shell():
  text = _run("--dry_run", RUN, "--gin_param=A.b = 'c d'").stdout
  done = subprocess.run(
    ["shellcheck", "--severity=warning", "-"],
    input=text,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ((), "a run file is needed"),
    (("nowhere.gin",), "there is no run file nowhere.gin"),
    ((RUN, RUN), "two files"),
    ((RUN, "--nodes=0"), "--nodes=0 has no value that fits"),
    ((RUN, "--time="), "--time= has no value that fits"),
    ((RUN, "--array=4"), "--array is for --sweep"),
    (("--sweep", "--nodes=2", RUN), "use --array=N"),
  ],
)
def test_user_error_is_one_line(flags, words):
  done = _run(*flags)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert words in line


def test_missing_slurm_is_reported(tmp_path):
  for tool in ("bash", "dirname", "basename", "cat", "env"):
    place = subprocess.run(["which", tool], capture_output=True, text=True).stdout
    os.symlink(place.strip(), tmp_path / tool)
  done = _run(RUN, PATH=str(tmp_path))
  assert done.returncode == 2
  assert "there is no sbatch here" in done.stderr
