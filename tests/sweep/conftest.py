from __future__ import annotations

import importlib
import pathlib
import shutil

import pytest

from trainer.sweep import __main__

ROOT = pathlib.Path(__file__).parents[2]
RUN_FILE = ROOT / "configs" / "runs" / "digits.gin"


@pytest.fixture(autouse=True)
def _parts():
  """Registers the parts that sweep files name."""
  importlib.import_module("trainer.gin_registrations")


@pytest.fixture
def sweep_file(tmp_path):
  """Writes a sweep file over the run on digits, five steps long."""

  def write(text: str, name: str = "mine"):
    path = tmp_path / f"{name}.gin"
    path.write_text(f"include '{RUN_FILE}'\nNUM_STEPS = 5\n{text}\n")
    return str(path)

  return write


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working folder in which the fake task replaces the real one."""
  fake = tmp_path / "work" / "trainer"
  fake.mkdir(parents=True)
  (fake / "__init__.py").write_text("")
  shutil.copy(pathlib.Path(__file__).with_name("fake_task.py"), fake / "task.py")
  monkeypatch.chdir(fake.parent)
  return fake.parent


@pytest.fixture
def sweep(folder, sweep_file):
  """Runs a sweep in `folder`; returns the exit status."""

  def run(text: str, *flags: str, name: str = "mine") -> int:
    return __main__.main(["sweep", sweep_file(text, name), *flags])

  return run


@pytest.fixture
def refusal(sweep, capsys, folder):
  """Runs a sweep that must be refused before anything starts; returns the line."""

  def run(text: str, *flags: str) -> str:
    assert sweep(text, *flags) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert not (folder / "runs" / "points").exists()
    return line

  return run
