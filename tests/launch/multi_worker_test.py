"""Workers started together, with a fake task and once with the real one."""

from __future__ import annotations

import getpass
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.launch import debian

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "multi_worker.sh")
DIGITS = str(ROOT / "configs" / "runs" / "digits.gin")
FAKE = pathlib.Path(__file__).with_name("fake_worker.py")


def _program(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/bash\n{text}\n")
  path.chmod(0o755)
  return str(path)


@pytest.fixture
def python(tmp_path):
  """A Python that runs the fake instead of the task."""
  return _program(
    tmp_path / "python",
    f'case $1 in -m) shift 2; exec "{sys.executable}" "{FAKE}" "$@" ;;\n'
    f'*) exec "{sys.executable}" "$@" ;; esac',
  )


@pytest.fixture
def start(tmp_path, python):
  """Starts the script with the run folder `run`."""

  def call(*flags, **environment):
    return subprocess.Popen(
      [SCRIPT, DIGITS, f"--model_dir={tmp_path}/run", *flags],
      env={**os.environ, "TRAINER_PYTHON": python, **environment},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return call


@pytest.fixture
def launch(start):
  """Runs the script; returns status, output and errors."""

  def call(*flags, **environment):
    process = start(*flags, **environment)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors

  return call


def _calls(tmp_path, index):
  return len((tmp_path / "run" / f"calls-{index}").read_text().splitlines())


def test_each_worker_has_its_index_in_the_cluster(launch, tmp_path):
  status, output, errors = launch("--num_workers=3", "--gin_param=A.b = 'c d'")
  assert status == 0, errors
  said = dict(re.findall(r"^\[worker (\d)\] of (\[.+?\]) GPU", output, re.MULTILINE))
  assert sorted(said) == ["0", "1", "2"]
  assert len(set(said.values())) == 1
  ports = re.findall(r"127\.0\.0\.1:(\d+)", said["0"])
  assert len(set(ports)) == 3
  assert output.count("'gin_param': \"A.b = 'c d'\"") == 3
  assert output.count("'strategy': 'multi_worker'") == 3


def test_log_of_each_worker_is_also_written_to_a_file(launch, tmp_path):
  launch("--num_workers=2")
  logs = sorted((tmp_path / "run" / "workers").iterdir())
  assert [path.name for path in logs] == ["worker-0.txt", "worker-1.txt"]
  assert all(path.read_text().startswith("of [") for path in logs)


@pytest.mark.parametrize("status", [1, 2, 5])
def test_failure_of_one_worker_stops_all_and_is_the_status(launch, tmp_path, status):
  code, output, _ = launch(
    "--num_workers=3", FAIL_INDEX="1", FAIL_STATUS=str(status), FAIL_TIMES="1"
  )
  assert code == status
  assert sorted(re.findall(r"\[worker (\d)\] told to end", output)) == ["0", "2"]
  assert [_calls(tmp_path, index) for index in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("status", ["3", "4", "killed"])
def test_preempted_stalled_or_lost_worker_restarts_all(launch, tmp_path, status):
  code, _, errors = launch(
    "--num_workers=2", FAIL_INDEX="0", FAIL_STATUS=status, FAIL_TIMES="2"
  )
  assert code == 0, errors
  assert [_calls(tmp_path, index) for index in range(2)] == [3, 3]
  assert "all workers will start again in 2 s, from step 0 (2 of 3" in errors


def test_restarts_are_limited(launch, tmp_path):
  code, _, _ = launch(
    "--num_workers=2",
    "--max_restarts=1",
    FAIL_INDEX="0",
    FAIL_STATUS="killed",
    FAIL_TIMES="9",
  )
  assert code == 4
  assert _calls(tmp_path, 0) == 2


def _are_alive(pids):
  return [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]


def _pids(tmp_path, num_workers):
  files = [tmp_path / "run" / f"calls-{index}" for index in range(num_workers)]
  deadline = time.monotonic() + 30
  while not all(path.exists() and path.read_text() for path in files):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  return [int(path.read_text().split()[-1]) for path in files]


def test_signal_is_forwarded_and_workers_are_not_restarted(start, tmp_path):
  process = start("--num_workers=2", HANG="yes")
  pids = _pids(tmp_path, 2)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 3
  assert output.count("told to end") == 2
  assert _are_alive(pids) == []
  assert [_calls(tmp_path, index) for index in range(2)] == [1, 1]


def test_workers_stop_if_the_script_is_killed(start, tmp_path):
  process = start("--num_workers=2", HANG="yes")
  pids = _pids(tmp_path, 2)
  process.kill()
  process.communicate(timeout=30)
  deadline = time.monotonic() + 20
  while _are_alive(pids):
    assert time.monotonic() < deadline
    time.sleep(0.1)
  assert _are_alive(pids) == []


def test_each_worker_has_one_gpu(launch, tmp_path):
  _program(tmp_path / "bin" / "nvidia-smi", "echo 'GPU 0: a fake'")
  path = f"{tmp_path}/bin:{os.environ['PATH']}"
  gpus = {"PATH": path, "CUDA_VISIBLE_DEVICES": "5,7"}
  _, output, _ = launch("--num_workers=2", **gpus)
  assert sorted(re.findall(r"GPU (\d)", output)) == ["5", "7"]
  status, _, errors = launch("--num_workers=3", **gpus)
  assert status == 2
  assert "3 workers on 2 GPUs" in errors


def test_dry_run_prints_one_command_per_worker_and_starts_none(launch, tmp_path):
  status, output, errors = launch("--num_workers=2", "--dry_run")
  assert status == 0, errors
  assert len(output.splitlines()) == 2
  assert all("trainer.task --strategy=multi_worker" in x for x in output.splitlines())
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ((), "--hosts=a,b or --num_workers=N is needed"),
    (("--num_workers=0",), "--num_workers=0 has no value that fits"),
    (("--num_workers=2", "--hosts=a"), "exclude each other"),
    (("nowhere.gin",), "two run files"),
    (("--hosts=",), "--hosts= has no value that fits"),
    (("--hosts=nobody.invalid",), "host nobody.invalid can't be used"),
  ],
)
def test_user_error_is_one_line_before_anything_starts(launch, tmp_path, flags, words):
  debian.need(["ssh"], ["openssh-client"])
  status, output, errors = launch(*flags)
  assert status == 2
  assert output == ""
  [line] = errors.splitlines()
  assert line.startswith("error: ")
  assert words in line
  assert not (tmp_path / "run").exists()


@pytest.fixture
def ssh(tmp_path):
  """A real sshd for this user, and the folder of an `ssh` that connects to it."""
  debian.need(["sshd", "ssh"], ["openssh-server", "openssh-client"])
  with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
  keys = [tmp_path / "host_key", tmp_path / "user_key"]
  for key in keys:
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    subprocess.run(keygen, check=True)
  (tmp_path / "keys").write_text((tmp_path / "user_key.pub").read_text())
  (tmp_path / "sshd").write_text(
    f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys[0]}\nStrictModes no\n"
    f"AuthorizedKeysFile {tmp_path}/keys\nPidFile none\nAcceptEnv *\n"
  )
  (tmp_path / "config").write_text(
    f"Host *\nHostName 127.0.0.1\nPort {port}\nIdentityFile {keys[1]}\n"
    "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    "SendEnv TRAINER_* FAIL_* HANG\n"
  )
  real = debian.program("ssh")
  _program(tmp_path / "bin" / "ssh", f'exec {real} -F {tmp_path}/config "$@"')
  if os.geteuid() == 0:
    os.makedirs("/run/sshd", exist_ok=True)
  daemon = subprocess.Popen(
    [debian.program("sshd"), "-D", "-e", "-f", str(tmp_path / "sshd")],
    stderr=subprocess.PIPE,
    text=True,
  )
  assert "listening" in daemon.stderr.readline()
  yield str(tmp_path / "bin")
  daemon.terminate()
  daemon.communicate(timeout=10)


