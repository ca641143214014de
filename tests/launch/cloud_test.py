"""The commands for Google's TPU VMs and Vertex AI, against golden text.

They have not been run on the real service: here is none.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).with_name("golden")
RUN = "configs/runs/digits.gin"
_TPU = ("mine", "--zone=us-central2-b", "--dry_run")
_RUN = (RUN, "--model_dir=gs://b/run", "--gin_param=A.b = 'c d'")
COMMANDS = {
  "tpu_create": ("tpu_vm.sh", "create", *_TPU, "--type=v4-32", "--project=p"),
  "tpu_queue": ("tpu_vm.sh", "queue", *_TPU, "--spot"),
  "tpu_run": ("tpu_vm.sh", "run", *_TPU, *_RUN),
  "tpu_logs": ("tpu_vm.sh", "logs", *_TPU, "--worker=3"),
  "tpu_resume": ("tpu_vm.sh", "resume", *_TPU, *_RUN, "--spot"),
  "tpu_delete": ("tpu_vm.sh", "delete", *_TPU),
  "vertex": (
    *(
      "vertex.sh",
      RUN,
      "--region=europe-west4",
      "--bucket=gs://mine/runs",
      "--dry_run",
    ),
    *("--gpu=NVIDIA_TESLA_V100", "--num_gpus=4", "--num_workers=3", "--project=p"),
    *("--gin_param=NUM_STEPS = 10", "--worker_timeout_s=600"),
  ),
}


def _run(script, *flags, **environment):
  return subprocess.run(
    [str(ROOT / "launch" / script), *flags],
    cwd=ROOT,
    env={**os.environ, **environment},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
  )


@pytest.mark.parametrize("name", COMMANDS)
def test_dry_run_prints_the_golden_commands(name):
  done = _run(*COMMANDS[name], TRAINER_PYTHON="python")
  assert done.returncode == 0, done.stderr
  assert done.stdout == (GOLDEN / f"{name}.txt").read_text()


@pytest.fixture
def gcloud(tmp_path):
  """A fake gcloud that records its calls; TPUs are in the state STATE."""
  path = tmp_path / "bin" / "gcloud"
  path.parent.mkdir()
  path.write_text(
    '#!/bin/bash\ncase "$*" in *describe*) echo "$STATE"; exit ;; esac\n'
    f'printf "%q " gcloud "$@" | sed "s/ $//" >>{tmp_path}/calls; '
    f"echo >>{tmp_path}/calls\n"
    f'case "$*" in *"storage cp"*) for last; do :; done; cp "$4" {tmp_path}/run.gin ;; '
    "esac\n"
  )
  path.chmod(0o755)
  return {
    "PATH": f"{path.parent}:{os.environ['PATH']}",
    "TRAINER_PYTHON": sys.executable,
  }


def _calls(tmp_path):
  path = tmp_path / "calls"
  return path.read_text().splitlines() if path.exists() else []


def _real(name):
  return [flag for flag in COMMANDS[name] if flag != "--dry_run"]


@pytest.mark.parametrize("name", ["tpu_create", "tpu_run", "tpu_logs"])
def test_executed_commands_equal_the_printed_ones(name, gcloud, tmp_path):
  assert _run(*_real(name), **gcloud, STATE="").returncode == 0
  assert _calls(tmp_path) == (GOLDEN / f"{name}.txt").read_text().splitlines()


def test_tpu_that_is_ready_is_reused(gcloud, tmp_path):
  assert _run(*_real("tpu_create"), **gcloud, STATE="READY").returncode == 0
  assert _calls(tmp_path) == (GOLDEN / "tpu_create.txt").read_text().splitlines()[1:]


def test_preempted_tpu_is_recreated_and_a_healthy_one_kept(gcloud, tmp_path):
  assert _run(*_real("tpu_resume"), **gcloud, STATE="PREEMPTED").returncode == 0
  assert _calls(tmp_path) == (GOLDEN / "tpu_resume.txt").read_text().splitlines()
  (tmp_path / "calls").unlink()
  done = _run(*_real("tpu_resume"), **gcloud, STATE="READY")
  assert done.returncode == 2
  assert "mine is READY and needs no resuming" in done.stderr
  assert _calls(tmp_path) == []


def test_vertex_job_has_a_source_distribution_and_the_whole_config(gcloud, tmp_path):
  done = _run(*_real("vertex"), **gcloud, STATE="", TMPDIR=str(tmp_path))
  assert done.returncode == 0, done.stderr
  copy, create = (shlex.split(call) for call in _calls(tmp_path))
  assert copy[3].endswith(".tar.gz")
  assert f"--python-package-uris=gs://mine/runs/digits/{os.path.basename(copy[3])}" in (
    create
  )
  config = (tmp_path / "run.gin").read_text()
  assert "NUM_STEPS = 10  #" in config
  assert "include" not in config


@pytest.mark.parametrize(
  ("command", "words"),
  [
    (("tpu_vm.sh",), "the action is create, queue"),
    (("tpu_vm.sh", "creat", "mine"), "given was 'creat'"),
    (("tpu_vm.sh", "create", "Mine"), "'Mine' is no name of a TPU"),
    (("tpu_vm.sh", "create", "mine"), "--zone=ZONE is needed"),
    (("tpu_vm.sh", "run", *_TPU, RUN), "--model_dir=gs://BUCKET/FOLDER is needed"),
    (("tpu_vm.sh", "run", *_TPU, RUN, "--model_dir=runs/x"), "is not in a bucket"),
    (("tpu_vm.sh", "run", *_TPU, RUN, "--model_dir=gs://b"), "is not in a bucket"),
    (("tpu_vm.sh", "run", *_TPU, "/x.gin"), "below configs is needed"),
    (("vertex.sh",), "a run file is needed"),
    (("vertex.sh", RUN), "--region=REGION is needed"),
    (("vertex.sh", RUN, "--region=r"), "--bucket=gs://BUCKET/FOLDER is needed"),
    (("vertex.sh", RUN, "--bucket=mine"), "--bucket=mine has no value that fits"),
    (("vertex.sh", RUN, "--model_dir=x"), "the run's folder is that of --bucket"),
    (("vertex.sh", RUN, "--gin_param=A.b = ';'"), "';' can't be passed on"),
  ],
)
def test_user_error_is_one_line(command, words):
  done = _run(*command)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert words in line


def test_misspelt_name_is_refused_before_any_request(gcloud, tmp_path):
  done = _run(*_real("vertex"), "--gin_param=NUM_STEP = 1", **gcloud, STATE="")
  assert done.returncode == 2
  assert "NUM_STEP" in done.stderr
  assert _calls(tmp_path) == []


@pytest.mark.parametrize("script", ["tpu_vm.sh", "vertex.sh"])
def test_missing_gcloud_is_reported(script, tmp_path):
  for tool in ("bash", "dirname", "basename", "cat", "env", "sed"):
    os.symlink(str(shutil.which(tool)), tmp_path / tool)
  command = {"tpu_vm.sh": "tpu_logs", "vertex.sh": "vertex"}[script]
  done = _run(*_real(command), PATH=str(tmp_path))
  assert done.returncode == 2
  assert "there is no gcloud here" in done.stderr
