from __future__ import annotations

import email
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import trainer

ROOT = pathlib.Path(__file__).parents[1]
_PACKAGED = ("setup.py", "pyproject.toml", "LICENSE", "trainer", "tests", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, built in a copy, so that nothing is left beside the sources."""
  source = tmp_path_factory.mktemp("source")
  ignore = shutil.ignore_patterns("__pycache__")
  for name in _PACKAGED:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, source / name, ignore=ignore)
    else:
      shutil.copy(ROOT / name, source / name)
  output = tmp_path_factory.mktemp("wheel")
  command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir"]
  subprocess.run([*command, output, source], check=True, stdin=subprocess.DEVNULL)
  [path] = output.glob("*.whl")
  with zipfile.ZipFile(path) as archive:
    yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
  """What the wheel says of itself."""
  [name] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
  return email.message_from_bytes(wheel.read(name))


def _requirements(metadata, marker):
  """Names and versions required where the marker, as written, holds."""
  lines = [line.replace("'", '"') for line in metadata.get_all("Requires-Dist")]
  ours = [line.partition(";")[0] for line in lines if line.endswith(marker)]
  return {
    match[1]: match[2].strip(" ()")
    for match in (re.match(r"([\w-]+)(.*)", line) for line in ours)
    if match
  }


@pytest.mark.main_job
def test_wheel_holds_every_module_of_the_package_and_no_other(wheel):
  modules = {
    path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer").rglob("*.py")
  }
  packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
  assert packed == modules


def test_wheel_has_the_licence(wheel):
  [name] = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
  assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_wheel_has_the_name_and_version_of_the_package(metadata):
  assert metadata["Name"] == "retrieval-trainer"
  assert metadata["Version"] == trainer.__version__


def test_python_is_bounded_by_what_the_stacks_run_on(metadata):
  bounds = set(metadata["Requires-Python"].split(","))
  assert bounds == {">=3.9", "<3.14"}


def test_older_python_gets_the_full_stack(metadata):
  full = _requirements(metadata, 'python_version < "3.12"')
  assert full == {
    "tensorflow": "==2.15.*",
    "tensorflow-addons": "==0.23.*",
    "tensorflow-io": "==0.36.*",
    "numpy": "<2",
  }


def test_newer_python_gets_current_tensorflow_with_keras_2(metadata):
  current = _requirements(metadata, 'python_version >= "3.12"')
  assert set(current) == {"tensorflow", "tf-keras", "tensorboard"}


def test_what_a_training_job_does_not_need_is_an_extra(metadata):
  assert set(metadata.get_all("Provides-Extra")) == {
    "report",
    "search",
    "sweep",
    "check",
  }


def test_change_log_begins_with_this_version():
  headings = re.findall(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.M)
  assert headings[0] == trainer.__version__
