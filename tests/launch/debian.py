"""Debian packages of tests: installed if possible, otherwise the test is skipped."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess

import pytest


def need(programs, packages):
  """Installs the packages if a program is missing and the user is root on Debian."""
  with open("/tmp/retrieval-trainer-packages.lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    missing = [name for name in programs if shutil.which(name, path=_path()) is None]
    if not missing:
      return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
      pytest.skip(f"{', '.join(missing)} missing, and this is not Debian's root")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-qq"], install):
      subprocess.run(
        command, env=environment, check=True, capture_output=True, timeout=300
      )


def program(name):
  """Returns the path of an installed program."""
  return shutil.which(name, path=_path())


def _path():
  return f"{os.environ['PATH']}:/usr/sbin:/sbin"
