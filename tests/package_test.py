from __future__ import annotations

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

import trainer

ROOT = pathlib.Path(__file__).parents[1]
_PACKAGED = ("setup.py", "pyproject.toml", "LICENSE", "trainer", "tests", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, built in a copy to keep the source folder clean."""
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
  """The metadata of the wheel."""
  [name] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
  return email.message_from_bytes(wheel.read(name))


def _requirements(metadata, python, machine="x86_64", platform="linux", extra=""):
  """Returns names and versions that such a machine installs."""
  lines = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
  environment = {
    "python_version": python,
    "platform_machine": machine,
    "sys_platform": platform,
    "extra": extra,
  }
  return {
    line.name: str(line.specifier)
    for line in lines
    if line.marker is None or line.marker.evaluate(environment)
  }


@pytest.mark.main_job
def test_wheel_contains_exactly_the_modules_and_page_templates(wheel):
  files = {
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "*.html", "*.css", "*.js")
    for path in (ROOT / "trainer").rglob(pattern)
  }
  packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
  assert packed == files
  assert "trainer/report/document.css" in files


@pytest.mark.main_job
def test_wheel_runs_a_run_file_from_another_folder(wheel, tmp_path):
  wheel.extractall(tmp_path / "installed")
  shutil.copytree(ROOT / "configs", tmp_path / "mine")
  (tmp_path / "elsewhere").mkdir()
  command = [sys.executable, "-m", "trainer.task", "--mode=ingest", "--model_dir=run"]
  done = subprocess.run(
    [*command, "--gin_file=../mine/runs/digits.gin", "--gin_param=DATA_DIR = 'digits'"],
    cwd=tmp_path / "elsewhere",
    env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert list((tmp_path / "elsewhere" / "digits").glob("*.tfrecord"))


def test_wheel_has_the_licence(wheel):
  [name] = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
  assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_wheel_has_the_name_and_version_of_the_package(metadata):
  assert metadata["Name"] == "retrieval-trainer"
  assert metadata["Version"] == trainer.__version__


def test_python_versions_are_those_of_the_supported_stacks(metadata):
  bounds = set(metadata["Requires-Python"].split(","))
  assert bounds == {">=3.9", "<3.14"}


@pytest.mark.parametrize("python", ["3.9", "3.10", "3.11"])
def test_older_python_installs_the_full_stack(metadata, python):
  required = _requirements(metadata, python)
  assert required["tensorflow"] == "==2.15.*"
  assert required["tensorflow-addons"] == "==0.23.*"
  assert required["tensorflow-io"] == "==0.36.*"
  assert required["numpy"] == "<2"
  assert not {"tf-keras"} & set(required)


@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_newer_python_installs_current_tensorflow_with_keras_2(metadata, python):
  required = _requirements(metadata, python)
  assert required["tensorflow"] == required["tf-keras"] == "<2.22,>=2.19"
  assert "tensorboard" in required
  assert not {"tensorflow-addons", "tensorflow-io"} & set(required)


@pytest.mark.parametrize(
  ("machine", "platform", "present"),
  [
    ("aarch64", "linux", {"tensorflow-io"}),
    ("arm64", "darwin", {"tensorflow-io", "tensorflow-addons"}),
    ("AMD64", "win32", set()),
  ],
)
def test_package_without_wheels_for_a_platform_is_not_required_there(
  metadata, machine, platform, present
):
  required = _requirements(metadata, "3.11", machine, platform)
  assert {"tensorflow-io", "tensorflow-addons"} & set(required) == present
  assert "tensorflow" in required


@pytest.mark.parametrize("python", ["3.9", "3.11", "3.12", "3.13"])
def test_every_python_installs_the_template_engine(metadata, python):
  assert "jinja2" in _requirements(metadata, python)


@pytest.mark.parametrize("python", ["3.9", "3.11", "3.12", "3.13"])
def test_every_python_installs_readers_of_parquet_lmdb_and_hdf5(metadata, python):
  assert {"pyarrow", "lmdb", "h5py"} <= set(_requirements(metadata, python))


def test_packages_not_needed_for_training_are_extras(metadata):
  assert set(metadata.get_all("Provides-Extra")) == {
    "benchmarks",
    "cuda",
    "datasets",
    "heic",
    "search",
    "sweep",
    "check",
  }


def test_change_log_begins_with_this_version():
  headings = re.findall(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.M)
  assert headings[0] == trainer.__version__
