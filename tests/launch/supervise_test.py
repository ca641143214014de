"""Restarts of a command by its exit status and progress."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import time

import pytest

SCRIPT = str(pathlib.Path(__file__).parents[2] / "launch" / "supervise.sh")
# Exits with the next of STATUSES; a "+" prefix first leaves a newer checkpoint.
_COMMAND = """#!/bin/bash
folder=${!#}; folder=${folder#*=}
mkdir -p "$folder/checkpoints"
echo >>"$folder/calls"
number=$(wc -l <"$folder/calls")
read -ra statuses <<<"$STATUSES"
status=${statuses[$((number - 1))]}
[[ $status != +* ]] || : >"$folder/checkpoints/ckpt-$((number * 10)).json"
if [[ $status = hang ]]; then
  trap ': >"$folder/ended"; exit 3' TERM INT
  : >"$folder/ready"
  /bin/sleep 30 & wait
fi
[[ $status != killed ]] || kill -KILL $$
exit "${status#+}"
"""


@pytest.fixture
def start(tmp_path):
  """Starts the script with the command, which exits with the statuses in turn."""
  command = tmp_path / "command"
  command.write_text(_COMMAND)
  command.chmod(0o755)
  pause = tmp_path / "bin" / "sleep"  # Pauses are recorded, not waited for.
  pause.parent.mkdir()
  pause.write_text(
    f'#!/bin/bash\necho "$1" >>{tmp_path}/pauses\nexec /bin/sleep 0.01\n'
  )
  pause.chmod(0o755)

  def call(statuses, *flags):
    path = f"{pause.parent}:{os.environ['PATH']}"
    return subprocess.Popen(
      [SCRIPT, *flags, str(command), f"--model_dir={tmp_path}/run"],
      env={**os.environ, "STATUSES": statuses, "PATH": path},
      # A background shell ignores SIGINT, and so would its children.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
      stderr=subprocess.PIPE,
      text=True,
    )

  return call


def _num_calls(tmp_path):
  path = tmp_path / "run" / "calls"
  return len(path.read_text().splitlines()) if path.exists() else 0


def _wait_for(path):
  deadline = time.monotonic() + 20
  while not path.exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.parametrize("status", [0, 1, 2, 5, 130])
def test_finished_and_failed_commands_run_once(start, tmp_path, status):
  assert start(str(status)).wait(30) == status
  assert _num_calls(tmp_path) == 1


def test_preempted_stalled_and_killed_commands_restart_with_backoff(start, tmp_path):
  assert start("3 4 killed 0").wait(30) == 0
  assert _num_calls(tmp_path) == 4
  assert (tmp_path / "pauses").read_text().split() == ["1", "2", "4"]


def test_script_stops_without_progress_and_reports_it(start, tmp_path):
  process = start("3 4 3 3 3", "--max_restarts=2")
  _, errors = process.communicate(timeout=30)
  assert process.returncode == 3
  assert _num_calls(tmp_path) == 3
  assert "given up after 2 restarts without a newer checkpoint (step 0)" in errors


def test_a_newer_checkpoint_counts_as_progress(start, tmp_path):
  process = start("+3 4 +3 4 +3 0", "--max_restarts=2")
  _, errors = process.communicate(timeout=30)
  assert process.returncode == 0, errors
  assert _num_calls(tmp_path) == 6
  assert "from step 50" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_forwarded_without_a_restart(start, tmp_path, number):
  process = start("hang 0")
  _wait_for(tmp_path / "run" / "ready")
  process.send_signal(number)
  assert process.wait(20) == 3
  assert _num_calls(tmp_path) == 1


def test_command_of_a_killed_supervisor_receives_sigterm(start, tmp_path):
  process = start("hang 0")
  ready, ended = (tmp_path / "run" / name for name in ("ready", "ended"))
  _wait_for(ready)
  process.kill()
  process.wait()
  _wait_for(ended)
  assert _num_calls(tmp_path) == 1


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ((), "a command is needed"),
    (("--max_restart=1", "true"), "--max_restart=1 is none of --max_restarts=N"),
    (("true",), "no --model_dir=DIR"),
  ],
)
def test_user_error_is_one_line(arguments, words):
  done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert words in line