def test_workers_start_over_ssh_and_one_failure_stops_all(launch, tmp_path, ssh):
  hosts = f"--hosts=one,{getpass.getuser()}@two"
  path = {"PATH": f"{ssh}:{os.environ['PATH']}"}
  status, output, errors = launch(hosts, **path)
  assert status == 0, errors
  assert len(re.findall(r"of \['one:\d+', 'two:\d+'\]", output)) == 2
  fails = {"FAIL_INDEX": "1", "FAIL_STATUS": "5", "FAIL_TIMES": "2"}
  status, output, errors = launch(hosts, **path, **fails)
  assert status == 5, errors
  assert "[worker 0] told to end" in output


def test_two_real_workers_train_one_run(tmp_path):
  short = ("NUM_STEPS = 4", "LoopOptions.steps_per_loop = 2")
  short += ("LoopOptions.checkpoint_every_steps = 4", f"DATA_DIR = '{tmp_path}/digits'")
  short += ("TrainStep.mining_statistics = None",)  # Slow to compile.
  params = [f"--gin_param={param}" for param in short]
  params.append(f"--model_dir={tmp_path}/run")
  ingest = [sys.executable, "-m", "trainer.task", f"--gin_file={DIGITS}", *params]
  subprocess.run([*ingest, "--mode=ingest"], cwd=ROOT, check=True, capture_output=True)
  done = subprocess.run(
    [SCRIPT, DIGITS, "--num_workers=2", "--mode=train", *params],
    env={**os.environ, "TRAINER_PYTHON": sys.executable},
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stdout
  rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(row)["step"] for row in rows] == [2, 4]
  assert "Strategy: 2 workers with 2 replicas; this is worker 0." in done.stdout
