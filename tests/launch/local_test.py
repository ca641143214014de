from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Programs called by the scripts, besides Python.
_TOOLS = ("bash", "env", "dirname", "basename", "cat", "cksum", "tr", "rm")
_SCRIPTS = sorted(
  str(path.relative_to(ROOT))
  for path in (ROOT / "launch").glob("**/*.sh")
  if path.name not in ("python.sh", "restarts.sh")  # Sourced by other scripts.
)
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def project(tmp_path):
  """A copy of the launch scripts and of the files that they need."""
  folder = tmp_path / "project"
  shutil.copytree(ROOT / "launch", folder / "launch")
  (folder / "configs" / "runs").mkdir(parents=True)
  (folder / "configs" / "runs" / "digits.gin").write_text("")
  (folder / "setup.py").write_text("")
  return folder


@pytest.fixture
def bare(tmp_path):
  """An environment without Python, with programs only in `bin`."""
  (tmp_path / "bin").mkdir()
  for tool in (*_TOOLS, "touch", "sh"):
    os.symlink(str(shutil.which(tool)), tmp_path / "bin" / tool)
  return {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}


def _program(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)


def _run(folder, *command, env=None):
  """Runs a script with a closed standard input."""
  return subprocess.run(
    [str(part) for part in command],
    cwd=folder,
    env=env,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
  )


# A fake Python of any version: prints the version, creates an environment with itself,
# and prints the calls of pip and the task.
_FAKE_PYTHON = """
case "$1 $2" in
  "--version ") echo "Python, a fake" ;;
  "-m venv") rm -rf "$4"; "$MKDIR" -p "$4/bin"; cat "$0" > "$4/bin/python"
    "$CHMOD" +x "$4/bin/python"; echo made ;;
  "-m pip") [ -z "${PIP_FAILS:-}" ] || exit 7
    for last; do :; done; echo "installed $last" ;;
  "-m trainer.task") shift 2; printf '%s\\n' "$@"; exit "${TASK_STATUS:-0}" ;;
  "-m trainer.sweep") shift 2; printf '%s\\n' "-m trainer.sweep" "$@" ;;
esac
"""


@pytest.fixture
def fake(bare):
  """An environment whose only Python is a fake 3.11."""
  _program(pathlib.Path(bare["PATH"]) / "python3.11", _FAKE_PYTHON)
  tools = {name.upper(): str(shutil.which(name)) for name in ("mkdir", "chmod")}
  return {**bare, **tools}


@pytest.mark.main_job
def test_digits_run_on_two_virtual_replicas_by_default(project, fake):
  done = _run(project, "launch/local.sh", env=fake)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    "made",
    "installed .",
    "--mode=train_and_evaluate",
    "--gin_file=configs/runs/digits.gin",
    "--model_dir=runs/digits",
    "--num_virtual_replicas=2",
  ]


@pytest.mark.main_job
def test_environment_is_reused_until_the_setup_changes(project, fake):
  _run(project, "launch/local.sh", env=fake)
  second = _run(project, "launch/local.sh", env=fake)
  (project / "setup.py").write_text("changed")
  third = _run(project, "launch/local.sh", env=fake)
  assert second.stdout.startswith("--mode")
  assert second.stderr == ""
  assert third.stdout.startswith("installed .\n--mode")
  assert "setup.py or" in third.stderr


def test_interrupted_installation_is_repeated(project, fake):
  first = _run(project, "launch/local.sh", env={**fake, "PIP_FAILS": "yes"})
  second = _run(project, "launch/local.sh", env=fake)
  assert first.returncode == 7
  assert first.stdout == "made\n"
  assert second.stdout.startswith("made\ninstalled .\n--mode")


def test_interrupted_update_is_repeated(project, fake):
  _run(project, "launch/local.sh", env=fake)
  (project / "setup.py").write_text("changed")
  _run(project, "launch/local.sh", env={**fake, "PIP_FAILS": "yes"})
  third = _run(project, "launch/local.sh", env=fake)
  assert third.stdout.startswith("made\ninstalled .\n--mode")


def test_environment_of_a_moved_project_is_updated(project, fake, tmp_path):
  _run(project, "launch/local.sh", env=fake)
  project.rename(tmp_path / "elsewhere")
  moved = _run(tmp_path / "elsewhere", "launch/local.sh", env=fake)
  assert moved.stdout.startswith("installed .\n--mode")


