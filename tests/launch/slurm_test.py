"""Jobs on a real Slurm on this host: started, stopped and requeued."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from tests.launch import debian

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "slurm.sh")
_DAEMONS = pathlib.Path(__file__).with_name("slurm_daemons.sh")
DIGITS = str(ROOT / "configs" / "runs" / "digits.gin")
SWEEP = str(ROOT / "configs" / "sweeps" / "digits.gin")
# The fake fails on request in a job's first run: FIRST is "RANK STATUS" or "hang".
_FAKE = """#!/bin/bash
case "$1 $2" in "-m trainer.task" | "-m trainer.sweep") ;; *) exec {python} "$@" ;; esac
[[ " $* " != *" --dry_run "* ]] || exit 0
element=${{SLURM_ARRAY_TASK_ID:-none}}
echo "$element $SLURM_PROCID ${{SLURM_RESTART_COUNT:-0}}" >>"{calls}-$NAME"
[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || exit 0
[ -z "${{ELEMENT:-}}" ] || [ "$ELEMENT" = "$element" ] || exit 0
[ "$FIRST" != hang ] || exec sleep 60
[ "${{FIRST%% *}}" = "$SLURM_PROCID" ] || exec sleep 60
sleep 0.5
exit "${{FIRST##* }}"
"""


def _free_ports(number):
  with_ports = [socket.socket() for _ in range(number)]
  for sock in with_ports:
    sock.bind(("127.0.0.1", 0))
  ports = [str(sock.getsockname()[1]) for sock in with_ports]
  for sock in with_ports:
    sock.close()
  return ports


@pytest.fixture(scope="module")
def cluster():
  """The environment of a running Slurm."""
  debian.need(
    ["slurmctld", "slurmd", "sbatch", "munged"],
    ["slurmctld", "slurmd", "slurm-client", "munge"],
  )
  if os.geteuid() != 0:
    pytest.skip("Slurm's daemons are started as root")
  # The socket of Munge must be reachable by every user; folders of pytest are not.
  with tempfile.TemporaryDirectory(dir="/tmp", prefix="slurm-") as folder:
    daemons = subprocess.Popen(
      [str(_DAEMONS), folder, *_free_ports(3)],
      env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
      text=True,
    )
    try:
      assert daemons.stdout.readline() == "ready\n"
      yield {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
    finally:
      daemons.stdin.close()
      daemons.wait(timeout=60)


@pytest.fixture
def fake(cluster, tmp_path):
  """The environment of a Slurm with a fake instead of the task."""
  path = tmp_path / "python"
  path.write_text(_FAKE.format(python=sys.executable, calls=tmp_path / "calls"))
  path.chmod(0o755)
  return {**cluster, "TRAINER_PYTHON": str(path)}


def _submit(environment, *flags, timeout=90):
  return subprocess.run(
    [SCRIPT, *flags],
    env=environment,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


def _calls(tmp_path, name):
  path = tmp_path / f"calls-{name}"
  return sorted(path.read_text().splitlines()) if path.exists() else []


def _wait_for(condition_fn, timeout_s=60):
  deadline = time.monotonic() + timeout_s
  while not condition_fn():
    assert time.monotonic() < deadline
    time.sleep(0.2)


def _is_over(cluster, job):
  show = ["scontrol", "show", "job", job]
  text = subprocess.run(show, env=cluster, capture_output=True, text=True).stdout
  states = re.findall(r"JobState=(\w+)", text)
  over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
  return bool(states) and all(state in over for state in states)


def test_statuses_3_and_4_requeue_a_job_and_5_fails_it(fake, tmp_path):
  """Runs three jobs concurrently, because requeueing takes seconds."""
  jobs = {}
  for status in ("3", "4", "5"):
    environment = {**fake, "NAME": status, "FIRST": f"0 {status}"}
    done = _submit(
      environment, "--tasks_per_node=1", DIGITS, f"--model_dir={tmp_path}/run{status}"
    )
    assert done.returncode == 0, done.stderr
    jobs[status] = done.stdout.strip()
  _wait_for(lambda: all(_is_over(fake, job) for job in jobs.values()))
  assert _calls(tmp_path, "3") == ["none 0 0", "none 0 1"]
  assert _calls(tmp_path, "4") == ["none 0 0", "none 0 1"]
  assert _calls(tmp_path, "5") == ["none 0 0"]


def test_failure_of_one_task_stops_the_job_with_its_status(fake, tmp_path):
  environment = {**fake, "NAME": "one", "FIRST": "1 5"}
  start = time.monotonic()
  done = _submit(
    environment, "--nodes=2", "--wait", DIGITS, f"--model_dir={tmp_path}/run"
  )
  assert done.returncode == 5
  assert time.monotonic() - start < 50
  assert _calls(tmp_path, "one") == ["none 0 0", "none 1 0"]


@pytest.mark.thorough
def test_only_the_preempted_array_element_is_requeued(fake, tmp_path):
  environment = {**fake, "NAME": "array", "FIRST": "0 3", "ELEMENT": "2"}
  done = _submit(environment, "--array=3", "--wait", "--sweep", SWEEP)
  assert done.returncode == 0, done.stderr
  assert _calls(tmp_path, "array") == ["0 0 0", "1 0 0", "2 0 0", "2 0 1"]


@pytest.mark.thorough
def test_cancelled_job_is_not_requeued(fake, tmp_path):
  environment = {**fake, "NAME": "cancel", "FIRST": "hang"}
  job = _submit(environment, DIGITS, f"--model_dir={tmp_path}/run").stdout.strip()
  _wait_for(lambda: _calls(tmp_path, "cancel"))
  subprocess.run(["scancel", job], env=fake, check=True)
  _wait_for(lambda: _is_over(fake, job))
  time.sleep(8)  # Longer than the delay of a requeued job.
  assert _is_over(fake, job)
  assert _calls(tmp_path, "cancel") == ["none 0 0"]


@pytest.mark.thorough
def test_two_real_tasks_resume_after_a_preemption_warning(cluster, tmp_path):
  """The job is warned as before its time limit: it saves, is requeued and resumes."""
  short = ("NUM_STEPS = 600", "LoopOptions.steps_per_loop = 10")
  short += ("LoopOptions.checkpoint_every_steps = 10", f"DATA_DIR = '{tmp_path}/data'")
  run = tmp_path / "run"
  task = [sys.executable, "-m", "trainer.task", f"--model_dir={run}"]
  short += ("TrainStep.mining_statistics = None",)  # Slow to compile.
  params = [f"--gin_param={param}" for param in short]
  ingest = [*task, f"--gin_file={DIGITS}", *params, "--mode=ingest"]
  subprocess.run(ingest, cwd=ROOT, check=True, capture_output=True)
  done = _submit(
    {**cluster, "TRAINER_PYTHON": sys.executable},
    *("--tasks_per_node=2", "--warn_s=60", DIGITS, f"--model_dir={run}"),
    *(*params, "--mode=train"),
  )
  assert done.returncode == 0, done.stderr
  job = done.stdout.strip()
  listed = run / "checkpoints" / "checkpoint"
  _wait_for(lambda: listed.exists() and "ckpt-" in listed.read_text(), 150)
  warn = ["scancel", "--batch", "--signal=TERM", job]
  subprocess.run(warn, env=cluster, check=True)
  _wait_for(lambda: _is_over(cluster, job), 200)
  log = (run / f"slurm-{job}.txt").read_text()
  assert "exit status 3, warned: yes; queued again" in log
  assert "2 replicas" in log
  [restored] = re.findall(r"From step (\d+)", log)[1:]
  [saved] = set(re.findall(r"SIGTERM: stopped after step (\d+); the newest", log))
  assert restored == saved
  steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").open()]
  assert steps == list(range(10, 601, 10))


_thorough = functools.partial(pytest.param, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (("--partition=nope", DIGITS), "nvalid partition"),
    _thorough(("--nodes=5", DIGITS), "Slurm refuses: Requested node configuration"),
    ((DIGITS, "--gin_param=MARGN = 1"), "nothing uses MARGN"),
    _thorough((DIGITS, "--gin_parm=A.b = 1"), "gin_parm"),
    _thorough(("--sweep", DIGITS), "nothing is swept"),
  ],
)
def test_invalid_jobs_are_not_submitted(cluster, tmp_path, flags, words):
  model_dir = () if "--sweep" in flags else (f"--model_dir={tmp_path}/run",)
  done = _submit({**cluster, "TRAINER_PYTHON": sys.executable}, *flags, *model_dir)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert words in line
  assert not (tmp_path / "run").exists()
