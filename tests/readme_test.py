"""Commands, links and paths of the README exist."""

from __future__ import annotations

import os
import pathlib
import re
import shlex

import pytest

import trainer.gin_registrations  # noqa: F401  Registers what a run file names.
from trainer import task
from trainer.config import run_config

ROOT = pathlib.Path(__file__).parents[1]
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Folders of the project; other paths belong to the reader.
_SHIPPED = re.compile(r"(\./)?(launch|configs|trainer|\.ci)/.+")
_TASK_FLAGS = [name for group in task.define_flags().values() for name in group]
_FLAGS = {
  "trainer.task": _TASK_FLAGS,
  "launch/local.sh": _TASK_FLAGS,
  "launch/check.sh": ["python", "short", "thorough", "install"],
}


def commands(text):
  """Returns the commands of all bash blocks, as lists of words, without comments."""
  lines = "".join(_BLOCK.findall(text)).replace("\\\n", " ").splitlines()
  words = [shlex.split(line, comments=True) for line in lines]
  return [command for command in words if command]


def problems(command):
  """Returns descriptions of nonexistent parts of a command."""
  shipped = [word.rpartition("=")[2] for word in command]
  missing = [
    f"no file {word}"
    for word in shipped
    if _SHIPPED.fullmatch(word) and not (ROOT / word).exists()
  ]
  programs = [
    word for word in command if word.endswith(".sh") and _SHIPPED.fullmatch(word)
  ]
  missing += [
    f"{word} is not executable"
    for word in programs
    if (ROOT / word).exists() and not os.access(ROOT / word, os.X_OK)
  ]
  known = [_FLAGS[name] for name in _FLAGS if any(name in word for word in command)]
  flags = re.findall(r"^--([\w-]+)", "\n".join(command), re.MULTILINE)
  missing += [
    f"no flag --{flag}" for flag in flags if known and flag not in (*known[0], "help")
  ]
  return missing


@pytest.fixture
def readme():
  return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.main_job
def test_every_command_of_the_readme_exists(readme):
  found = {shlex.join(command): problems(command) for command in commands(readme)}
  assert {command: words for command, words in found.items() if words} == {}


@pytest.mark.main_job
@pytest.mark.parametrize("script", ["./launch/local.sh", "./launch/check.sh"])
def test_readme_shows_both_main_commands(readme, script):
  assert script in [command[0] for command in commands(readme)]


def test_every_file_link_of_the_readme_resolves(readme):
  links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", readme)]
  ours = [link for link in links if link and "://" not in link]
  assert [link for link in ours if not (ROOT / link).exists()] == []


def test_paths_in_backquotes_exist(readme):
  prose = _BLOCK.sub("", readme)
  paths = [word for word in re.findall(r"`([^`\s]+)`", prose) if "*" not in word]
  ours = [path for path in paths if _SHIPPED.fullmatch(path)]
  assert [path for path in ours if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
  ("text", "problem"),
  [
    ("./launch/lcal.sh", "no file ./launch/lcal.sh"),
    ("./launch/local.sh configs/runs/digit.gin", "no file configs/runs/digit.gin"),
    ("./launch/local.sh \\\n  --model_dr=x  # why", "no flag --model_dr"),
    ("./launch/check.sh --shrt", "no flag --shrt"),
    ("python -m trainer.task --gin_file=configs/x.gin", "no file configs/x.gin"),
  ],
)
def test_nonexistent_command_is_detected(text, problem):
  [command] = commands(f"Do:\n\n```bash\n{text}\n```\n")
  assert problems(command) == [problem]


def test_existing_command_passes():
  text = "./launch/local.sh configs/runs/digits.gin --num_virtual_replicas=4"
  assert problems(shlex.split(text)) == []


def test_run_file_template_for_user_data_is_complete(readme, tmp_path):
  [block] = re.findall(r"^```gin\n(# my_run\.gin\n.*?)^```", readme, re.M | re.DOTALL)
  run_file = tmp_path / "my_run.gin"
  run_file.write_text(block.replace("/path/to/", f"{ROOT}/"), encoding="utf-8")
  for mode in ("ingest", "validate", "train_and_evaluate"):
    read = run_config.read([str(run_file)], needed=task.MODES[mode].roots)
    assert read.values["ingest.folder"] == "'/data/products'"