def test_sweep_installs_its_packages_once_despite_local_runs_between(project, fake):
  (project / "configs" / "sweeps").mkdir()
  (project / "configs" / "sweeps" / "a.gin").write_text("")
  command = ("launch/sweep.sh", "configs/sweeps/a.gin", "--num_parallel=2")
  _run(project, "launch/local.sh", env=fake)
  second = _run(project, *command, env=fake)
  assert second.stdout.splitlines() == [
    "installed .[sweep]",
    "-m trainer.sweep",
    f"{project}/configs/sweeps/a.gin",
    "--num_parallel=2",
  ]
  for again in (("launch/local.sh",), command):
    assert "installed" not in _run(project, *again, env=fake).stdout


def test_python_given_by_the_user_replaces_the_environment(project, fake):
  named = pathlib.Path(fake["PATH"]) / "python3.11"
  done = _run(project, "launch/local.sh", env={**fake, "TRAINER_PYTHON": str(named)})
  assert done.stdout.startswith("--mode=train_and_evaluate\n")
  assert not (project / ".venv").exists()


def test_run_file_is_found_from_another_folder_and_flags_are_kept(
  project, fake, tmp_path
):
  (tmp_path / "mine.gin").write_text("")
  flags = ("--model_dir=out", "--gin_param=A.b = 'c d'")
  done = _run(tmp_path, project / "launch/local.sh", "mine.gin", *flags, env=fake)
  assert done.stdout.splitlines()[2:] == [
    "--mode=train_and_evaluate",
    f"--gin_file={tmp_path}/mine.gin",
    "--model_dir=runs/mine",
    *flags,
  ]


@pytest.mark.parametrize(("flags", "num_runs"), [((), 1), (("--max_restarts=1",), 2)])
def test_preempted_run_restarts_on_request(project, fake, flags, num_runs):
  _program(pathlib.Path(fake["PATH"]) / "sleep", "")
  env = {**fake, "TASK_STATUS": "3"}
  done = _run(project, "launch/local.sh", *flags, env=env)
  assert done.returncode == 3
  assert done.stdout.splitlines().count("--model_dir=runs/digits") == num_runs
  assert "--max_restarts" not in done.stdout


@pytest.mark.parametrize("flag", ["--strategy=cpu", "--num_virtual_replicas=4"])
def test_replicas_given_by_the_user_replace_the_default(project, fake, flag):
  done = _run(project, "launch/local.sh", flag, env=fake)
  assert "--num_virtual_replicas=2" not in done.stdout
  assert done.stdout.splitlines()[-1] == flag


@pytest.mark.parametrize(
  ("visible", "is_used"), [("0", True), ("", False), ("-1", False)]
)
def test_gpus_replace_virtual_replicas(project, fake, visible, is_used):
  _program(pathlib.Path(fake["PATH"]) / "nvidia-smi", "echo 'GPU 0: a fake'")
  done = _run(project, "launch/local.sh", env={**fake, "CUDA_VISIBLE_DEVICES": visible})
  assert ("installed .[cuda]" in done.stdout) is is_used
  assert ("--num_virtual_replicas=2" not in done.stdout) is is_used


def test_missing_run_file_is_refused_before_installation(project, fake):
  done = _run(project, "launch/local.sh", "nowhere.gin", env=fake)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert "no run file nowhere.gin" in line
  assert not (project / ".venv").exists()


@pytest.mark.main_job
def test_missing_python_is_reported_with_versions_and_remedy(project, bare):
  done = _run(project, "launch/local.sh", env=bare)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert "no Python 3.11 3.10 3.9 3.12 3.13" in line
  assert "apt-get install python3.11-venv" in line


def test_shim_of_a_missing_python_is_skipped(project, bare):
  _program(pathlib.Path(bare["PATH"]) / "python3.11", "exit 127")
  real = pathlib.Path(bare["HOME"]) / f".pyenv/versions/{_VERSION}.1/bin/python"
  _program(real, f'exec "{sys.executable}" "$@"')
  find = f". launch/python.sh; find_python 3.8 {_VERSION}"
  assert _run(project, "bash", "-c", find, env=bare).stdout == f"{real}\n"


@pytest.mark.parametrize("flag", ["--pyton=3.12", "--python=3.8", "fast"])
def test_check_refuses_an_unknown_flag(project, bare, flag):
  done = _run(project, "launch/check.sh", flag, env=bare)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert flag in done.stderr


def test_ci_runs_the_check_on_both_stacks_and_nothing_else():
  lines = (ROOT / ".ci" / "run").read_text().splitlines()
  assert [line for line in lines if "check.sh" in line] == [
    "./launch/check.sh --install",
    "./launch/check.sh --python=3.12 --install &",
    "./launch/check.sh",
    "./launch/check.sh --python=3.12 --short",
  ]


@pytest.mark.parametrize("path", [*_SCRIPTS, ".ci/run"])
def test_scripts_are_executable(path):
  assert os.access(ROOT / path, os.X_OK)
