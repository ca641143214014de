"""Fixtures: the compiler, in the environment that the command creates."""

from __future__ import annotations

import fcntl
import pathlib
import subprocess

import pytest

from trainer.tpu_check.compiler import Compiler

ROOT = pathlib.Path(__file__).parents[2]
_FOLDER = ".venv-tpu"


@pytest.fixture(scope="session")
def compiler_python(tmp_path_factory):
  """Path of the Python with the compiler; installed once, by the first worker."""
  with open(tmp_path_factory.getbasetemp().parent / "tpu.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    command = f". launch/python.sh; compiler_environment {_FOLDER}"
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, timeout=600)
  return str(ROOT / _FOLDER / "bin" / "python")


@pytest.fixture(scope="session")
def compiler(compiler_python):
  return Compiler(compiler_python)
